"""Sums that no order can change: elements are added in blocks, and blocks as whole numbers.

A block is 128 neighbours in memory; the last one is filled up with zeros. Its sum is a function of its
elements alone: 16 lanes add every sixteenth element in turn, in double, then lanes are added by halves. Blocks
are added as multiples of 2⁻¹⁰⁷⁴, the smallest double, and whole numbers have the same sum in every order: how
many threads, runners or processes share the work changes no bit. Squares are doubles, too: of numbers from
1.4·10¹⁵⁴ on they are infinite, and of those below 1.5·10⁻¹⁶² they are 0, as in torch's norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

BLOCK, LANES = 128, 16
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


def of_tensors(tensors: Sequence[Tensor], squares: bool) -> list[Sum]:
    """The sum of all elements of each tensor, or of their squares."""
    found = [Sum() for _ in tensors]
    for places in _pieces(tensors):
        flat = [in_memory_order(tensors[place].detach())[first:last] for place, first, last in places]
        blocks = [-(-x.numel() // BLOCK) for x in flat]
        room = flat[0].new_zeros(BLOCK * sum(blocks), dtype=torch.float64)
        first = 0
        for x, count in zip(flat, blocks, strict=True):
            room[first : first + x.numel()] = x
            first += BLOCK * count
        owner = torch.repeat_interleave(torch.tensor(blocks, device=room.device))
        form = form_of(any(x.dtype == torch.float64 for x in flat))
        added = _added(_block_sums(room, squares), owner, len(flat), form)
        for (place, _, _), new in zip(places, added, strict=True):
            found[place] = found[place].plus(new)
    return found


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[tuple[int, int, int]]]:
    """(tensor, first element, after the last one) of what is added at once, so that copies stay small."""
    together: list[tuple[int, int, int]] = []
    size = 0
    for place, x in enumerate(tensors):
        for first in range(0, x.numel(), PIECE):
            last = min(first + PIECE, x.numel())
            if together and (size + last - first > PIECE or x.device != tensors[together[0][0]].device):
                yield together
                together, size = [], 0
            together.append((place, first, last))
            size += last - first
    if together:
        yield together


def _block_sums(room: Tensor, squares: bool) -> Tensor:
    """The sum of each block of a vector."""
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


def in_memory_order(x: Tensor) -> Tensor:
    """The elements as a vector, in the order in which they lie in memory."""
    order = sorted(range(x.dim()), key=lambda i: (-x.stride(i), i))
    return x.permute(order).reshape(-1)
