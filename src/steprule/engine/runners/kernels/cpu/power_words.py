"""Powers in single precision for CPU kernels: unlike calls of C's `powf`, they go into vectors.

xʸ is 2 to the power of y·log₂|x|. Both functions are series in double precision, with errors below 10⁻¹³:
a power is the float nearest to the true one, except in very rare cases.
"""
# llvmlite has no type annotations.
# pyright: basic

from __future__ import annotations

import math
from functools import partial, reduce

from llvmlite import ir

from steprule.engine.runners.kernels.cpu.language import binary
from steprule.engine.runners.kernels.cpu.words import llvm

__all__ = ["power"]

DOUBLE, INT32, INT64 = ir.DoubleType(), ir.IntType(32), ir.IntType(64)
number, whole = partial(ir.Constant, DOUBLE), partial(ir.Constant, INT64)

# log₂ m is s·P(s²), where s is (m - 1)/(m + 1), for m from √½ to √2.
LOG = [2 / math.log(2) / (2 * k + 1) for k in range(9, -1, -1)]
# 2ᶠ for f from -½ to ½.
POWER = [math.log(2) ** k / math.factorial(k) for k in range(12, -1, -1)]
ROOT = 0x3FE6A09E667F3BCD  # the bits of √½
FRACTION = 52
# The largest of numbers from here on are whole, so that adding it rounds.
ROUNDING = 1.5 * 2.0**FRACTION
# Beyond these powers of two, a float is 0 or infinite.
LEAST, MOST = -200.0, 200.0


def _polynomial(builder, z, coefficients):
    first, *rest = map(number, coefficients)
    return reduce(lambda value, c: builder.fadd(builder.fmul(value, z), c), rest, first)


def _log(builder, x):
    """log₂ of a finite positive number that is not subnormal."""
    bits = builder.bitcast(x, INT64)
    exponent = builder.ashr(builder.sub(bits, whole(ROOT)), whole(FRACTION))
    m = builder.bitcast(builder.sub(bits, builder.shl(exponent, whole(FRACTION))), DOUBLE)
    s = builder.fdiv(builder.fsub(m, number(1.0)), builder.fadd(m, number(1.0)))
    part = builder.fmul(s, _polynomial(builder, builder.fmul(s, s), LOG))
    return builder.fadd(part, builder.sitofp(builder.trunc(exponent, INT32), DOUBLE))


def _exp(builder, p):
    """2 to a power, which is cut off where floats end."""
    # Comparisons with NaN are false: it is replaced in the end.
    p = builder.select(builder.fcmp_ordered(">", p, number(LEAST)), p, number(LEAST))
    p = builder.select(builder.fcmp_ordered("<", p, number(MOST)), p, number(MOST))
    rounded = builder.fadd(p, number(ROUNDING))
    rest = builder.fsub(p, builder.fsub(rounded, number(ROUNDING)))
    # The last bits of the sum are the whole number; 1023 more is the exponent of its power of two.
    exponent = builder.add(builder.bitcast(rounded, INT64), whole(1023))
    scale = builder.bitcast(builder.shl(exponent, whole(FRACTION)), DOUBLE)
    return builder.fmul(_polynomial(builder, rest, POWER), scale)


def _power(builder, x, y):
    """xʸ, with C's results for zeros, infinities and negative numbers."""
    if x.type == DOUBLE:
        return llvm("pow")(builder, x, y)
    single = x.type
    x, y = builder.fpext(x, DOUBLE), builder.fpext(y, DOUBLE)
    size, zero, one, infinite = llvm("fabs")(builder, x), number(0.0), number(1.0), number(math.inf)

    def when(comparison, a, b):
        return builder.fcmp_ordered(comparison, a, b)

    power = _exp(builder, builder.fmul(y, _log(builder, size)))
    up = when(">", y, zero)
    power = builder.select(when("==", size, zero), builder.select(up, zero, infinite), power)
    power = builder.select(when("==", size, infinite), builder.select(up, infinite, zero), power)
    floor, half = llvm("floor")(builder, y), builder.fmul(y, number(0.5))
    is_whole = when("==", floor, y)
    odd = builder.and_(is_whole, builder.fcmp_unordered("!=", llvm("floor")(builder, half), half))
    negative = when("<", llvm("copysign")(builder, one, x), zero)
    power = builder.select(builder.and_(negative, odd), builder.fneg(power), power)
    between = builder.and_(when("<", size, infinite), builder.not_(is_whole))
    undefined = builder.and_(when("<", x, zero), between)
    undefined = builder.or_(undefined, builder.fcmp_unordered("uno", x, y))
    power = builder.select(undefined, number(math.nan), power)
    # Whatever the other one is, NaN included.
    power = builder.select(builder.or_(when("==", y, zero), when("==", x, one)), one, power)
    both = builder.and_(when("==", x, number(-1.0)), when("==", llvm("fabs")(builder, y), infinite))
    return builder.fptrunc(builder.select(both, one, power), single)


power = binary(_power)
