"""The words for random numbers that a generated CPU kernel is written in; `engine.draws` says what they do."""
# llvmlite has no type annotations.
# pyright: basic

from __future__ import annotations

from llvmlite import ir

from steprule.engine import draws, storage
from steprule.engine.runners.kernels.cpu.language import float32, int32, word
from steprule.engine.runners.kernels.cpu.storage_words import _bits_of, _constant, _float_of, _mixed, _single
from steprule.engine.runners.kernels.cpu.words import INT32, INT64, llvm


def _upper(builder, x):
    """The upper half of 64 bits."""
    return builder.trunc(builder.lshr(x, ir.Constant(INT64, 32)), INT32)


@word(int32)
def stream_of(builder, array, salt):
    """The stream of a draw, from the parameter's noise key."""
    stream = _upper(builder, builder.load(array))
    return _mixed(builder, builder.add(stream, builder.trunc(salt, INT32)))


@word(int32)
def turn_of(builder, array, stream):
    """What a stream is shifted by in this step."""
    return _mixed(builder, builder.add(builder.trunc(builder.load(array), INT32), stream))


@word(int32)
def bits_at(builder, stream, turn, place):
    """32 random bits for an element's place."""
    own = _mixed(builder, builder.xor(builder.trunc(place, INT32), stream))
    far = builder.mul(_upper(builder, place), _constant(storage.GOLDEN))
    return _mixed(builder, builder.add(builder.add(own, turn), far))


def _polynomial(builder, v, coefficients):
    value = _single(coefficients[0])
    for coefficient in coefficients[1:]:
        value = builder.fadd(builder.fmul(value, v), _single(coefficient))
    return value


@word(float32)
def gaussian(builder, bits):
    """The quantile of the normal distribution for 32 random bits."""
    tail = builder.sitofp(builder.and_(bits, _constant(0x7FFFFFFF)), ir.FloatType())
    tail = builder.fmul(builder.fadd(tail, _single(0.5)), _single(draws.TAILS))
    for _ in range(3):
        tail = llvm("sqrt")(builder, tail)
    v = builder.fsub(_single(1.0), tail)
    top, bottom = (_polynomial(builder, v, x) for x in (draws.TOP, draws.BOTTOM))
    size = builder.fdiv(builder.fmul(v, top), bottom)
    return _signed(builder, size, bits)


@word(float32)
def coin(builder, bits):
    """1 or -1, by the first of 32 random bits."""
    return _signed(builder, _single(1.0), bits)


def _signed(builder, size, bits):
    """A size with its sign changed if the first bit is set."""
    sign = builder.and_(bits, _constant(-(1 << 31)))
    return _float_of(builder, builder.xor(_bits_of(builder, size), sign))
