"""Levels: what has one value each, from an element to all parameters of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable

# From the finest to the coarsest, but a row and a column are side by side. "matrix": one of a stack.
LEVELS = (
    *("element", "transposed", "left", "right", "row", "column"),
    *("matrix", "tensor", "group", "all"),
)
# What sums go over.
OVER = ("tensor", "row", "column", "matrix", "group", "all")
# The sides of whole matrices: an element has a row and a column.
SIDES = {
    "element": ("row", "column"),
    "transposed": ("column", "row"),
    "left": ("row", "row"),
    "right": ("column", "column"),
}
ONE_PER = {
    "element": "one per element",
    "transposed": "one per element of the transposed matrix",
    "left": "one per pair of rows",
    "right": "one per pair of columns",
    "row": "one per row",
    "column": "one per column",
    "matrix": "one per matrix of a stack",
    "tensor": "one per tensor",
    "group": "one per parameter group",
    "all": "one for all parameters",
}


def finest(levels: Iterable[str]) -> str:
    """The level of what is made of values of these levels: of a row and a column, it is an element.

    Raises: ValueError for two matrices of different forms.
    """
    found = set(levels)
    forms = [x for x in SIDES if x in found]
    if len(forms) > 1 or (forms and forms[0] != "element" and found & {"row", "column"}):
        shown = " with ".join(ONE_PER[x] for x in LEVELS if x in found and LEVELS.index(x) < 6)
        raise ValueError(f"matrices of different forms meet: {shown}")
    return "element" if {"row", "column"} <= found else min(found, key=LEVELS.index, default="all")


def reduced(level: str, over: str) -> str | None:
    """The level of a sum over values of this level, or None if there is no such sum."""
    if level in SIDES:
        return over if level == "element" or over == "matrix" else None
    return "matrix" if (level, over) in (("row", "column"), ("column", "row")) else None
