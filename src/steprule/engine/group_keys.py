"""Which keys of a parameter group are hyper-parameters, which are misspelt ones, and which are notes.

torch keeps any key in a group, and trainers and wrappers put their own there: `lr_scale`, `rho`, `name`. A
misspelt hyper-parameter must not pass for such a note, because its default would then be used silently.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from steprule import errors
from steprule.engine.fields import OPTIONS

# Other names for a hyper-parameter that are too different from its own to be found by their letters.
SYNONYMS = {"lr": ("learningrate",), "eps": ("epsilon",)}
ALIKE = 0.8


def check(who: str, group: Mapping[Any, Any], known: set[str], index: int) -> None:
    """Refuse a key that is nearly a hyper-parameter, and a weight decay or option that the rule does not have.

    known: the rule's hyper-parameters. Raises: ValueError.
    """
    for key in group:
        if key in known or not isinstance(key, str):
            continue
        if key == "weight_decay":
            # Trainers put a zero into the groups of every rule.
            if group[key]:
                raise errors.no_weight_decay(who, group[key], index)
            continue
        if key in OPTIONS:
            raise errors.unknown_hyperparameter(who, key, known, index)
        meant = misspelt(key, known)
        if meant is not None:
            raise errors.misspelt_key(who, key, meant, index)


def misspelt(key: str, known: Iterable[str]) -> str | None:
    """The hyper-parameter that this key was probably meant to be, or None.

    A typo changes, drops or doubles letters after the first one. An extra word, as in `weight_decay_scale`,
    makes another name.
    """
    letters = _letters(key)
    for name in sorted(known):
        if any(_alike(letters, right) for right in (_letters(name), *SYNONYMS.get(name, ()))):
            return name
    return None


def _alike(letters: str, right: str) -> bool:
    if letters == right or (len(right) > 2 and sorted(letters) == sorted(right)):
        return True
    if len(right) < 4 or letters[:1] != right[:1] or len(letters) > len(right) + 1:
        return False
    return difflib.SequenceMatcher(None, letters, right).ratio() >= ALIKE


def _letters(name: str) -> str:
    """The name in lower case, without punctuation and doubled letters."""
    return re.sub(r"(.)\1+", r"\1", re.sub(r"[^a-z0-9]", "", name.lower()))
