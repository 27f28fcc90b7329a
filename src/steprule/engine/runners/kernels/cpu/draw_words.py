"""The words for random numbers that a generated CPU kernel is written in; `engine.draws` says what they do."""
# numba has no type annotations, and the body of a word sees only its compiler's objects.
# pyright: basic

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from steprule.engine import draws, storage
from steprule.engine.runners.kernels.cpu.storage_words import _bits_of, _constant, _float_of, _mixed, _single
from steprule.engine.runners.kernels.cpu.words import INT32, INT64, llvm


def _upper(builder, x):
    """The upper half of 64 bits."""
    return builder.trunc(builder.lshr(x, ir.Constant(INT64, 32)), INT32)


@intrinsic
def stream_of(context, array, salt):
    """The stream of a draw, from the parameter's noise key."""

    def generate(context, builder, signature, values):
        stream = _upper(builder, builder.load(values[0]))
        return _mixed(builder, builder.add(stream, builder.trunc(values[1], INT32)))

    return types.int32(array, salt), generate


@intrinsic
def turn_of(context, array, stream):
    """What a stream is shifted by in this step."""

    def generate(context, builder, signature, values):
        array, stream = values
        return _mixed(builder, builder.add(builder.trunc(builder.load(array), INT32), stream))

    return types.int32(array, stream), generate


@intrinsic
def bits_at(context, stream, turn, place):
    """32 random bits for an element's place."""

    def generate(context, builder, signature, values):
        stream, turn, place = values
        own = _mixed(builder, builder.xor(builder.trunc(place, INT32), stream))
        far = builder.mul(_upper(builder, place), _constant(storage.GOLDEN))
        return _mixed(builder, builder.add(builder.add(own, turn), far))

    return types.int32(stream, turn, place), generate


def _polynomial(builder, v, coefficients):
    value = _single(coefficients[0])
    for coefficient in coefficients[1:]:
        value = builder.fadd(builder.fmul(value, v), _single(coefficient))
    return value


@intrinsic
def gaussian(context, bits):
    """The quantile of the normal distribution for 32 random bits."""

    def generate(context, builder, signature, values):
        (bits,) = values
        tail = builder.sitofp(builder.and_(bits, _constant(0x7FFFFFFF)), ir.FloatType())
        tail = builder.fmul(builder.fadd(tail, _single(0.5)), _single(draws.TAILS))
        for _ in range(3):
            tail = llvm("sqrt")(builder, tail)
        v = builder.fsub(_single(1.0), tail)
        top, bottom = (_polynomial(builder, v, x) for x in (draws.TOP, draws.BOTTOM))
        size = builder.fdiv(builder.fmul(v, top), bottom)
        return _signed(builder, size, bits)

    return types.float32(bits), generate


@intrinsic
def coin(context, bits):
    """1 or -1, by the first of 32 random bits."""

    def generate(context, builder, signature, values):
        return _signed(builder, _single(1.0), values[0])

    return types.float32(bits), generate


def _signed(builder, size, bits):
    """A size with its sign changed if the first bit is set."""
    sign = builder.and_(bits, _constant(-(1 << 31)))
    return _float_of(builder, builder.xor(_bits_of(builder, size), sign))
