"""The words of CPU kernels for sums: see `program.exact` for what they compute.

Importing this module imports llvmlite, so only the compiler does it.
"""
# llvmlite has no type annotations.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

import math

from llvmlite import ir

from steprule.engine.blocks import BLOCK
from steprule.engine.program.exact import LANES, SINGLE
from steprule.engine.runners.kernels.cpu.language import (
    Pointer,
    Word,
    float32,
    float64,
    function,
    int64,
    nothing,
    truth,
    uint64,
    unary,
    word,
)
from steprule.engine.runners.kernels.cpu.words import field_of

INT32, INT64 = ir.IntType(32), ir.IntType(64)


def _block(square, whole):
    """The word that adds a block of an array or the squares of its elements: (array, first element, count).

    whole: the count is that of all blocks but shorter ones.
    """
    return Word(lambda array, first, count: (float64, _adding(array.to.type, square, whole)))


def _adding(kind, square, whole):
    lanes = ir.VectorType(kind, LANES)

    def build(builder, array, first, count):
        align = 4 if kind == ir.FloatType() else 8
        start = builder.bitcast(builder.gep(array, [first]), lanes.as_pointer())

        def taken(x):
            x = x if kind == ir.DoubleType() else builder.fpext(x, ir.VectorType(ir.DoubleType(), LANES))
            return builder.fmul(x, x) if square else x

        if whole:
            places = [builder.gep(start, [ir.Constant(INT64, part)]) for part in range(BLOCK // LANES)]
            total, *others = (taken(builder.load(place, align=align)) for place in places)
            for x in others:
                total = builder.fadd(total, x)
        else:
            total = _short(builder, start, count, lanes, align, taken)
        width = LANES
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(
                    total,
                    total,
                    ir.Constant(ir.VectorType(INT32, width), list(range(first, first + width))),
                )
                for first in (0, width)
            ]
            total = builder.fadd(*halves)
        return builder.extract_element(total, ir.Constant(INT32, 0))

    return build


def _short(builder, start, count, lanes, align, taken):
    """What the lanes of a shorter block come to; those beyond its end are 0."""
    sums = ir.VectorType(ir.DoubleType(), LANES)
    number = ir.VectorType(INT64, LANES)
    places = ir.Constant(number, list(range(LANES)))
    mask = ir.VectorType(ir.IntType(1), LANES)
    shape = ir.FunctionType(lanes, [lanes.as_pointer(), INT32, mask, lanes])
    size = 64 if lanes.element == ir.DoubleType() else 32
    masked = builder.module.declare_intrinsic(f"llvm.masked.load.v{LANES}f{size}.p0", (), shape)
    before, loop, end = builder.block, builder.append_basic_block("lanes"), builder.append_basic_block("added")
    some = builder.icmp_signed(">", count, ir.Constant(INT64, 0))
    builder.cbranch(some, loop, end)
    builder.position_at_end(loop)
    part, total = builder.phi(INT64), builder.phi(sums)
    done = builder.mul(part, ir.Constant(INT64, LANES))
    left = builder.insert_element(ir.Constant(number, ir.Undefined), builder.sub(count, done), INT32(0))
    left = builder.shuffle_vector(left, left, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))
    inside = builder.icmp_signed("<", places, left)
    x = builder.call(
        masked, [builder.gep(start, [part]), INT32(align), inside, ir.Constant(lanes, [0.0] * LANES)]
    )
    added = builder.fadd(total, taken(x))
    following = builder.add(part, ir.Constant(INT64, 1))
    zeros = ir.Constant(sums, [0.0] * LANES)
    part.add_incoming(ir.Constant(INT64, 0), before)
    part.add_incoming(following, builder.block)
    total.add_incoming(zeros, before)
    total.add_incoming(added, builder.block)
    more = builder.icmp_signed("<", builder.mul(following, ir.Constant(INT64, LANES)), count)
    builder.cbranch(more, loop, end)
    builder.position_at_end(end)
    result = builder.phi(sums)
    result.add_incoming(zeros, before)
    result.add_incoming(added, loop)
    return result


sum_of_block, squares_of_block = (_block(square, whole=True) for square in (False, True))
sum_of_short_block, squares_of_short_block = (_block(square, whole=False) for square in (False, True))


@word(int64)
def bits_of_double(builder, x):
    """The bits of a double, as a whole number."""
    return builder.bitcast(x, INT64)


# What all chunks of a tensor come to


def _pointer(kind, address):
    """The word that gives a pointer to numbers of this kind."""
    pointer = Pointer(kind)
    return word(pointer)(lambda builder, *place: builder.inttoptr(address(builder, *place), pointer.type))


def _row(table, bytes_of_row):
    """The address of a row of a table."""

    def generate(builder, job, index):
        size = bytes_of_row(builder, job)
        return builder.add(field_of(builder, job, table), builder.mul(index, size))

    return generate


def _bytes(count):
    return lambda builder, job: ir.Constant(INT64, count)


def _room(size):
    return lambda builder, job: builder.mul(field_of(builder, job, "room"), ir.Constant(INT64, size))


# Where a thread keeps the values that it is going to add: (job, which).
float32_values = _pointer(float32, _row("values", _room(4)))
float64_values = _pointer(float64, _row("values", _room(8)))
# The sum of a tensor as a double: (job, which).
rounded_sums = _pointer(float64, _row("rounded", _bytes(8)))
first_chunks = _pointer(int64, _row("first_chunks", _bytes(8)))


