"""The words that a generated CPU kernel is written in.

Arithmetic words round as torch's own CPU operations do. The others read the fields of a kernel's job (see
`threads.Job`) and convert values between memory and the precision that they are computed in. Importing
this module imports llvmlite, so only the compiler does it.
"""
# llvmlite has no type annotations.
# pyright: basic

from __future__ import annotations

import math
from functools import partial, reduce

from llvmlite import ir

from steprule.engine.runners.kernels.cpu.language import (
    Pointer,
    Word,
    binary,
    float32,
    float64,
    int8,
    int16,
    int64,
    nothing,
    ternary,
    uint8,
    uint16,
    unary,
    word,
)
from steprule.engine.runners.kernels.cpu.threads import Job

INT16, INT32, INT64 = (ir.IntType(bits) for bits in (16, 32, 64))

# Processors have no 16-bit floats: in memory, one of these integers represents one.
BFLOAT16, FLOAT16 = uint16, int16


# Arithmetic


def llvm(name):
    """The instruction builder of an intrinsic of LLVM."""

    def build(builder, *numbers):
        kind = numbers[0].type
        shape = ir.FunctionType(kind, [kind] * len(numbers))
        function = builder.module.declare_intrinsic(f"llvm.{name}", [kind], shape)
        return builder.call(function, numbers)

    return build


def _extreme(comparison):
    """The larger or smaller of two values; of equal ones (0 and -0) the second, as in torch.maximum."""

    def build(builder, a, b):
        chosen = builder.select(builder.fcmp_ordered(comparison, a, b), a, b)
        return builder.select(builder.fcmp_unordered("uno", a, a), a, chosen)

    return build


def _bounded(comparison):
    """The bound if the value is beyond it, otherwise (even if they are equal) the value, as in torch.clamp."""

    def build(builder, x, bound):
        chosen = builder.select(builder.fcmp_ordered(comparison, bound, x), bound, x)
        return builder.select(builder.fcmp_unordered("uno", bound, bound), bound, chosen)

    return build


def _sign(builder, x):
    zero, plus, minus = (ir.Constant(x.type, value) for value in (0.0, 1.0, -1.0))
    below = builder.select(builder.fcmp_ordered("<", x, zero), minus, zero)
    return builder.select(builder.fcmp_ordered(">", x, zero), plus, below)


def _lerp(builder, a, b, weight):
    half, full = (ir.Constant(weight.type, value) for value in (0.5, 1.0))
    small = builder.fcmp_ordered("<", llvm("fabs")(builder, weight), half)
    part = builder.select(small, weight, builder.fsub(weight, full))
    return llvm("fma")(builder, part, builder.fsub(b, a), builder.select(small, a, b))


# The arctangent of r is r + r·z·P(z)/Q(z), where z is r², up to r = 0.66 (Cephes, atan.c). Beyond it, it is π/4
# and that of (r - 1)/(r + 1), which is found from both sides of the triangle with one division.
ARC_TOP = (
    -8.750608600031904122785e-1,
    -1.615753718733365076637e1,
    -7.500855792314704667340e1,
    -1.228866684490136173410e2,
    -6.485021904942025371773e1,
)
ARC_BOTTOM = (
    1.0,
    2.485846490142306297962e1,
    1.650270098316988542046e2,
    4.328810604912902668951e2,
    4.853903996359136964868e2,
    1.945506571482613964425e2,
)
# π/4, π/2 and π, each with what doubles leave out of it.
EIGHTH, QUARTER, HALF = ((math.pi * part, 1.2246467991473532e-16 * part) for part in (0.25, 0.5, 1.0))


