"""Pieces of Markdown that the generators of pages share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["code", "folded", "prose", "section", "table"]

_URL = re.compile(r"(?<![<(])(https?://[^\s,;)]+[^\s,;).])")
# Signs that Markdown would take for its own; *emphasis* of a word is meant so.
_SIGNS = re.compile(r"\*\w+\*|[*<>$\[\]|\\]|(?<!\w)_|_(?!\w)")
_CODE = re.compile(r"(`[^`]+`)")


def prose(text: str) -> str:
    """The text of a docstring: links become links, and no sign is taken for Markdown's."""
    parts = _CODE.split(text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    parts = _URL.split(text)
    return "".join(
        f"<{part}>"
        if number % 2
        else _SIGNS.sub(lambda found: found[0] if found[0][1:] else f"\\{found[0]}", part)
        for number, part in enumerate(parts)
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None) -> str:
    """A table; from the column `numbers_from` on, cells stand on the right."""
    right = len(headings) if numbers_from is None else numbers_from
    rule = ["---:" if place >= right else "---" for place in range(len(headings))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, rule, *rows])


def code(text: str, language: str = "python") -> str:
    """A block of code."""
    fence = "````" if "```" in text else "```"
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def folded(title: str, content: str) -> str:
    """Something long that opens when its title is chosen."""
    return f":::::{{folded}} {title}\n\n{content}\n\n:::::"


def section(heading: str, *parts: str) -> str:
    """A section; nothing if it has no parts."""
    there = [part for part in parts if part]
    return "\n\n".join([f"## {heading}", *there]) if there else ""
