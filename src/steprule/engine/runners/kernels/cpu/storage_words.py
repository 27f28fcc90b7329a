"""The words of CPU kernels for what is stored in fewer bits; see `engine.storage`.

Importing this module imports llvmlite, so only the compiler does it.
"""
# llvmlite has no type annotations.
# pyright: basic

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir

from steprule.engine import storage
from steprule.engine.blocks import BLOCK
from steprule.engine.runners.kernels.cpu.language import (
    Pointer,
    Word,
    float32,
    int8,
    int32,
    nothing,
    uint8,
    word,
)
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

KINDS = {int8: torch.int8, uint8: torch.uint8}


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


@word(int32)
def noise_from(builder, key, block, place):
    """The 32 random bits of an element of a block, as in `storage.noise_for`."""
    start = _mixed(builder, builder.xor(builder.trunc(block, INT32), key))
    return _moved(builder, start, place)


def _noise(builder, start, index, bits):
    """Some of the random bits of an element so many places further on."""
    return builder.lshr(_moved(builder, start, index), _constant(32 - bits))


@Word
def fetch(array, first):
    """Prefetch the block that begins there, whether or not there is one."""

    def build(builder, array_here, first):
        start = builder.bitcast(builder.gep(array_here, [first]), ir.IntType(8).as_pointer())
        shape = ir.FunctionType(ir.VoidType(), [start.type, INT32, INT32, INT32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [start.type], shape)
        read, near, data = _constant(0), _constant(3), _constant(1)
        for place in range(0, BLOCK * array.to.bits // 8, 64):
            builder.call(prefetch, [builder.gep(start, [_constant(place, INT64)]), read, near, data])

    return nothing, build


@word(Pointer(float32))
def scratch(builder, job, place):
    """A buffer for one block, used by this thread only."""
    index = builder.mul(place, _constant(BLOCK, INT64))
    return _entry(builder, field_of(builder, job, "scratch"), index, ir.FloatType())


@word(int32)
def key_of(builder, array, salt):
    """A tensor's key for random rounding, made unique by a salt."""
    key = builder.trunc(builder.load(array), INT32)
    return builder.xor(key, builder.trunc(salt, INT32))


@word(int32)
def size_of_zero(builder):
    """The bits of 0."""
    return _constant(0)


@word(int32)
def larger_size(builder, top, x):
    """The larger of a size's bits and those of |x|; positive floats have the same order as their bits."""
    size = builder.and_(_bits_of(builder, x), _constant(0x7FFFFFFF))
    return builder.select(builder.icmp_signed(">", size, top), size, top)


@word(float32)
def load_scale(builder, array, index):
    """The power of two that a block shares; NaN if the block is not finite."""
    exponent = builder.zext(builder.load(builder.gep(array, [index])), INT32)
    power = _float_of(builder, builder.shl(exponent, _constant(storage.EXPONENT)))
    finite = builder.icmp_signed("!=", exponent, _constant(storage.NOT_FINITE))
    return builder.select(finite, power, ir.Constant(ir.FloatType(), float("nan")))


@word(float32)
def store_scale(builder, array, index, top):
    """Store the scale of a block, from the bits of its largest element. Returns 1 over it, and 0 for 0."""
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


def _single(value):
    return ir.Constant(ir.FloatType(), float(np.float32(value)))


_ZERO = {kind: storage.CODE_0[dtype] for kind, dtype in KINDS.items()}
_FIRST = {kind: int(np.float32(zero).view(np.int32)) for kind, zero in _ZERO.items()}


@Word
def load_code(array, index, scale):
    """A value from its code and the scale of its block."""
    kind = array.to

    def build(builder, array, index, scale):
        code = builder.zext(builder.load(builder.gep(array, [index])), INT32)
        size = builder.and_(code, _constant(0x7F)) if kind == int8 else code
        bits = builder.or_(builder.shl(size, _constant(storage.MANTISSA)), _constant(_FIRST[kind]))
        size = builder.fsub(_float_of(builder, bits), _single(_ZERO[kind]))
        if kind == int8:
            sign = builder.and_(builder.shl(code, _constant(24)), _constant(1 << 31))
            size = _float_of(builder, builder.or_(_bits_of(builder, size), sign))
        return builder.fmul(size, scale)

    return float32, build


@Word
def store_code(array, index, x, inverse, start):
    """Store a value as a code, rounded up or down by noise."""
    kind = array.to

    def build(builder, array, index, x, inverse, start):
        noise = _noise(builder, start, index, storage.MANTISSA)
        size = builder.fmul(llvm("fabs")(builder, x), inverse)
        bits = _bits_of(builder, builder.fadd(size, _single(_ZERO[kind])))
        code = builder.ashr(builder.add(bits, noise), _constant(storage.MANTISSA))
        if kind == uint8:
            least = _constant((_FIRST[kind] >> storage.MANTISSA) + 1)
            larger = builder.select(builder.icmp_signed(">", code, least), code, least)
            code = builder.select(builder.fcmp_ordered(">", x, _single(0.0)), larger, code)
        else:
            sign = builder.and_(builder.lshr(_bits_of(builder, x), _constant(24)), _constant(0x80))
            code = builder.or_(builder.and_(code, _constant(0x7F)), sign)
        builder.store(builder.trunc(code, ir.IntType(8)), builder.gep(array, [index]))

    return nothing, build


def _int16_at(builder, array, index):
    return builder.gep(builder.bitcast(array, INT16.as_pointer()), [index])


@word(float32)
def load_master(builder, array, low, index):
    """A float32 from the parameter's 16 bits and the lower half next to them."""
    upper = builder.shl(builder.sext(builder.load(builder.gep(array, [index])), INT32), _constant(16))
    lower = builder.sext(builder.load(_int16_at(builder, low, index)), INT32)
    return _float_of(builder, builder.add(upper, lower))


@word(nothing)
def store_master(builder, array, low, index, x):
    """Store a float32 as the parameter's 16 bits, rounded half up, and the signed rest next to them."""
    bits = _bits_of(builder, x)
    upper = builder.ashr(builder.add(bits, _constant(0x8000)), _constant(16))
    rest = builder.sub(bits, builder.shl(upper, _constant(16)))
    builder.store(builder.trunc(upper, INT16), builder.gep(array, [index]))
    builder.store(builder.trunc(rest, INT16), _int16_at(builder, low, index))


@Word
def store_compensated(array, rest, index, x):
    """Store a value rounded to 16 bits, and what that leaves out, in 16 bits too."""
    kind = array.to

    def build(builder, array, rest, index, x):
        kept = _narrow(builder, kind, x)
        left_out = builder.fsub(x, _widen(builder, kind, kept))
        zero = ir.Constant(x.type, 0.0)
        size = builder.and_(_bits_of(builder, left_out), _constant(0x7FFFFFFF))
        finite = builder.icmp_signed("<", size, _constant(0x7F800000))
        builder.store(kept, builder.gep(array, [index]))
        left_out = _narrow(builder, kind, builder.select(finite, left_out, zero))
        builder.store(left_out, builder.gep(rest, [index]))

    return nothing, build


@word(nothing)
def store_randomly(builder, array, index, x, start):
    """Store a value as bfloat16, rounded up or down by noise."""
    bits = _bits_of(builder, x)
    rounded = builder.add(bits, _noise(builder, start, index, 16))
    rounded = builder.trunc(builder.lshr(rounded, _constant(16)), INT16)
    size = builder.and_(bits, _constant(0x7FFFFFFF))
    finite = builder.icmp_signed("<", size, _constant(0x7F800000))
    kept = builder.select(finite, rounded, _narrow(builder, BFLOAT16, x))
    builder.store(kept, builder.gep(array, [index]))