def _angle(builder, y, x):
    """The angle of (x, y), in double precision: unlike a call of C's atan2, it goes into vectors."""
    double, single = ir.DoubleType(), y.type
    y, x = (v if v.type == double else builder.fpext(v, double) for v in (y, x))
    number = partial(ir.Constant, double)
    zero, one = number(0.0), number(1.0)

    def polynomial(z, coefficients):
        first, *rest = map(number, coefficients)
        return reduce(lambda value, c: builder.fadd(builder.fmul(value, z), c), rest, first)

    def added(angle, part):
        return builder.fadd(builder.fadd(angle, number(part[1])), number(part[0]))

    height, width = (llvm("fabs")(builder, v) for v in (y, x))
    steep = builder.fcmp_ordered(">", height, width)
    low, high = builder.select(steep, width, height), builder.select(steep, height, width)
    # Of two infinities and of two zeros, there is no quotient.
    same = builder.fcmp_ordered("==", low, high)
    far = builder.fcmp_ordered(">", low, builder.fmul(high, number(0.66)))
    far = builder.or_(far, builder.and_(same, builder.fcmp_ordered(">", low, zero)))
    top = builder.select(far, builder.fsub(low, high), low)
    bottom = builder.select(far, builder.fadd(low, high), high)
    r = builder.fdiv(builder.select(same, zero, top), builder.select(same, one, bottom))
    z = builder.fmul(r, r)
    part = builder.fdiv(builder.fmul(z, polynomial(z, ARC_TOP)), polynomial(z, ARC_BOTTOM))
    angle = builder.fadd(builder.fmul(r, part), r)
    angle = builder.select(far, added(angle, EIGHTH), angle)
    angle = builder.select(steep, added(builder.fneg(angle), QUARTER), angle)
    left = builder.fcmp_ordered("<", llvm("copysign")(builder, one, x), zero)
    angle = builder.select(left, added(builder.fneg(angle), HALF), angle)
    angle = llvm("copysign")(builder, angle, y)
    undefined = builder.fcmp_unordered("uno", x, y)
    angle = builder.select(undefined, number(float("nan")), angle)
    return angle if single == double else builder.fptrunc(angle, single)


absolute = unary(llvm("fabs"))
sqrt = unary(llvm("sqrt"))
exp = unary(llvm("exp"))
log = unary(llvm("log"))
atan2 = binary(_angle)
fma = ternary(llvm("fma"))  # x · y + z, rounded once
lerp = ternary(_lerp)  # x + z · (y - x), from whichever end is nearer
negative = unary(lambda builder, x: builder.fneg(x))
sign = unary(_sign)  # 0 for NaN, as in torch.sign
larger = binary(_extreme(">"))  # NaN if either is NaN
smaller = binary(_extreme("<"))
at_least = binary(_bounded(">"))
at_most = binary(_bounded("<"))
where = ternary(lambda builder, condition, a, b: builder.select(condition, a, b))
# A sum over a row may be taken in any order, so that several lanes can share it.
sum_with = binary(lambda builder, total, x: builder.fadd(total, x, flags=("reassoc",)))


# The job


def field_of(builder, job, name):
    """The value of a field of the job."""
    address = builder.add(job, ir.Constant(INT64, getattr(Job, name).offset))
    return builder.load(builder.inttoptr(address, INT64.as_pointer()))


def _entry(builder, table, index, kind: ir.Type = INT64):
    return builder.gep(builder.inttoptr(table, kind.as_pointer()), [index])


def _ask_openmp(name, otherwise):
    """The result of an OpenMP function without arguments; `otherwise` if its address is 0."""

    def build(builder, job):
        address = field_of(builder, job, name)
        known = builder.icmp_unsigned("!=", address, ir.Constant(INT64, 0))
        before = builder.block
        with builder.if_then(known):
            function = builder.inttoptr(address, ir.FunctionType(INT32, []).as_pointer())
            answer = builder.sext(builder.call(function, []), INT64)
            asked = builder.block
        result = builder.phi(INT64)
        result.add_incoming(ir.Constant(INT64, otherwise), before)
        result.add_incoming(answer, asked)
        return result

    return build


def _row_of(table):
    def build(builder, job, index):
        return builder.load(_entry(builder, field_of(builder, job, table), index))

    return build


