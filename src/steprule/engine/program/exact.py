"""Sums that no order can change: elements are added in blocks, and blocks as whole numbers.

A block is up to 128 neighbours of the whole tensor (see `blocks`), filled up with zeros. Its sum is a function
of its elements alone: 16 lanes add every sixteenth element in turn, in double, then lanes are added by halves.
Blocks are added as multiples of 2⁻¹⁰⁷⁴, the smallest double, and whole numbers have the same sum in every
order: how many threads, runners or processes share the work changes no bit. Squares are doubles, too: of
numbers from 1.4·10¹⁵⁴ on they are infinite, and of those below 1.5·10⁻¹⁶² they are 0, as in torch's norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from steprule.engine import blocks
from steprule.engine.blocks import BLOCK, Region

LANES = 16
# The exponent of the smallest double.
SMALLEST = -1074


class Form(NamedTuple):
    """A sum in a kernel: limbs of 32 bits, the first of which counts multiples of 2 to the power of `lowest`.

    After them stands how many blocks came to infinity, to minus infinity and to NaN.
    """

    limbs: int
    lowest: int

    @property
    def width(self) -> int:
        """How many numbers it is kept in."""
        return self.limbs + 3

    @property
    def shift(self) -> int:
        """What the exponent in the bits of a double is to the place of its last bit."""
        return 1075 + self.lowest

    @property
    def end(self) -> int:
        """The first place that no finite number has."""
        return min(32 * (self.limbs - 2), 2047 - self.shift)


# Of numbers in single precision, their squares included, and of doubles: each takes in all that are finite.
SINGLE, DOUBLE = Form(24, -352), Form(66, SMALLEST)
# How many elements are copied at a time where torch's own operations add them.
PIECE = 1 << 20


class Sum(NamedTuple):
    """A sum so far: in units of 2⁻¹⁰⁷⁴, and how many blocks are not finite."""

    units: int = 0
    above: int = 0
    below: int = 0
    undefined: int = 0

    def plus(self, other: Sum) -> Sum:
        """Both together."""
        return Sum(*(a + b for a, b in zip(self, other, strict=True)))

    def rounded(self) -> float:
        """The nearest double."""
        if self.undefined or (self.above and self.below):
            return math.nan
        if self.above or self.below:
            return math.inf if self.above else -math.inf
        try:
            # Python rounds the quotient of two whole numbers correctly.
            return self.units / (1 << -SMALLEST)
        except OverflowError:
            return math.inf if self.units > 0 else -math.inf


def form_of(double: bool) -> Form:
    """The form of sums of doubles, or of anything narrower."""
    return DOUBLE if double else SINGLE


def from_limbs(row: Sequence[int]) -> Sum:
    """The sum that a kernel has kept in limbs."""
    form = form_of(len(row) == DOUBLE.width)
    units = sum(int(limb) << 32 * place for place, limb in enumerate(row[: form.limbs]))
    return Sum(units << (form.lowest - SMALLEST), *(int(x) for x in row[form.limbs :]))


def of_number(x: float) -> Sum:
    """A sum of one double."""
    if not math.isfinite(x):
        return Sum(0, int(x > 0), int(x < 0), int(x != x))
    numerator, denominator = x.as_integer_ratio()
    return Sum((numerator << -SMALLEST) // denominator)


def of_tensors(tensors: Sequence[Tensor], squares: bool, regions: Sequence[Region] | None = None) -> list[Sum]:
    """The sum of all elements of each tensor, or of their squares.

    regions: which part of a whole tensor each of them is; without them all are whole.
    """
    found = [Sum() for _ in tensors]
    regions = [blocks.whole(x.shape) for x in tensors] if regions is None else regions
    for together in _pieces(tensors, regions):
        places, counts, added = _added_in_blocks(together, squares)
        owner = torch.repeat_interleave(torch.tensor(counts, device=added.device))
        for place, new in zip(places, _added(added, owner, len(places), _form_of(together)), strict=True):
            found[place] = found[place].plus(new)
    return found


def of_all(tensors: Iterable[Tensor], regions: Sequence[Region]) -> Sum:
    """The sum of all elements of all tensors, which need not be there at the same time.

    regions: which part of a whole tensor each of them is.
    """
    found = Sum()
    for together in _pieces(tensors, regions):
        _, _, added = _added_in_blocks(together, squares=False)
        owner = torch.zeros(len(added), dtype=torch.int64, device=added.device)
        found = found.plus(*_added(added, owner, 1, _form_of(together)))
    return found


def _form_of(together: Sequence[tuple[int, Tensor]]) -> Form:
    return form_of(any(rows.dtype == torch.float64 for _, rows in together))


def _added_in_blocks(
    together: Sequence[tuple[int, Tensor]], squares: bool
) -> tuple[list[int], list[int], Tensor]:
    """For each piece of a tensor, the tensor's place and how many blocks it has; and the sums of all blocks."""
    wide = [(place, rows) for place, rows in together if rows.shape[1] > 1]
    single = [(place, rows) for place, rows in together if rows.shape[1] == 1]
    room = together[0][1].new_zeros(sum(len(rows) for _, rows in wide), BLOCK, dtype=torch.float64)
    first = 0
    for _, rows in wide:
        room[first : first + len(rows), : rows.shape[1]] = rows
        first += len(rows)
    elements = [rows.reshape(-1).double() for _, rows in single]
    added = [_block_sums(room, squares), *(x * x if squares else x for x in elements)]
    places, counts = zip(*((place, len(rows)) for place, rows in (*wide, *single)), strict=True)
    return list(places), list(counts), torch.cat(added)


