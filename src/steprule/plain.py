"""Plain numbers: what rules compute with outside of tensors, in double precision."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from numbers import Real
from typing import Any


class Double(float):
    """A plain number made of sums, where it is known at once.

    It divides by zero and overflows as elements of tensors do: to infinity or NaN, without an error.
    """

    __slots__ = ()

    def __add__(self, other: Any) -> Any:
        return _doubled(float.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return _doubled(float.__radd__(self, other))

    def __sub__(self, other: Any) -> Any:
        return _doubled(float.__sub__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return _doubled(float.__rsub__(self, other))

    def __mul__(self, other: Any) -> Any:
        return _doubled(float.__mul__(self, other))

    def __rmul__(self, other: Any) -> Any:
        return _doubled(float.__rmul__(self, other))

    def __truediv__(self, other: Any) -> Any:
        return Double(_quotient(self, other)) if isinstance(other, Real) else NotImplemented

    def __rtruediv__(self, other: Any) -> Any:
        return Double(_quotient(other, self)) if isinstance(other, Real) else NotImplemented

    def __pow__(self, other: Any, _: None = None) -> Any:
        return Double(_power(self, other)) if isinstance(other, Real) else NotImplemented

    def __rpow__(self, other: Any, _: None = None) -> Any:
        return Double(_power(other, self)) if isinstance(other, Real) else NotImplemented

    def __pos__(self) -> Double:
        return self

    def __neg__(self) -> Double:
        return Double(float.__neg__(self))

    def __abs__(self) -> Double:
        return Double(float.__abs__(self))


def _doubled(value: Any) -> Any:
    return value if value is NotImplemented else Double(value)


def _quotient(a: Any, b: Any) -> float:
    a, b = float(a), float(b)
    if b != 0:
        return a / b
    return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)


def _power(x: Any, y: Any) -> float:
    x, y = float(x), float(y)
    try:
        return math.pow(x, y)
    except OverflowError:
        return -math.inf if x < 0 and y % 2 == 1 else math.inf
    except ValueError:  # 0 to a negative power, or a root of a negative number
        if x != 0:
            return math.nan
        return math.copysign(math.inf, x) if y % 2 == 1 else math.inf


def _scalar_sqrt(x: float) -> float:
    # `** 0.5` is what torch.optim uses for its bias corrections; math.sqrt may differ in the last bit.
    return x**0.5 if x >= 0 else math.nan


# The plus turns True and False into 1 and 0.


def _scalar_larger(a: float, b: float) -> float:
    return +(a if a != a or a >= b else b)


def _scalar_smaller(a: float, b: float) -> float:
    return +(a if a != a or a <= b else b)


def _scalar_exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _scalar_sign(x: float) -> float:
    return float((x > 0) - (x < 0)) if x == x else x


def _scalar_log(x: float) -> float:
    return math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan)


def _scalar_as_stored(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def _scalar_select(condition: Any, a: Any, b: Any) -> Any:
    return +(a if condition else b)


SCALAR_WORDS: dict[str, Callable[..., float]] = {
    "sqrt": _scalar_sqrt,
    "exp": _scalar_exp,
    "log": _scalar_log,
    "atan2": math.atan2,
    "sign": _scalar_sign,
    "larger": _scalar_larger,
    "smaller": _scalar_smaller,
    "as_stored": _scalar_as_stored,
    "select": _scalar_select,
}


def _on_doubles(word: str) -> Callable[..., Double]:
    # Looked up late, because the engine replaces `as_stored`.
    return lambda *operands: Double(SCALAR_WORDS[word](*operands))


def _double_power(x: float, y: float) -> Double:
    return Double(_power(x, y))


# The same words on numbers that are made of sums.
DOUBLE_WORDS = {word: _on_doubles(word) for word in SCALAR_WORDS}
DOUBLE_WORDS["power"] = _double_power
