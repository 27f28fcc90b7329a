"""The rows and columns of a tensor.

A matrix has a row for each first index, and a column for each combination of the others. `stacked`: more than
two dimensions are a stack of matrices, which have the rows and columns of the last two. A vector or a single
number is one row, and each of its elements a column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Shape = Sequence[int]


def is_matrix(shape: Shape) -> bool:
    """Whether there are two dimensions or more."""
    return len(shape) > 1


def dimensions(shape: Shape, over: str, stacked: bool) -> tuple[int, ...]:
    """The dimensions along which the elements of a row or column lie."""
    if over == "matrix":
        return (len(shape) - 2, len(shape) - 1)
    if not is_matrix(shape):
        return tuple(range(len(shape))) if over == "row" else ()
    if stacked:
        return (len(shape) - 1,) if over == "row" else (len(shape) - 2,)
    return tuple(range(1, len(shape))) if over == "row" else (0,)


def shape_per(shape: Shape, level: str, stacked: bool) -> tuple[int, ...]:
    """The shape that holds one value per row or column, and broadcasts to the tensor's, or per pair of them."""
    if level in ("left", "right"):
        side = shape[-2] if level == "left" else shape[-1]
        return (*shape[:-2], side, side)
    along = dimensions(shape, level, stacked)
    return tuple(1 if i in along else size for i, size in enumerate(shape))


def length(shape: Shape, over: str, stacked: bool) -> int:
    """How many elements a row or column has; a row of one dimension has all of them."""
    return math.prod(shape[i] for i in dimensions(shape, over, stacked))


def fact(shape: Shape, name: str, stacked: bool, parts: int = 1) -> int:
    """The size of a tensor, its number of rows or of columns; 1 where that is 0, since rules divide by it.

    parts: 2 for complex numbers, which count as two real ones in a row.
    """
    if name == "size":
        return max(1, math.prod(shape) * parts)
    found = length(shape, "column" if name == "rows" else "row", stacked)
    return max(1, found * (parts if name == "columns" else 1))


def epsilon(double: bool) -> float:
    """How far the next number is from 1, in double or in single precision."""
    return 2.0**-52 if double else 2.0**-23


def facts(shape: Shape, double: bool, keys: Iterable[str], parts: int = 1) -> dict[str, float]:
    """What the scalars of a program ask for about a tensor, by the keys that they know it by.

    double: whether steps of it are computed in double precision. parts: as in `fact`.
    """
    found: dict[str, float] = {}
    for key in keys:
        name = key.partition("(")[0]
        stacked = key.endswith(" of stacked")
        found[key] = epsilon(double) if name == "epsilon" else fact(shape, name, stacked, parts)
    return found
