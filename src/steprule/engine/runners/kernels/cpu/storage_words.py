"""The words of CPU kernels for what is stored in fewer bits; see `engine.storage`.

Importing this module imports numba, so only the compiler does it.
"""
# numba has no type annotations, and the body of a word sees only its compiler's objects.
# pyright: basic

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from steprule.engine import storage
from steprule.engine.blocks import BLOCK
from steprule.engine.runners.kernels.cpu.words import (
    BFLOAT16,
    INT16,
    INT32,
    INT64,
    _entry,
    _narrow,
    _widen,
    field_of,
    llvm,
)

KINDS = {types.int8: torch.int8, types.uint8: torch.uint8}


def _constant(value, kind=INT32):
    return ir.Constant(kind, value)


def _float_of(builder, bits):
    return builder.bitcast(bits, ir.FloatType())


def _bits_of(builder, x):
    return builder.bitcast(x, INT32)


def _mixed(builder, x):
    """storage.mix."""
    x = builder.mul(builder.xor(x, builder.lshr(x, _constant(16))), _constant(0x7FEB352D))
    x = builder.mul(builder.xor(x, builder.lshr(x, _constant(15))), _constant(0x846CA68B))
    return builder.xor(x, builder.lshr(x, _constant(16)))


def _moved(builder, start, index):
    steps = builder.mul(builder.trunc(index, INT32), _constant(storage.GOLDEN))
    return builder.add(start, steps)


@intrinsic
def noise_from(context, key, block, place):
    """The 32 random bits of an element of a block, as in `storage.noise_for`."""

    def generate(context, builder, signature, values):
        key, block, place = values
        start = _mixed(builder, builder.xor(builder.trunc(block, INT32), key))
        return _moved(builder, start, place)

    return types.int32(key, block, place), generate


def _noise(builder, start, index, bits):
    """Some of the random bits of an element so many places further on."""
    return builder.lshr(_moved(builder, start, index), _constant(32 - bits))


