"""Which sentences of a page have something to translate."""

from __future__ import annotations

import re

import steprule

__all__ = ["has_words"]

_CODE = re.compile(r"`[^`]*`|<[^>]*>|\]\([^)]*\)|\*\*\*|\{[^}]*\}")
_COMMIT = re.compile(r"commit [0-9a-f]{12}")
_NAMES = {*steprule.catalogue(), *steprule.modifier_catalogue(), "ranger", "torch", "steprule"}
_NAMES |= {"bf16", "fp16", "fp32", "int8", "kB", "MB", "GB", "ms"}
_NAMES |= {kind.__name__ for kind in steprule.modifier_catalogue().values()}


def has_words(text: str) -> bool:
    """Whether there is something to translate, beside code, names, numbers, and where things were published.

    >>> has_words("`lr` 0.1"), has_words("AdaBelief"), has_words("step size")
    (False, False, True)
    """
    if "<http" in text or _COMMIT.search(text):
        return False
    words = re.findall(r"[A-Za-z]\w+", _CODE.sub(" ", text))
    return any(word not in _NAMES for word in words)