sums_of_sweep = unary(lambda builder, job: field_of(builder, job, "reductions"))
tensors_of_job = unary(lambda builder, job: field_of(builder, job, "tensors"))


@word(float64)
def double_of_bits(builder, bits):
    """The double with these bits."""
    return builder.bitcast(bits, ir.DoubleType())


@function(float64)
def power_of_2(exponent):
    """2 to the power of a whole number, which is not too large or too small for a double."""
    return double_of_bits((exponent + 1023) << 52)


def sums_in(form):
    """The words that depend on the form in which sums are kept.

    They stand in one function because each of them uses others, which are found in what they close over.
    """
    count, width, end, shift_of_double, lowest = form.limbs, form.width, form.end, form.shift, form.lowest
    # The sum of a chunk, and of a tensor: (job, which).
    sum_of_chunk = _pointer(int64, _row("partials", _bytes(8 * width)))
    sum_of_tensor = _pointer(int64, _row("sums", _bytes(8 * width)))

    @function(nothing)
    def add_exactly(limbs, x):
        """Add a double to a sum in limbs."""
        bits = bits_of_double(x)
        exponent = (bits >> 52) & 2047
        mantissa = bits & ((1 << 52) - 1)
        if exponent > 0:
            mantissa |= 1 << 52
        else:
            exponent = 1
        place = exponent - shift_of_double
        if place >= end:
            limbs[count + (2 if x != x else (1 if x < 0.0 else 0))] += 1
            return
        if place < 0:
            mantissa >>= min(-place, 63)
            place = 0
        limb, shift = place >> 5, place & 31
        low, high = (mantissa & 0xFFFFFFFF) << shift, (mantissa >> 32) << shift
        first, second, third = low & 0xFFFFFFFF, ((low >> 32) & 0xFFFFFFFF) + (high & 0xFFFFFFFF), high >> 32
        if bits < 0:
            first, second, third = -first, -second, -third
        limbs[limb] += first
        limbs[limb + 1] += second
        limbs[limb + 2] += third

    @function(nothing)
    def clear(limbs):
        """Begin a new sum."""
        for place in range(width):
            limbs[place] = 0

    @function(nothing)
    def add_values(limbs, array, count, block, begun):
        """Add `count` elements of an array to a sum, in blocks. begun: how much of the first is elsewhere."""
        first = 0
        if block == 1:
            for i in range(count):
                add_exactly(limbs, float64(array[i]))
            return
        end = min(block - begun, count)
        while first < count:
            if end - first == BLOCK:
                add_exactly(limbs, sum_of_block(array, first, BLOCK))
            else:
                add_exactly(limbs, sum_of_short_block(array, first, end - first))
            first, end = end, min(end + block, count)

    @function(nothing)
    def add_squares(limbs, array, count, block, begun):
        """Add the squares of `count` elements."""
        first = 0
        if block == 1:
            for i in range(count):
                add_exactly(limbs, float64(array[i]) * float64(array[i]))
            return
        end = min(block - begun, count)
        while first < count:
            if end - first == BLOCK:
                add_exactly(limbs, squares_of_block(array, first, BLOCK))
            else:
                add_exactly(limbs, squares_of_short_block(array, first, end - first))
            first, end = end, min(end + block, count)

    @function(truth)
    def magnitude(limbs, work):
        """Write the size of a sum to `work`, in limbs from 0 to 2³² and one more above; if it is negative."""
        carry = 0
        for place in range(count):
            limb = limbs[place] + carry
            work[place] = limb & 0xFFFFFFFF
            carry = limb >> 32
        negative = carry < 0
        if negative:
            one = 1
            for place in range(count):
                limb = (work[place] ^ 0xFFFFFFFF) + one
                work[place] = limb & 0xFFFFFFFF
                one = limb >> 32
            carry = -carry - 1 + one
        work[count] = carry
        return negative

    @function(float64)
    def rounded(limbs, work):
        """The double that is nearest to a sum."""
        if limbs[count + 2] > 0 or (limbs[count] > 0 and limbs[count + 1] > 0):
            return math.nan
        if limbs[count] > 0:
            return math.inf
        if limbs[count + 1] > 0:
            return -math.inf
        negative = magnitude(limbs, work)
        top = count
        while top >= 0 and work[top] == 0:
            top -= 1
        if top < 0:
            return 0.0
        high, middle, low = work[top], work[top - 1] if top > 0 else 0, work[top - 2] if top > 1 else 0
        rest = 0
        for place in range(top - 2):
            rest |= work[place]
        empty = 0  # bits above the first one of the highest limb
        while high < 1 << (31 - empty):
            empty += 1
        cut = 32 - empty
        window = (uint64(high) << uint64(32 + empty)) | (uint64(middle) << uint64(empty))
        window |= uint64(low >> cut)
        # A bit that stands for all that is cut off decides between two doubles as all of it would.
        if (low & ((1 << cut) - 1)) != 0 or rest != 0:
            window |= uint64(1)
        # In two factors: neither is too large or too small for a double.
        scale = cut + 32 * (top - 2) + lowest
        size = float64(window) * power_of_2(scale >> 1) * power_of_2(scale - (scale >> 1))
        return -size if negative else size

    @function(nothing)
    def add_sum(limbs, others):
        """Add one sum to another."""
        for place in range(width):
            limbs[place] += others[place]

    return sum_of_chunk, sum_of_tensor, add_exactly, clear, add_values, add_squares, rounded, add_sum


sum_of_chunk, sum_of_tensor, add_exactly, clear, add_values, add_squares, rounded, add_sum = sums_in(SINGLE)
