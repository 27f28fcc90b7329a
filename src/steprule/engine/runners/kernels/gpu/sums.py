"""Exact sums on a GPU: what `program.exact` says, from the sums of blocks that the kernels of a sweep store.

Each sum is a row of limbs, as on the CPU: whole numbers, so it does not matter in which order programs of a
launch add theirs. A row is rounded where it is, and the host need not wait for it.
"""
# Triton has no type annotations: arguments and results here are blocks of values on the device.
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

HALF = tl.constexpr((1 << 32) - 1)
FRACTION = tl.constexpr((1 << 52) - 1)


@triton.jit
def add(
    pieces,
    sums,
    limbs,
    EACH: tl.constexpr,
    LIMBS: tl.constexpr,
    SHIFT: tl.constexpr,
    END: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up to BLOCK sums of blocks of one tensor to its row of limbs.

    pieces: for each program the tensor, its first sum and how many there are. EACH: how many sums the sweep
    takes. SHIFT, END: see `exact.Form`.
    """
    piece = pieces + 3 * tl.program_id(0).to(tl.int64)
    tensor, start, count = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    row = limbs + (EACH * tensor + tl.program_id(1)) * (LIMBS + 3)
    at = tl.arange(0, BLOCK)
    x = tl.load(sums + EACH * (start + at) + tl.program_id(1), at < count, 0.0)
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) & 2047
    mantissa = (bits & FRACTION) + tl.where(exponent > 0, FRACTION + 1, 0)
    place = tl.maximum(exponent, 1) - SHIFT
    finite = place < END
    mantissa = tl.where(finite, mantissa, 0) >> tl.minimum(tl.maximum(place * -1, 0), 63)
    place = tl.maximum(tl.where(finite, place, 0), 0)
    low, high = (mantissa & HALF) << (place & 31), (mantissa >> 32) << (place & 31)
    sign = tl.where(bits < 0, -1, 1)
    first, second, third = (low & HALF) * sign, ((low >> 32) + (high & HALF)) * sign, (high >> 32) * sign
    limb = place >> 5
    counted = mantissa != 0
    lowest = tl.min(tl.where(counted, limb, LIMBS))
    highest = tl.max(tl.where(counted, limb, -3)) + 2
    for number in range(lowest, highest + 1):
        part = tl.where(limb == number, first, 0) + tl.where(limb + 1 == number, second, 0)
        part += tl.where(limb + 2 == number, third, 0)
        tl.atomic_add(row + number, tl.sum(part))
    odd = tl.where(finite, 0, 1).to(tl.int64)
    if tl.sum(odd) > 0:
        tl.atomic_add(row + LIMBS, tl.sum(tl.where(x > 0, odd, 0)))
        tl.atomic_add(row + LIMBS + 1, tl.sum(tl.where(x < 0, odd, 0)))
        tl.atomic_add(row + LIMBS + 2, tl.sum(tl.where(x != x, odd, 0)))


@triton.jit
def round_rows(limbs, rounded, count, LIMBS: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    """The nearest double of each row of limbs. count: how many rows there are."""
    which = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = which < tl.load(count)
    row = limbs + which.to(tl.int64) * (LIMBS + 3)
    carry = tl.zeros((BLOCK,), tl.int64)
    for number in range(LIMBS):
        carry = (tl.load(row + number, inside, 0) + carry) >> 32
    sign = tl.where(carry < 0, -1, 1).to(tl.int64)
    # The highest digit that is not 0, the two below it, and whether anything is below those.
    # Each with a zero of its own: Triton takes what begins and ends as the same value for a constant.
    carry, place = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    top, upper, lower = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    rest, below = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    before, before_that = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for number in range(LIMBS):
        carry += tl.load(row + number, inside, 0) * sign
        digit = carry & HALF
        carry = carry >> 32
        here = digit != 0
        top, place = tl.where(here, digit, top), tl.where(here, number, place)
        upper, lower = tl.where(here, before, upper), tl.where(here, before_that, lower)
        rest = tl.where(here, below, rest)
        below, before_that, before = below | before_that, before, digit
    # 64 bits, the first of which is 1, and the bits below them.
    length = (top.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022
    length = tl.where(top == 0, 1, length)
    both = (upper.to(tl.uint64) << 32) | lower.to(tl.uint64)
    leading = (top.to(tl.uint64) << (64 - length).to(tl.uint64)) | (both >> length.to(tl.uint64))
    cut = both & ((tl.full((BLOCK,), 1, tl.uint64) << length.to(tl.uint64)) - 1)
    rest = (rest != 0) | (cut != 0)
    kept, half = (leading >> 11).to(tl.int64), (leading & 2047).to(tl.int64)
    up = (half > 1024) | ((half == 1024) & (rest | ((kept & 1) != 0)))
    kept += tl.where(up, 1, 0)
    exponent = 32 * (place - 2) + LOWEST + length + 11
    some = tl.minimum(tl.maximum(exponent, -1000), 900)
    x = (kept * sign).to(tl.float64) * power_of_2(some) * power_of_2(tl.minimum(exponent - some, 200))
    above, under = tl.load(row + LIMBS, inside, 0) != 0, tl.load(row + LIMBS + 1, inside, 0) != 0
    x = tl.where(above, float("inf"), tl.where(under, float("-inf"), x))
    undefined = (tl.load(row + LIMBS + 2, inside, 0) != 0) | (above & under)
    tl.store(rounded + which, tl.where(undefined, float("nan"), x), inside)


@triton.jit
def power_of_2(exponent):
    """2 to a power from -1022 to 1023."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