def _pieces(tensors: Iterable[Tensor], regions: Sequence[Region]) -> Iterator[list[tuple[int, Tensor]]]:
    """(tensor, some of its blocks) of what is added at once, so that copies stay small."""
    together: list[tuple[int, Tensor]] = []
    size = 0
    for place, (x, region) in enumerate(zip(tensors, regions, strict=True)):
        if region.shape == region.whole:
            x = blocks.in_memory(x)
            region = blocks.whole(x.shape)
        for rows in _blocks_of(x.detach(), region):
            more = len(rows) * (1 if rows.shape[1] == 1 else BLOCK)
            if together and (size + more > PIECE or rows.device != together[0][1].device):
                yield together
                together, size = [], 0
            together.append((place, rows))
            size += more
    if together:
        yield together


def _blocks_of(x: Tensor, region: Region) -> Iterator[Tensor]:
    """Matrices of the blocks of a tensor, each block in a row."""
    own = blocks.layout_of_sums(region.whole)
    part = blocks.part_of(own, region)
    if not x.numel():
        return
    block, width = own.block, x.shape[-1] if part is None else part.width
    # If a block was begun by another part, its end is a block of its own here.
    begun = 0 if part is None else min(-part.place % block, width)
    lines = x.reshape(-1, width)
    if not begun and width % block == 0:
        lines, width = lines.reshape(-1, block), block
    whole = begun + (width - begun) // block * block
    most = PIECE if block == 1 else PIECE // BLOCK
    step = max(1, most * block // width)
    for first in range(0, len(lines), step):
        some = lines[first : first + step]
        for rows in (some[:, :begun], some[:, begun:whole].reshape(-1, block), some[:, whole:]):
            yield from (rows[i : i + most] for i in range(0, len(rows), most) if rows.numel())


def _block_sums(room: Tensor, squares: bool) -> Tensor:
    """The sum of each row."""
    lanes = (room * room if squares else room).reshape(-1, BLOCK // LANES, LANES).unbind(1)
    total = lanes[0]
    for lane in lanes[1:]:
        total = total + lane
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def _added(sums: Tensor, owner: Tensor, owners: int, form: Form) -> list[Sum]:
    """What the blocks of each owner come to together."""
    bits = sums.view(torch.int64)
    exponent = (bits >> 52) & 2047
    mantissa = (bits & ((1 << 52) - 1)) | torch.where(exponent > 0, 1 << 52, 0)
    place = exponent.clamp(min=1) - form.shift
    finite = place < form.end
    mantissa = torch.where(finite, mantissa, 0) >> (-place).clamp(0, 63)
    place = torch.where(finite, place, 0).clamp(min=0)
    low, high = (mantissa & 0xFFFFFFFF) << (place & 31), (mantissa >> 32) << (place & 31)
    first, sign = form.width * owner + (place >> 5), torch.where(bits < 0, -1, 1)
    rows = torch.zeros(form.width * owners, dtype=torch.int64, device=sums.device)
    for further, part in enumerate((low & 0xFFFFFFFF, (low >> 32) + (high & 0xFFFFFFFF), high >> 32)):
        rows.index_add_(0, first + further, part * sign)
    for further, which in enumerate((sums > 0, sums < 0, sums.isnan())):
        rows.index_add_(0, form.width * owner + form.limbs + further, (which & ~finite).to(torch.int64))
    found: list[list[int]] = cast(Any, rows.reshape(owners, form.width)).tolist()
    return [from_limbs(row) for row in found]
