"""Levels: what has one value each, from an element to all parameters of the optimizer."""

from __future__ import annotations

from collections.abc import Iterable

# From the finest to the coarsest, but a row and a column are side by side. "matrix": one of a stack.
LEVELS = ("element", "row", "column", "matrix", "tensor", "group", "all")
# What sums go over.
OVER = ("tensor", "row", "column", "group", "all")
ONE_PER = {
    "element": "one per element",
    "row": "one per row",
    "column": "one per column",
    "matrix": "one per matrix of a stack",
    "tensor": "one per tensor",
    "group": "one per parameter group",
    "all": "one for all parameters",
}


def finest(levels: Iterable[str]) -> str:
    """The level of what is made of values of these levels: of a row and a column, it is an element."""
    found = set(levels)
    return "element" if {"row", "column"} <= found else min(found, key=LEVELS.index, default="all")


def reduced(level: str, over: str) -> str | None:
    """The level of a sum over values of this level, or None if there is no such sum."""
    if level == "element":
        return over
    return "matrix" if (level, over) in (("row", "column"), ("column", "row")) else None
