"""What no shard may cut: lines of blocks, counted in the whole tensor.

Sums, the scales of 8-bit codes and random rounding go by blocks of neighbours. A block depends on the shape of
the whole tensor alone, never on the part of it that a process has, so that parts give the numbers of the whole.

A line is what the last dimensions hold: as many of them as it takes to have 32 elements, but never the first
dimension of several. A vector is one line. A line is cut into blocks of 128; the last one may be shorter.
Of lines of 2,048 elements or more that are a multiple of 256, blocks have the largest of 128, 64 and 32
elements that divides an eighth of the line, so that 2, 4 or 8 processes can share the columns of a matrix.

A tensor that lies in memory in another order of dimensions, as one in channels-last does, is cut into lines as
it lies there: kernels read memory from one end to the other. Codes and parts of a tensor go row by row always.

In sums each element of a vector is a block up to 2¹⁶ elements: vectors are cut anywhere, and short enough.
Codes need neighbours to share a scale, so for them, and for random rounding, a vector is a line as any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
# Blocks of lines that processes may share by columns: how many processes, from which length on.
LENGTHS, SHARES, WIDE = (128, 64, 32), 8, 2048
# A line has at least so many elements if there are dimensions for it.
SHORT = 32
# Vectors up to this length are added element by element.
LOOSE = 1 << 16

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How a tensor is cut into lines and blocks.

    leading: the sizes of the dimensions that count lines. line: how many elements a line has. block: how many
    a block has.
    """

    leading: Shape
    line: int
    block: int

    @property
    def lines(self) -> int:
        """How many lines the tensor has."""
        return math.prod(self.leading)

    @property
    def per_line(self) -> int:
        """How many blocks a line has."""
        return -(-self.line // self.block)

    @property
    def scales(self) -> Shape:
        """The shape of a tensor with one entry per block: the parameter's placements apply to it."""
        return (*self.leading, self.per_line)


class Region(NamedTuple):
    """A part of a tensor, which may be all of it.

    whole: the tensor's shape. shape: the part's. first: its first index in each dimension.
    """

    whole: Shape
    shape: Shape
    first: Shape

    @property
    def empty(self) -> bool:
        """Whether it has no elements."""
        return math.prod(self.shape) == 0


class Run(NamedTuple):
    """Lines that follow each other in the part and in the whole: how many, and the first one's number there."""

    lines: int
    number: int


class Part(NamedTuple):
    """The lines of which a region has a stretch, the same of each.

    runs: the lines, in order. width: how many elements of a line are there. place: where in it they begin.
    """

    runs: tuple[Run, ...]
    width: int
    place: int


def whole(shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return Region(tuple(shape), tuple(shape), (0,) * len(shape))


def order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions as they lie in memory, if that is dense but not row by row; otherwise None."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return None
    strides = tensor.stride()
    found = tuple(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
    return found if tensor.permute(found).is_contiguous() else None


def in_memory(tensor: Tensor) -> Tensor:
    """The same elements with their dimensions in the order in which they lie in memory, if it is dense."""
    found = order(tensor)
    return tensor if found is None else tensor.permute(found)


def layout(shape: Sequence[int]) -> Layout:
    """The lines and blocks of codes and of random rounding."""
    leading, line = _lines(shape)
    return Layout(leading, line, _block(line))


def layout_of_sums(shape: Sequence[int]) -> Layout:
    """The lines and blocks of sums."""
    leading, line = _lines(shape)
    loose = not leading and line <= LOOSE
    return Layout(leading, line, 1 if loose else _block(line))


def _lines(shape: Sequence[int]) -> tuple[Shape, int]:
    """The dimensions that count lines, and how long a line is."""
    leading, line = tuple(shape), 1
    if len(leading) < 2:
        return (), math.prod(leading)
    while len(leading) > 1 and (line < SHORT or len(leading) == len(shape)):
        line *= leading[-1]
        leading = leading[:-1]
    return leading, line


def _block(line: int) -> int:
    if line >= WIDE and line % (SHARES * LENGTHS[-1]) == 0:
        return next(length for length in LENGTHS if line // SHARES % length == 0)
    return max(1, min(line, BLOCK))


def part_of(own: Layout, region: Region) -> Part | None:
    """The lines of a region, or None if it has more than one stretch of a line."""
    if region.empty:
        return Part((), 0, 0)
    count = len(own.leading)
    found = _stretch(Region(*(x[count:] for x in region)))
    if found is None:
        return None
    place, width = found
    return Part(_runs(Region(*(x[:count] for x in region))), width, place)


def _stretch(region: Region) -> tuple[int, int] | None:
    """Where the elements begin in row-major order and how many they are, if they follow each other."""
    count = len(region.whole)
    begin = next((d for d in range(count) if region.shape[d] != 1), count)
    if region.shape[begin + 1 :] != region.whole[begin + 1 :]:
        return None
    start = sum(i * stride for i, stride in zip(region.first, _strides(region.whole), strict=True))
    return start, math.prod(region.shape)


def _runs(region: Region) -> tuple[Run, ...]:
    """The elements in row-major order, in stretches that follow each other there."""
    cut = [d for d, (size, here) in enumerate(zip(region.whole, region.shape, strict=True)) if size != here]
    outer = cut[-1] if cut else 0
    strides = _strides(region.whole)
    start = sum(i * stride for i, stride in zip(region.first, strides, strict=True))
    lines = math.prod(region.shape[outer:])
    outside = zip(region.shape[:outer], strides[:outer], strict=True)
    steps = product(*(range(0, size * stride, stride) for size, stride in outside))
    return tuple(Run(lines, start + sum(step)) for step in steps)


def _strides(shape: Shape) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def cuts(own: Layout, region: Region) -> bool:
    """Whether a block lies in the region with only some of its elements."""
    if region.empty or region.whole == region.shape:
        return False
    part = part_of(own, region)
    if part is None:
        return True
    end = part.place + part.width
    return part.place % own.block != 0 or (end % own.block != 0 and end != own.line)


def scales_of(own: Layout, region: Region) -> Region:
    """The part of a tensor with one entry per block that belongs to a region, which must cut no block."""
    count = len(own.leading)
    part = part_of(own, region)
    width, place = (0, 0) if part is None else (part.width, part.place)
    here, first = -(-width // own.block), place // own.block
    return Region(own.scales, (*region.shape[:count], here), (*region.first[:count], first))


def places(own: Layout, region: Region, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each element of a region, the number of its block in the whole tensor and its place in the block."""
    count = len(own.leading)
    lines = _indices(Region(*(x[:count] for x in region)), device)
    inside = _indices(Region(*(x[count:] for x in region)), device)
    lines = lines.reshape((*lines.shape, *[1] * inside.dim()))
    return lines * own.per_line + inside // own.block, (inside % own.block).expand(region.shape)


def positions(region: Region, device: torch.device) -> Tensor:
    """For each element of a region, its place in the whole tensor if that is read row by row."""
    return _indices(region, device)


def _indices(region: Region, device: torch.device) -> Tensor:
    found = torch.zeros(region.shape, dtype=torch.int64, device=device)
    count = len(region.shape)
    for d, stride in enumerate(_strides(region.whole)):
        along = torch.arange(region.first[d], region.first[d] + region.shape[d], device=device) * stride
        found += along.view([-1 if i == d else 1 for i in range(count)])
    return found