@intrinsic
def fetch(context, array, first):
    """Prefetch the block that begins there, whether or not there is one."""

    def generate(context, builder, signature, values):
        size = context.get_abi_sizeof(context.get_value_type(array.dtype))
        start = builder.bitcast(builder.gep(values[0], [values[1]]), ir.IntType(8).as_pointer())
        shape = ir.FunctionType(ir.VoidType(), [start.type, INT32, INT32, INT32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [start.type], shape)
        read, near, data = _constant(0), _constant(3), _constant(1)
        for place in range(0, BLOCK * size, 64):
            builder.call(prefetch, [builder.gep(start, [_constant(place, INT64)]), read, near, data])
        return context.get_dummy_value()

    return types.void(array, first), generate


@intrinsic
def scratch(context, job, place):
    """A buffer for one block, used by this thread only."""
    pointer = types.CPointer(types.float32)

    def generate(context, builder, signature, values):
        index = builder.mul(values[1], _constant(BLOCK, INT64))
        return _entry(builder, field_of(builder, values[0], "scratch"), index, ir.FloatType())

    return pointer(job, place), generate


@intrinsic
def key_of(context, array, salt):
    """A tensor's key for random rounding, made unique by a salt."""

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
    """The larger of a size's bits and those of |x|; positive floats have the same order as their bits."""

    def generate(context, builder, signature, values):
        size = builder.and_(_bits_of(builder, values[1]), _constant(0x7FFFFFFF))
        return builder.select(builder.icmp_signed(">", size, values[0]), size, values[0])

    return types.int32(top, x), generate


@intrinsic
def load_scale(context, array, index):
    """The power of two that a block shares; NaN if the block is not finite."""

    def generate(context, builder, signature, values):
        exponent = builder.zext(builder.load(builder.gep(values[0], [values[1]])), INT32)
        power = _float_of(builder, builder.shl(exponent, _constant(storage.EXPONENT)))
        finite = builder.icmp_signed("!=", exponent, _constant(storage.NOT_FINITE))
        return builder.select(finite, power, ir.Constant(ir.FloatType(), float("nan")))

    return types.float32(array, index), generate


@intrinsic
def store_scale(context, array, index, top):
    """Store the scale of a block, from the bits of its largest element. Returns 1 over it, and 0 for 0."""

    def generate(context, builder, signature, values):
        array, index, top = values
        largest = _float_of(builder, top)
        bits = builder.and_(
            _bits_of(builder, builder.fmul(largest, _single(storage.HEADROOM))), _constant(storage.INFINITE)
        )
        vanishes = builder.fcmp_ordered("<", largest, _single(storage.TINIEST))
        bits = builder.select(vanishes, _constant(0), bits)
        infinite = builder.icmp_signed(">=", top, _constant(storage.INFINITE))
        bits = builder.select(infinite, _constant(storage.INFINITE), bits)
        exponent = builder.lshr(bits, _constant(storage.EXPONENT))
        builder.store(builder.trunc(exponent, ir.IntType(8)), builder.gep(array, [index]))
        positive = builder.icmp_signed(">", bits, _constant(0))
        inverse = builder.sub(_constant(2 * storage.ONE), bits)
        return _float_of(builder, builder.select(positive, inverse, _constant(0)))

    return types.float32(array, index, top), generate


def _single(value):
    return ir.Constant(ir.FloatType(), float(np.float32(value)))


_ZERO = {kind: storage.CODE_0[dtype] for kind, dtype in KINDS.items()}
_FIRST = {kind: int(np.float32(zero).view(np.int32)) for kind, zero in _ZERO.items()}


@intrinsic
def load_code(context, array, index, scale):
    """A value from its code and the scale of its block."""
    kind = array.dtype

    def generate(context, builder, signature, values):
        array, index, scale = values
        code = builder.zext(builder.load(builder.gep(array, [index])), INT32)
        size = builder.and_(code, _constant(0x7F)) if kind == types.int8 else code
        bits = builder.or_(builder.shl(size, _constant(storage.MANTISSA)), _constant(_FIRST[kind]))
        size = builder.fsub(_float_of(builder, bits), _single(_ZERO[kind]))
        if kind == types.int8:
            sign = builder.and_(builder.shl(code, _constant(24)), _constant(1 << 31))
            size = _float_of(builder, builder.or_(_bits_of(builder, size), sign))
        return builder.fmul(size, scale)

    return types.float32(array, index, scale), generate


@intrinsic
def store_code(context, array, index, x, inverse, start):
    """Store a value as a code, rounded up or down by noise."""
    kind = array.dtype

    def generate(context, builder, signature, values):
        array, index, x, inverse, start = values
        noise = _noise(builder, start, index, storage.MANTISSA)
        size = builder.fmul(llvm("fabs")(builder, x), inverse)
        bits = _bits_of(builder, builder.fadd(size, _single(_ZERO[kind])))
        code = builder.ashr(builder.add(bits, noise), _constant(storage.MANTISSA))
        if kind == types.uint8:
            least = _constant((_FIRST[kind] >> storage.MANTISSA) + 1)
            larger = builder.select(builder.icmp_signed(">", code, least), code, least)
            code = builder.select(builder.fcmp_ordered(">", x, _single(0.0)), larger, code)
        else:
            sign = builder.and_(builder.lshr(_bits_of(builder, x), _constant(24)), _constant(0x80))
            code = builder.or_(builder.and_(code, _constant(0x7F)), sign)
        builder.store(builder.trunc(code, ir.IntType(8)), builder.gep(array, [index]))
        return context.get_dummy_value()

    return types.void(array, index, x, inverse, start), generate


def _int16_at(builder, array, index):
    return builder.gep(builder.bitcast(array, INT16.as_pointer()), [index])


@intrinsic
def load_master(context, array, low, index):
    """A float32 from the parameter's 16 bits and the lower half next to them."""

    def generate(context, builder, signature, values):
        array, low, index = values
        upper = builder.shl(builder.sext(builder.load(builder.gep(array, [index])), INT32), _constant(16))
        lower = builder.sext(builder.load(_int16_at(builder, low, index)), INT32)
        return _float_of(builder, builder.add(upper, lower))

    return types.float32(array, low, index), generate


@intrinsic
def store_master(context, array, low, index, x):
    """Store a float32 as the parameter's 16 bits, rounded half up, and the signed rest next to them."""

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
    """Store a value rounded to 16 bits, and what that leaves out, in 16 bits too."""
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
def store_randomly(context, array, index, x, start):
    """Store a value as bfloat16, rounded up or down by noise."""

    def generate(context, builder, signature, values):
        array, index, x, start = values
        bits = _bits_of(builder, x)
        rounded = builder.add(bits, _noise(builder, start, index, 16))
        rounded = builder.trunc(builder.lshr(rounded, _constant(16)), INT16)
        size = builder.and_(bits, _constant(0x7FFFFFFF))
        finite = builder.icmp_signed("<", size, _constant(0x7F800000))
        kept = builder.select(finite, rounded, _narrow(builder, BFLOAT16, x))
        builder.store(kept, builder.gep(array, [index]))
        return context.get_dummy_value()

    return types.void(array, index, x, start), generate
