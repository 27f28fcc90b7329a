"""The words that step rules are written in.

A rule is plain mathematics on single numbers: `+ - * / **`, comparisons, and the words below. Each word
means the same in every runner, down to the rounding:

* `a + w * b` (a number added to the product on its *right*) is one fused multiply-add, rounded once; so is
  `a + w * b * c`. Any other product is rounded before it is used. `x * w` with the plain number last is
  rounded at once.
* `ema(old, new, beta)` is `lerp(old, new, 1 - beta)`; `ema_sq(old, x, beta)` scales, then multiply-adds.
* What is made only of hyper-parameters and `t` is a plain number, computed in double precision.

Those are the roundings of torch's own operations, which is what makes the numbers equal to torch.optim's.
"""

from __future__ import annotations

import difflib
import math
import struct
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeVar

__all__ = [
    "Becomes",
    "Number",
    "as_stored",
    "becomes",
    "clamp",
    "ema",
    "ema_sq",
    "exp",
    "larger",
    "largest",
    "lerp",
    "log",
    "mean",
    "norm",
    "sign",
    "smaller",
    "sqrt",
    "where",
]


class Machine(Protocol):
    """What carries words out: a runner's table, or the tracer that writes them down."""

    rule: str

    def emit(self, word: str, *operands: Any) -> Any:
        """Carry out one word on handles and plain numbers, and return the new handle."""
        ...


class Number:
    """One number of every entry of a tensor: what `p`, `g` and the slots are inside `update`.

    Products are kept unevaluated until they are used, so that a sum can fuse with the product on its
    right. `product` is (w, b, c) for `w * b * c`; w or c may be None.
    """

    __slots__ = ("_handle", "machine", "product")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, machine: Machine, handle: Any, product: tuple[Any, Any, Any] | None = None):
        self.machine = machine
        self._handle = handle
        self.product = product

    @property
    def handle(self) -> Any:
        """The evaluated value, as the machine knows it."""
        if self._handle is None and self.product is not None:
            w, b, c = self.product
            value = b if w is None else self.machine.emit("scale", b, w)
            self._handle = value if c is None else self.machine.emit("mul", value, c)
        return self._handle

    def _word(self, word: str, *operands: Any) -> Number:
        return Number(self.machine, self.machine.emit(word, self.handle, *operands))

    def _plus(self, other: Number, sign: int) -> Number:
        """`self + other` or `self - other`, fused with the product on the right if there is one."""
        if other.product is None:
            return self._word("add" if sign > 0 else "sub", other.handle)
        w, b, c = other.product
        w = float(sign) if w is None else (w if sign > 0 else -w)
        return self._word("add_scaled", b, w) if c is None else self._word("addcmul", b, c, w)

    def __add__(self, other: Number | float) -> Number:
        return self._plus(other, 1) if isinstance(other, Number) else self._word("shift", other)

    def __radd__(self, other: float) -> Number:
        return self._word("shift", other)

    def __sub__(self, other: Number | float) -> Number:
        return self._plus(other, -1) if isinstance(other, Number) else self._word("shift", -other)

    def __rsub__(self, other: float) -> Number:
        return self._word("neg")._word("shift", other)

    def __mul__(self, other: Number | float) -> Number:
        if not isinstance(other, Number):
            return self._word("scale", other)
        if self.product is not None and self.product[2] is None:
            return Number(self.machine, None, (self.product[0], self.product[1], other.handle))
        return Number(self.machine, None, (None, self.handle, other.handle))

    def __rmul__(self, other: float) -> Number:
        return Number(self.machine, None, (other, self.handle, None))

    def __truediv__(self, other: Number | float) -> Number:
        if isinstance(other, Number):
            return self._word("div", other.handle)
        return self._word("divide", other)

    def __rtruediv__(self, other: float) -> Number:
        return self._word("reciprocal")._word("scale", other)

    def __pow__(self, other: Number | float) -> Number:
        return self._word("power", other.handle if isinstance(other, Number) else other)

    def __rpow__(self, other: float) -> Number:
        return self._word("exponential", other)

    def __neg__(self) -> Number:
        return self._word("neg")

    def __abs__(self) -> Number:
        return self._word("abs")

    def _compare(self, word: str, other: Number | float) -> Number:
        return self._word(word, other.handle if isinstance(other, Number) else other)

    def __lt__(self, other: Number | float) -> Number:
        return self._compare("less", other)

    def __le__(self, other: Number | float) -> Number:
        return self._compare("less_equal", other)

    def __gt__(self, other: Number | float) -> Number:
        return self._compare("greater", other)

    def __ge__(self, other: Number | float) -> Number:
        return self._compare("greater_equal", other)

    def __eq__(self, other: Number | float) -> Number:  # type: ignore[override]
        return self._compare("equal", other)

    def __ne__(self, other: Number | float) -> Number:  # type: ignore[override]
        return self._compare("not_equal", other)

    def __bool__(self) -> NoReturn:
        raise TypeError(f"{self.machine.rule}.update: 'if' on a per-number value; use where(condition, a, b).")


