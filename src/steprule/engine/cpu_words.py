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


int8_array = array_of(types.int8)
uint8_array = array_of(types.uint8)
int64_array = array_of(types.int64)
float64_array = array_of(types.float64)
float32_array = array_of(types.float32)
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


# Storage: small floats that share a scale, and parameters of 16 bits with more elsewhere (see storage.py)


def _constant(value, kind=INT32):
    return ir.Constant(kind, value)


def _float_of(builder, bits):
    return builder.bitcast(bits, ir.FloatType())


def _bits_of(builder, x):
    return builder.bitcast(x, INT32)


@intrinsic
def hash_of(context, key, place):
    """32 random bits for a place: storage.mix, on the low 32 bits."""

    def generate(context, builder, signature, values):
        x = builder.xor(builder.trunc(values[1], INT32), values[0])
        x = builder.mul(builder.xor(x, builder.lshr(x, _constant(16))), _constant(0x7FEB352D))
        x = builder.mul(builder.xor(x, builder.lshr(x, _constant(15))), _constant(0x846CA68B))
        return builder.xor(x, builder.lshr(x, _constant(16)))

    return types.int32(key, place), generate


@intrinsic
def offset(context, array, entries):
    """The same array, some entries on."""

    def generate(context, builder, signature, values):
        return builder.gep(values[0], [values[1]])

    return array(array, entries), generate


@intrinsic
def scratch(context, job, place):
    """256 numbers of this thread's own."""
    pointer = types.CPointer(types.float32)

    def generate(context, builder, signature, values):
        index = builder.mul(values[1], _constant(256, INT64))
        return _entry(builder, _field(builder, values[0], "scratch"), index, ir.FloatType())

    return pointer(job, place), generate


@intrinsic
def key_of(context, array, salt):
    """A tensor's key for random rounding, told apart by a salt."""

    def generate(context, builder, signature, values):
        key = builder.trunc(builder.load(values[0]), INT32)
        return builder.xor(key, builder.trunc(values[1], INT32))

    return types.int32(array, salt), generate


@intrinsic
def size_of_zero(context):
    """The bits of 0."""
    return types.int32(), lambda context, builder, signature, values: _constant(0)


@intrinsic
def larger_size(context, top, x):
    """The larger of a size's bits and those of |x|; positive floats order as their bits do."""

    def generate(context, builder, signature, values):
        size = builder.and_(_bits_of(builder, values[1]), _constant(0x7FFFFFFF))
        return builder.select(builder.icmp_signed(">", size, values[0]), size, values[0])

    return types.int32(top, x), generate


@intrinsic
def number_of(context, bits):
    """The float32 with these bits."""

    def generate(context, builder, signature, values):
        bits = values[0]
        return _float_of(builder, builder.trunc(bits, INT32) if bits.type == INT64 else bits)

    return types.float32(bits), generate


@intrinsic
def inverse(context, scale):
    """1 over a scale, and 0 for 0."""

    def generate(context, builder, signature, values):
        zero, one = (ir.Constant(ir.FloatType(), x) for x in (0.0, 1.0))
        positive = builder.fcmp_ordered(">", values[0], zero)
        return builder.select(positive, builder.fdiv(one, values[0]), zero)

    return types.float32(scale), generate


_MANTISSA = 20
_HIGHEST = {types.int8: 127, types.uint8: 255}


def _lowest(kind):
    return (0x3F800000 >> _MANTISSA) - _HIGHEST[kind]


@intrinsic
def load_code(context, array, index, scale):
    """A number from its code and the scale of its neighbours."""
    kind = array.dtype

    def generate(context, builder, signature, values):
        array, index, scale = values
        byte = builder.load(builder.gep(array, [index]))
        signed = kind == types.int8
        code = builder.sext(byte, INT32) if signed else builder.zext(byte, INT32)
        negative = builder.icmp_signed("<", code, _constant(0))
        size = builder.select(negative, builder.neg(code), code)
        bits = builder.shl(builder.add(size, _constant(_lowest(kind))), _constant(_MANTISSA))
        none = builder.icmp_signed("==", code, _constant(0))
        zero = ir.Constant(ir.FloatType(), 0.0)
        value = builder.fmul(builder.select(none, zero, _float_of(builder, bits)), scale)
        return builder.select(negative, builder.fneg(value), value)

    return types.float32(array, index, scale), generate