def _of_row(table, length, part):
    """A number of a row of a table with rows of this length."""

    def build(builder, job, row):
        index = builder.add(builder.mul(row, ir.Constant(INT64, length)), ir.Constant(INT64, part))
        return builder.load(_entry(builder, field_of(builder, job, table), index))

    return build


thread_number = unary(_ask_openmp("thread_number", 0))
thread_count = unary(_ask_openmp("thread_count", 1))
shares = unary(lambda builder, job: field_of(builder, job, "shares"))
first_place = binary(_row_of("bounds"))
chunk_at = binary(_row_of("order"))
tensor_of, start_of, length_of = (binary(_of_row("chunks", 3, part)) for part in range(3))
# Of a tensor, and where a chunk begins: see `places`.
width_of, strip_of, block_of, numbers_of, scales_of, span_of = (
    binary(_of_row("layouts", 6, part)) for part in range(6)
)
number_at, begun_at, scale_at, element_at, row_at = (binary(_of_row("places", 5, part)) for part in range(5))
scalars_of = binary(_row_of("rows"))


@word(float64)
def scalar(builder, job, index):
    """One of the doubles computed on the host."""
    table = field_of(builder, job, "scalars")
    return builder.load(_entry(builder, table, index, ir.DoubleType()))


@word(nothing)
def keep_partial(builder, job, reductions, reduction, chunk, value):
    """Keep the result of a reduction over a chunk, unless it is a sum in limbs."""
    row = builder.add(builder.mul(chunk, reductions), reduction)
    place = builder.mul(row, field_of(builder, job, "width"))
    builder.store(value, _entry(builder, field_of(builder, job, "partials"), place, ir.DoubleType()))


# Memory


def array_of(kind):
    """The word that gives a pointer to an element of an array: (job, array, tensor, element)."""

    @word(Pointer(kind))
    def build(builder, job, array, tensor, start):
        index = builder.add(builder.mul(array, field_of(builder, job, "tensors")), tensor)
        address = builder.load(_entry(builder, field_of(builder, job, "pointers"), index))
        return _entry(builder, address, start, kind.type)

    return build


int8_array = array_of(int8)
uint8_array = array_of(uint8)
int64_array = array_of(int64)
float64_array = array_of(float64)
float32_array = array_of(float32)
bfloat16_array = array_of(BFLOAT16)
float16_array = int16_array = array_of(FLOAT16)


def _widen(builder, kind, bits):
    if kind == BFLOAT16:
        wide = builder.shl(builder.zext(bits, INT32), ir.Constant(INT32, 16))
        return builder.bitcast(wide, ir.FloatType())
    if kind == FLOAT16:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
    return bits


def _narrow(builder, kind, x):
    """Round once, to nearest, ties to even; NaN stays NaN."""
    if kind == FLOAT16:
        return builder.bitcast(builder.fptrunc(x, ir.HalfType()), INT16)
    if kind != BFLOAT16:
        return x
    bits = builder.bitcast(x, INT32)
    last = builder.and_(builder.lshr(bits, ir.Constant(INT32, 16)), ir.Constant(INT32, 1))
    rounded = builder.add(bits, builder.add(last, ir.Constant(INT32, 0x7FFF)))
    not_a_number = ir.Constant(INT32, 0x7FC00000)
    kept = builder.select(builder.fcmp_unordered("uno", x, x), not_a_number, rounded)
    return builder.trunc(builder.lshr(kept, ir.Constant(INT32, 16)), INT16)


@Word
def load(array, index):
    """An element, in the precision that it is computed in."""
    kind = array.to
    number = float32 if kind in (BFLOAT16, FLOAT16) else kind

    def build(builder, array, index):
        return _widen(builder, kind, builder.load(builder.gep(array, [index])))

    return number, build


@Word
def store(array, index, x):
    """Store a value in the array's own precision."""
    kind = array.to

    def build(builder, array, index, x):
        builder.store(_narrow(builder, kind, x), builder.gep(array, [index]))

    return nothing, build


# The same array, from a later element on.
offset = binary(lambda builder, array, entries: builder.gep(array, [entries]))
