"""The words that a generated CPU kernel is written in, as numba sees them.

Arithmetic words round as torch's own CPU operations do. The others take a kernel's job apart
(`cpu_threads.JOB` lists what it holds) and move numbers between memory and the precision that they are
computed in. Importing this module imports numba, so only the compiler does it.
"""
# numba has no types of its own, and the body of a word sees only its compiler's objects.
# pyright: basic

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from steprule.engine.cpu_threads import JOB

INT16, INT32, INT64 = (ir.IntType(bits) for bits in (16, 32, 64))

# numba has no 16-bit floats on the CPU: a pointer to one of these integers stands for a pointer to one.
BFLOAT16, FLOAT16 = types.uint16, types.int16


# Arithmetic


def unary(build):
    """A word on one number, from the function that builds its instructions."""

    @intrinsic
    def word(context, x):
        return x(x), lambda context, builder, signature, values: build(builder, *values)

    return word


def binary(build):
    """A word on two numbers."""

    @intrinsic
    def word(context, x, y):
        return x(x, y), lambda context, builder, signature, values: build(builder, *values)

    return word


def ternary(build):
    """A word on three values, the last two of which are numbers."""

    @intrinsic
    def word(context, x, y, z):
        return z(x, y, z), lambda context, builder, signature, values: build(builder, *values)

    return word


def llvm(name):
    """The instruction builder of an intrinsic of LLVM."""

    def build(builder, *numbers):
        kind = numbers[0].type
        shape = ir.FunctionType(kind, [kind] * len(numbers))
        function = builder.module.declare_intrinsic(f"llvm.{name}", [kind], shape)
        return builder.call(function, numbers)

    return build


def _extreme(comparison):
    """The one that compares so; of equal ones (0 and -0) the second, as in torch.maximum."""

    def build(builder, a, b):
        chosen = builder.select(builder.fcmp_ordered(comparison, a, b), a, b)
        return builder.select(builder.fcmp_unordered("uno", a, a), a, chosen)

    return build


def _bounded(comparison):
    """The bound where it compares so, else the number, also where they are equal: as in torch.clamp."""

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


absolute = unary(llvm("fabs"))
sqrt = unary(llvm("sqrt"))
exp = unary(llvm("exp"))
log = unary(llvm("log"))
power = binary(llvm("pow"))
fma = ternary(llvm("fma"))  # x · y + z, rounded once
lerp = ternary(_lerp)  # x + z · (y - x), from whichever end is nearer
negative = unary(lambda builder, x: builder.fneg(x))
sign = unary(_sign)  # 0 for what is not a number, as torch.sign has it
larger = binary(_extreme(">"))  # not a number if either is not
smaller = binary(_extreme("<"))
at_least = binary(_bounded(">"))
at_most = binary(_bounded("<"))
where = ternary(lambda builder, condition, a, b: builder.select(condition, a, b))
# The order of a sum over a tensor is free: that is what lets several lanes carry it.
sum_with = binary(lambda builder, total, x: builder.fadd(total, x, flags=("reassoc",)))


# The job


def _field(builder, job, name):
    address = builder.add(job, ir.Constant(INT64, 8 * JOB.index(name)))
    return builder.load(builder.inttoptr(address, INT64.as_pointer()))


def _entry(builder, table, index, kind: ir.Type = INT64):
    return builder.gep(builder.inttoptr(table, kind.as_pointer()), [index])


def _ask_openmp(name, otherwise):
    """What an OpenMP function without arguments answers; `otherwise` where its address is 0."""

    def build(builder, job):
        address = _field(builder, job, name)
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
        return builder.load(_entry(builder, _field(builder, job, table), index))

    return build


def _chunk(part):
    def build(builder, job, chunk):
        index = builder.add(builder.mul(chunk, ir.Constant(INT64, 3)), ir.Constant(INT64, part))
        return builder.load(_entry(builder, _field(builder, job, "chunks"), index))

    return build


thread_number = unary(_ask_openmp("thread_number", 0))
thread_count = unary(_ask_openmp("thread_count", 1))
shares = unary(lambda builder, job: _field(builder, job, "shares"))
first_place = binary(_row_of("bounds"))
chunk_at = binary(_row_of("order"))
tensor_of = binary(_chunk(0))
start_of = binary(_chunk(1))
length_of = binary(_chunk(2))
scalars_of = binary(_row_of("rows"))


@intrinsic
def scalar(context, job, index):
    """One of the doubles computed on the host."""

    def generate(context, builder, signature, values):
        table = _field(builder, values[0], "scalars")
        return builder.load(_entry(builder, table, values[1], ir.DoubleType()))

    return types.float64(job, index), generate


def _cell(builder, job, table, width, row, column):
    index = builder.add(builder.mul(row, width), column)
    return _entry(builder, _field(builder, job, table), index, ir.DoubleType())


@intrinsic
def reduced(context, job, reduction, tensor):
    """A finished reduction over a tensor."""

    def generate(context, builder, signature, values):
        job, reduction, tensor = values
        width = _field(builder, job, "tensors")
        return builder.load(_cell(builder, job, "reduced", width, reduction, tensor))

    return types.float64(job, reduction, tensor), generate


@intrinsic
def keep_partial(context, job, reductions, reduction, chunk, value):
    """Note down what a reduction came to over a chunk."""

    def generate(context, builder, signature, values):
        job, reductions, reduction, chunk, value = values
        builder.store(value, _cell(builder, job, "partials", reductions, chunk, reduction))
        return context.get_dummy_value()

    return types.void(job, reductions, reduction, chunk, value), generate


# Memory


def array_of(kind):
    """The word that gives a pointer to an entry of an array: (job, array, tensor, entry)."""
    pointer = types.CPointer(kind)

    def generate(context, builder, signature, values):
        job, array, tensor, start = values
        index = builder.add(builder.mul(array, _field(builder, job, "tensors")), tensor)
        address = builder.load(_entry(builder, _field(builder, job, "pointers"), index))
        return _entry(builder, address, start, context.get_value_type(kind))

    @intrinsic
    def word(context, job, array, tensor, start):
        return pointer(job, array, tensor, start), generate

    return word


float64_array = array_of(types.float64)
float32_array = array_of(types.float32)
bfloat16_array = array_of(BFLOAT16)
float16_array = array_of(FLOAT16)


def _widen(builder, kind, bits):
    if kind == BFLOAT16:
        wide = builder.shl(builder.zext(bits, INT32), ir.Constant(INT32, 16))
        return builder.bitcast(wide, ir.FloatType())
    if kind == FLOAT16:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
    return bits


def _narrow(builder, kind, x):
    """Round once, to the nearest, ties to even; what is not a number stays none."""
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


@intrinsic
def load(context, array, index):
    """An entry, in the precision that it is computed in."""
    kind = array.dtype
    number = types.float32 if kind in (BFLOAT16, FLOAT16) else kind

    def generate(context, builder, signature, values):
        return _widen(builder, kind, builder.load(builder.gep(values[0], [values[1]])))

    return number(array, index), generate


@intrinsic
def store(context, array, index, x):
    """Put a number back, in the array's own precision."""
    kind = array.dtype

    def generate(context, builder, signature, values):
        builder.store(_narrow(builder, kind, values[2]), builder.gep(values[0], [values[1]]))
        return context.get_dummy_value()

    return types.void(array, index, x), generate
