"""Where the lines and blocks of tensors are in kernels: see `blocks` for what they are.

A kernel goes along lines in strips: a strip is a block where something is rounded at random or kept in codes,
and otherwise as many blocks of sums as are worth a loop. Lines that are whole blocks are taken as one line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from steprule.engine import blocks
from steprule.engine.blocks import Layout, Part, Region
from steprule.engine.runners.kernels.chunks import chunks

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

# How many elements a strip has if no block decides it.
STRIP = 1024
# Where chunks begin at multiples of so many elements, kernels load 16 bytes at a time.
EVEN = 16


class Needs(NamedTuple):
    """What a kernel does that depends on where elements are in the whole tensor.

    rounded: it rounds at random or keeps codes. summed: it adds elements up. drawn: it draws random numbers.
    """

    rounded: bool = False
    summed: bool = False
    drawn: bool = False


class Laid(NamedTuple):
    """How a kernel goes through one tensor.

    own: the lines and blocks of the whole. part: the lines that are here. unit: what strips are multiples of,
    in the whole. row: the first row. columns: elements of a row here, for kernels that go row by row.
    width: elements of a line here. strip: elements of a strip. block: elements of a block of sums.
    numbers: blocks of a line in the whole. scales: how many of them are here. span: elements of a line in the
    whole.
    """

    own: Layout
    part: Part
    unit: int
    row: int
    columns: int
    width: int
    strip: int
    block: int
    numbers: int
    scales: int
    span: int

    @property
    def table(self) -> tuple[int, ...]:
        """What kernels read."""
        return self[-6:]


def laid(region: Region, needs: Needs, columns: int = 0) -> Laid:
    """How a kernel with these needs goes through a region, of which each line is there in one stretch.

    columns: elements of a row, for kernels that go row by row.
    """
    own, part = blocks.layout(region.whole), blocks.part_of(blocks.layout(region.whole), region)
    assert part is not None
    of_sums = blocks.layout_of_sums(region.whole).block
    unit = own.block if needs.rounded else of_sums if needs.summed else 1
    strip = own.block if needs.rounded else max(1, STRIP // unit) * unit
    width, span, numbers = max(1, part.width), own.line, own.per_line
    scales = -(-(part.place % own.block + width) // own.block)
    if part.width == own.line and own.line % unit == 0:
        width = span = columns or max(1, sum(run.lines for run in part.runs) * part.width)
        numbers = scales = -(-width // own.block)
    row = region.first[0] if len(region.first) > 1 else 0
    return Laid(own, part, unit, row, columns, width, strip, of_sums, numbers, scales, span)


def pieces(tensors: Sequence[Laid], chunk: int) -> NDArray[np.int64]:
    """(tensor, first element, number of elements) of each chunk: whole lines, or whole strips of one line.

    chunk: how many elements it should have.
    """
    found: list[tuple[int, int, int, int, int]] = []
    for number, x in enumerate(tensors):
        for start, count in _stretches(x, chunk):
            if count <= x.width:
                size, begun = max(1, chunk // x.strip) * x.strip, x.part.place % x.unit
            else:
                lines = max(1, chunk // x.width)
                even = EVEN // math.gcd(EVEN, x.width)
                size, begun = (lines - lines % even or lines) * x.width, 0
            found.append((number, start, count, size, begun))
    if not found:
        return np.zeros((0, 3), dtype=np.int64)
    owners, starts, counts, sizes, begun = np.array(found, dtype=np.int64).T
    which, first, length = chunks(counts + begun, sizes).T
    begin = np.maximum(first - begun[which], 0)
    end = first + length - begun[which]
    return np.stack((owners[which], starts[which] + begin, end - begin), axis=1)


def _stretches(x: Laid, chunk: int) -> list[tuple[int, int]]:
    """The first element of what is cut into chunks, and how many elements follow."""
    found: list[tuple[int, int]] = []
    start = 0
    for run in x.part.runs:
        count = run.lines * x.part.width
        lines = run.lines if x.part.width == x.width > chunk else 1
        found += [(start + i * (count // lines), count // lines) for i in range(lines)]
        start += count
    return found


def of_chunks(tensors: Sequence[Laid], cut: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each chunk begins: five numbers.

    The number of its first block, how much of that block or strip is before it, where the block's scale is,
    which element of the whole it begins with, and which row.
    """
    found = np.zeros((len(cut), 5), dtype=np.int64)
    bounds = np.searchsorted(cut[:, 0], np.arange(len(tensors) + 1))
    for number, x in enumerate(tensors):
        rows = slice(bounds[number], bounds[number + 1])
        starts, width, block = cut[rows, 1], max(1, x.part.width), x.own.block
        if not len(starts):
            continue
        local, inside = np.divmod(starts, width)
        counts = np.array([run.lines for run in x.part.runs])
        ends = np.cumsum(counts)
        begins = np.array([run.number for run in x.part.runs]) - ends + counts
        line = local + begins[np.searchsorted(ends, local, side="right")]
        place = x.part.place + inside
        here = -(-(x.part.place % block + width) // block)
        found[rows, 0] = line * x.own.per_line + place // block
        found[rows, 1] = place % x.unit
        found[rows, 2] = local * here + (x.part.place % block + inside) // block
        found[rows, 3] = line * x.own.line + place
        found[rows, 4] = x.row + starts // max(1, x.columns)
    return found