class Symbol:
    """A plain number that is not known yet: a hyper-parameter, `t`, or what is made of them.

    Only the tracer makes these. `text` is the Python expression that computes the number; all symbols of
    one trace share `memory`, which gives every distinct expression one name.
    """

    __slots__ = ("memory", "text")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, memory: Any, text: str):
        self.memory = memory
        self.text = text

    def _make(self, form: str, *parts: Any) -> Any:
        if any(isinstance(part, Number) for part in parts):
            return NotImplemented
        return Symbol(self.memory, self.memory.name(form.format(*(spell(x) for x in parts))))

    def __add__(self, other: Any) -> Any:
        return self._make("{} + {}", self, other)

    def __radd__(self, other: Any) -> Any:
        return self._make("{} + {}", other, self)

    def __sub__(self, other: Any) -> Any:
        return self._make("{} - {}", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._make("{} - {}", other, self)

    def __mul__(self, other: Any) -> Any:
        return self._make("{} * {}", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._make("{} * {}", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self._make("{} / {}", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._make("{} / {}", other, self)

    def __pow__(self, other: Any) -> Any:
        return self._make("{} ** {}", self, other)

    def __rpow__(self, other: Any) -> Any:
        return self._make("{} ** {}", other, self)

    def __neg__(self) -> Any:
        return self._make("-{}", self)

    def __abs__(self) -> Any:
        return self._make("abs({})", self)

    def __lt__(self, other: Any) -> Any:
        return self._make("{} < {}", self, other)

    def __le__(self, other: Any) -> Any:
        return self._make("{} <= {}", self, other)

    def __gt__(self, other: Any) -> Any:
        return self._make("{} > {}", self, other)

    def __ge__(self, other: Any) -> Any:
        return self._make("{} >= {}", self, other)

    def __eq__(self, other: object) -> Any:
        return self._make("{} == {}", self, other)

    def __ne__(self, other: object) -> Any:
        return self._make("{} != {}", self, other)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"{self.memory.rule}.update: 'if' on {self.memory.spelt(self.text)}, which changes from step to "
            "step; use where(condition, a, b)."
        )


def spell(value: Any) -> str:
    """The Python expression for a symbol or a plain number."""
    if isinstance(value, Symbol):
        return value.text
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return f"({value!r})" if value < 0 else repr(value)


class Becomes:
    """The new value of the parameter, for a rule that does more than add a change to it."""

    __slots__ = ("value",)

    def __init__(self, value: Number):
        self.value = value


Value = TypeVar("Value", Number, float)


def _scalar_sqrt(x: float) -> float:
    # `** 0.5` is what torch.optim uses for its bias corrections; math.sqrt may differ in the last bit.
    return x**0.5 if x >= 0 else math.nan


def _scalar_larger(a: float, b: float) -> float:
    return a if a != a or a >= b else b


def _scalar_smaller(a: float, b: float) -> float:
    return a if a != a or a <= b else b


def _scalar_sign(x: float) -> float:
    return float((x > 0) - (x < 0)) if x == x else x


def _scalar_log(x: float) -> float:
    return math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan)


def _scalar_as_stored(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def _scalar_select(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


SCALAR_WORDS: dict[str, Callable[..., float]] = {
    "sqrt": _scalar_sqrt,
    "exp": math.exp,
    "log": _scalar_log,
    "sign": _scalar_sign,
    "larger": _scalar_larger,
    "smaller": _scalar_smaller,
    "as_stored": _scalar_as_stored,
    "select": _scalar_select,
}


def _apply(word: str, first: Any, *rest: Any) -> Any:
    """A word on whatever it is given: a Number, a Symbol or a plain number."""
    if isinstance(first, Number):
        operands = (x.handle if isinstance(x, Number) else x for x in rest)
        return Number(first.machine, first.machine.emit(word, first.handle, *operands))
    symbols = [x for x in (first, *rest) if isinstance(x, Symbol)]
    if not symbols:
        return SCALAR_WORDS[word](first, *rest)
    memory = symbols[0].memory
    return Symbol(memory, memory.name(f"{word}({', '.join(spell(x) for x in (first, *rest))})"))


def sqrt(x: Value) -> Value:
    """√x."""
    return _apply("sqrt", x)


def exp(x: Value) -> Value:
    """eˣ."""
    return _apply("exp", x)


def log(x: Value) -> Value:
    """The natural logarithm of x."""
    return _apply("log", x)


def sign(x: Value) -> Value:
    """-1, 0 or 1."""
    return _apply("sign", x)


def as_stored(x: float) -> float:
    """A plain number, rounded to the precision that per-tensor slots are kept in."""
    return _apply("as_stored", x)


def larger(a: Value, b: Value | float) -> Value:
    """The larger of a and b; not a number if either is not."""
    return _apply("larger", b, a) if isinstance(b, Number) else _apply("larger", a, b)


def smaller(a: Value, b: Value | float) -> Value:
    """The smaller of a and b; not a number if either is not."""
    return _apply("smaller", b, a) if isinstance(b, Number) else _apply("smaller", a, b)


def clamp(x: Number, low: float, high: float) -> Number:
    """X, moved into the range from low to high."""
    return _apply("clamp", x, low, high)


def where(condition: Any, a: Any, b: Any) -> Any:
    """A where the condition holds, b elsewhere; the condition may be per number or a plain truth."""
    numbers = [x for x in (condition, a, b) if isinstance(x, Number)]
    if not numbers:
        return _apply("select", condition, a, b)
    if isinstance(condition, bool):
        return a if condition else b
    machine = numbers[0].machine
    operands = (x.handle if isinstance(x, Number) else x for x in (condition, a, b))
    return Number(machine, machine.emit("where", *operands))


def lerp(a: Number, b: Number, weight: float) -> Number:
    """A + weight · (b - a)."""
    return _apply("lerp", a, b, weight)


def ema(old: Number, new: Number, beta: float) -> Number:
    """β · old + (1 - β) · new: the exponential moving average."""
    return lerp(old, new, 1 - beta)


def ema_sq(old: Number, x: Number, beta: float) -> Number:
    """β · old + (1 - β) · x²: the exponential moving average of squares."""
    return old * beta + (1 - beta) * x * x


def mean(x: Number) -> Number:
    """The mean over the whole tensor."""
    return _apply("mean", x)


def norm(x: Number) -> Number:
    """The Euclidean norm of the whole tensor."""
    return _apply("norm", x)


def largest(x: Number) -> Number:
    """The largest entry of the whole tensor."""
    return _apply("largest", x)


def becomes(value: Number) -> Becomes:
    """Returned by `update` in place of a change: the parameter becomes this value."""
    return Becomes(value)


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):
        raise AttributeError(name)
    near = difflib.get_close_matches(name, __all__, 1)
    if not near:
        raise AttributeError(f"steprule.words has no word '{name}'. The words are {', '.join(__all__)}.")
    # Not AttributeError, whose text `from steprule.words import …` throws away.
    raise ImportError(f"steprule.words has no word '{name}'. Did you mean '{near[0]}'?")