@intrinsic
def store_code(context, array, index, x, inverse, noise, shift):
    """Keep a number as a code, rounded up or down by some bits of a hash."""
    kind = array.dtype

    def generate(context, builder, signature, values):
        array, index, x, inverse, noise, shift = values
        size = _bits_of(builder, builder.fmul(llvm("fabs")(builder, x), inverse))
        noise = builder.lshr(noise, builder.trunc(shift, INT32))
        noise = builder.and_(noise, _constant((1 << _MANTISSA) - 1))
        code = builder.ashr(builder.add(size, noise), _constant(_MANTISSA))
        code = builder.sub(code, _constant(_lowest(kind)))
        for comparison, bound in (("<", 0), (">", _HIGHEST[kind])):
            beyond = builder.icmp_signed(comparison, code, _constant(bound))
            code = builder.select(beyond, _constant(bound), code)
        zero = ir.Constant(x.type, 0.0)
        if kind == types.uint8:
            vanished = builder.icmp_signed("<", code, _constant(1))
            least = builder.select(builder.fcmp_ordered(">", x, zero), _constant(1), code)
            code = builder.select(vanished, least, code)
        else:
            code = builder.select(builder.fcmp_ordered("<", x, zero), builder.neg(code), code)
        builder.store(builder.trunc(code, ir.IntType(8)), builder.gep(array, [index]))
        return context.get_dummy_value()

    return types.void(array, index, x, inverse, noise, shift), generate


def _int16_at(builder, array, index):
    return builder.gep(builder.bitcast(array, INT16.as_pointer()), [index])


@intrinsic
def load_master(context, array, low, index):
    """A float32 from the parameter's 16 bits and the lower half beside them."""

    def generate(context, builder, signature, values):
        array, low, index = values
        upper = builder.shl(builder.sext(builder.load(builder.gep(array, [index])), INT32), _constant(16))
        lower = builder.sext(builder.load(_int16_at(builder, low, index)), INT32)
        return _float_of(builder, builder.add(upper, lower))

    return types.float32(array, low, index), generate


@intrinsic
def store_master(context, array, low, index, x):
    """A float32 as the parameter's 16 bits, rounded half up, and the signed rest beside them."""

    def generate(context, builder, signature, values):
        array, low, index, x = values
        bits = _bits_of(builder, x)
        upper = builder.ashr(builder.add(bits, _constant(0x8000)), _constant(16))
        rest = builder.sub(bits, builder.shl(upper, _constant(16)))
        builder.store(builder.trunc(upper, INT16), builder.gep(array, [index]))
        builder.store(builder.trunc(rest, INT16), _int16_at(builder, low, index))
        return context.get_dummy_value()

    return types.void(array, low, index, x), generate


@intrinsic
def store_compensated(context, array, rest, index, x):
    """A number rounded to 16 bits, and what that leaves out, in 16 bits too."""
    kind = array.dtype

    def generate(context, builder, signature, values):
        array, rest, index, x = values
        kept = _narrow(builder, kind, x)
        left_out = builder.fsub(x, _widen(builder, kind, kept))
        zero = ir.Constant(x.type, 0.0)
        size = builder.and_(_bits_of(builder, left_out), _constant(0x7FFFFFFF))
        finite = builder.icmp_signed("<", size, _constant(0x7F800000))
        builder.store(kept, builder.gep(array, [index]))
        left_out = _narrow(builder, kind, builder.select(finite, left_out, zero))
        builder.store(left_out, builder.gep(rest, [index]))
        return context.get_dummy_value()

    return types.void(array, rest, index, x), generate


@intrinsic
def store_randomly(context, array, index, x, noise):
    """A bfloat16, rounded up or down by some bits of a hash."""

    def generate(context, builder, signature, values):
        array, index, x, noise = values
        bits = _bits_of(builder, x)
        noise = builder.and_(noise, _constant(0xFFFF))
        rounded = builder.trunc(builder.lshr(builder.add(bits, noise), _constant(16)), INT16)
        size = builder.and_(bits, _constant(0x7FFFFFFF))
        finite = builder.icmp_signed("<", size, _constant(0x7F800000))
        kept = builder.select(finite, rounded, _narrow(builder, BFLOAT16, x))
        builder.store(kept, builder.gep(array, [index]))
        return context.get_dummy_value()

    return types.void(array, index, x, noise), generate
