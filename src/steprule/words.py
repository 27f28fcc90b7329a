"""The words that step rules are written in.

A rule is plain mathematics on single numbers: `+ - * / **`, comparisons, and the words below. Each word
means the same in every runner, down to the rounding:

* `a + w * b` (a number added to the product on its *right*) is one fused multiply-add, rounded once; so is
  `a + w * b * c`. Any other product is rounded before it is used. `x * w` with the plain number last is
  rounded at once.
* `ema(old, new, beta)` is `lerp(old, new, 1 - beta)`; `ema_sq(old, x, beta)` scales, then multiply-adds.
* What is made only of hyper-parameters and `t` is a plain number, computed in double precision.
* A comparison counts as 1 where it holds and as 0 elsewhere.
* Every value has a level: an element, a row or a column, a tensor, a parameter group, or all parameters of the
  optimizer. What is made of two levels has the finer one; a row with a column makes elements.
* `total`, `mean`, `norm` and `largest` make one plain number of a whole tensor, of a group (`over="group"`) or
  of all parameters (`over="all"`). It goes wherever a hyper-parameter does.
* The same words make one value of each row (`over="row"`) or column (`over="column"`), in double precision. It
  stays so as long as it meets only values like it and plain numbers, and is rounded once where it meets an
  element. Over the columns of values per row (or the rows of values per column) they make a plain number.
* A row is what has one first index, and a column is what has the same other indices. A rule that says
  `matrices = "stacked"` has the rows and columns of the last two dimensions. A vector is one row, and each of
  its elements is a column.
* `gaussian()` and `coin()` draw a random number for every element, another at each call. What draws them has a
  hyper-parameter `seed`, a whole number. The numbers depend on the seed, the parameter's position, the step and
  the element, and on nothing else: not on torch's seed, the runner, or how many processes train the model.
* `size(p)`, `rows(p)` and `columns(p)` are plain numbers; an empty tensor has one of each. So is `epsilon(p)`,
  the step from 1 to the next number in the precision of p. `is_matrix(p)`, for two dimensions and more, may
  decide an `if`.

These are the roundings of torch's own operations, so that the results equal torch.optim's.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar, overload

from steprule import rule_errors
from steprule.levels import OVER, reduced
from steprule.plain import DOUBLE_WORDS, SCALAR_WORDS, Double
from steprule.values import Becomes, Machine, Number, Symbol, operand, spell_number, symbol_of

__all__ = [
    "Becomes",
    "Number",
    "as_stored",
    "atan2",
    "becomes",
    "clamp",
    "coin",
    "columns",
    "ema",
    "ema_sq",
    "epsilon",
    "exp",
    "gaussian",
    "is_matrix",
    "larger",
    "largest",
    "lerp",
    "log",
    "mean",
    "norm",
    "rows",
    "sign",
    "size",
    "smaller",
    "sqrt",
    "total",
    "where",
]

Number.words = __all__
Value = TypeVar("Value", Number, float)


def _apply(word: str, *operands: Any) -> Any:
    """A word on Numbers, Symbols or plain numbers."""
    for given in operands:
        if isinstance(given, Number):
            machine = given.machine
            return Number(machine, machine.emit(word, *(operand(machine, x) for x in operands)))
    for given in operands:
        if isinstance(given, Symbol):
            texts = [spell_number(given.memory, x) for x in operands]
            return symbol_of(given.memory, f"{word}({', '.join(texts)})", operands)
    for given in operands:
        # A hyper-parameter that is a tensor has `item`, and so do numpy's numbers.
        if not isinstance(given, Real) and not hasattr(given, "item"):
            raise rule_errors.no_operand(word, given)
    words = DOUBLE_WORDS if any(isinstance(x, Double) for x in operands) else SCALAR_WORDS
    return words[word](*operands)


def _lifted(value: Any, like: Any) -> Any:
    """A plain number as a Number if another operand is one; a Number unchanged."""
    if isinstance(value, Number) or not isinstance(like, Number):
        return value
    return _apply("where", 1.0, value, like)


def sqrt(x: Value) -> Value:
    """√x."""
    return _apply("sqrt", x)


def exp(x: Value) -> Value:
    """eˣ."""
    return _apply("exp", x)


def log(x: Value) -> Value:
    """The natural logarithm of x."""
    return _apply("log", x)


def atan2(y: Any, x: Any) -> Any:
    """The angle of the point (x, y), from -π to π."""
    return _apply("atan2", y, x)


def sign(x: Value) -> Value:
    """-1, 0 or 1."""
    return _apply("sign", x)


def as_stored(x: float) -> float:
    """A plain number, rounded to the precision that per-tensor slots are kept in."""
    return _apply("as_stored", x)


def larger(a: Value, b: Value | float) -> Value:
    """The larger of a and b; NaN if either is."""
    return _apply("larger", b, a) if isinstance(b, Number) else _apply("larger", a, b)


def smaller(a: Value, b: Value | float) -> Value:
    """The smaller of a and b; NaN if either is."""
    return _apply("smaller", b, a) if isinstance(b, Number) else _apply("smaller", a, b)


def clamp(x: Any, low: Any, high: Any) -> Any:
    """Move x into the range from low to high."""
    if isinstance(x, Number) and not isinstance(low, Number) and not isinstance(high, Number):
        return _apply("clamp", x, low, high)
    return smaller(larger(x, low), high)


def where(condition: Any, a: Any, b: Any) -> Any:
    """Take a where the condition holds, b elsewhere; each may be per element or a plain number."""
    if isinstance(condition, Symbol) and not condition.truth:
        # In double: a number that float32 cannot hold is not 0.
        condition = condition != 0
    if any(isinstance(x, Number) for x in (condition, a, b)):
        return _apply("where", condition, a, b)
    if isinstance(condition, Symbol):
        memory = condition.memory
        texts = (condition.text, spell_number(memory, a), spell_number(memory, b))
        return symbol_of(memory, f"select({', '.join(texts)})", (condition, a, b))
    return _apply("select", condition, a, b)


def lerp(a: Any, b: Any, weight: Any) -> Any:
    """Interpolate: a + weight · (b - a)."""
    like = next((x for x in (a, b, weight) if isinstance(x, Number)), None)
    if like is None:
        return a + weight * (b - a)
    return _apply("lerp", _lifted(a, like), _lifted(b, like), weight)


def ema(old: Any, new: Any, beta: Any) -> Any:
    """β · old + (1 - β) · new: the exponential moving average."""
    return lerp(old, new, 1 - beta)


def ema_sq(old: Any, x: Any, beta: Any) -> Any:
    """β · old + (1 - β) · x²: the exponential moving average of squares."""
    return old * beta + (1 - beta) * x * x


Over: TypeAlias = Literal["tensor", "row", "column", "matrix", "group", "all"]


def _reduce(word: str, x: Any, over: Over) -> Any:
    allowed = [over for over in OVER if over != "matrix" or (isinstance(x, Number) and x.machine.on_matrices)]
    if over not in allowed:
        raise rule_errors.no_such_level(word, over, allowed)
    if isinstance(x, Double) or (isinstance(x, Symbol) and x.stage):
        raise rule_errors.reduced_twice(word, "tensor", over)
    if not isinstance(x, Number):
        raise rule_errors.reduced_plain_number(word)
    if reduced(x.level, over) is None:
        raise rule_errors.reduced_twice(word, x.level, over)
    return x.machine.reduce(word, x.handle, over)


@overload
def total(x: Number, over: Literal["tensor", "group", "all"] = "tensor") -> float: ...
@overload
def total(x: Number, over: Literal["row", "column", "matrix"]) -> Any: ...
def total(x: Number, over: Over = "tensor") -> Any:
    """The sum over the tensor, each row, each column, all tensors of the group, or all parameters."""
    return _reduce("total", x, over)


@overload
def mean(x: Number, over: Literal["tensor", "group", "all"] = "tensor") -> float: ...
@overload
def mean(x: Number, over: Literal["row", "column", "matrix"]) -> Any: ...
def mean(x: Number, over: Over = "tensor") -> Any:
    """The mean over the tensor, each row, each column, all tensors of the group, or all parameters."""
    return _reduce("mean", x, over)


@overload
def norm(x: Number, over: Literal["tensor", "group", "all"] = "tensor") -> float: ...
@overload
def norm(x: Number, over: Literal["row", "column", "matrix"]) -> Any: ...
def norm(x: Number, over: Over = "tensor") -> Any:
    """The Euclidean norm of the tensor, each row, each column, all tensors of the group, or all parameters."""
    return _reduce("norm", x, over)


@overload
def largest(x: Number, over: Literal["tensor", "group", "all"] = "tensor") -> float: ...
@overload
def largest(x: Number, over: Literal["row", "column", "matrix"]) -> Any: ...
def largest(x: Number, over: Over = "tensor") -> Any:
    """The largest element of the tensor, each row, each column, all tensors of the group, or all parameters."""
    return _reduce("largest", x, over)


def _machine_of(word: str, p: Any) -> Machine:
    if not isinstance(p, Number):
        raise rule_errors.fact_of_no_parameter(word)
    return p.machine


def size(p: Number) -> float:
    """The number of elements of the parameter."""
    return _machine_of("size", p).fact("size")


def rows(p: Number) -> float:
    """The number of rows of the parameter: 1 for a vector."""
    return _machine_of("rows", p).fact("rows")


def columns(p: Number) -> float:
    """The number of columns of the parameter: its size for a vector."""
    return _machine_of("columns", p).fact("columns")


def epsilon(p: Number) -> float:
    """How far the next number is from 1 in the precision that steps of the parameter are computed in."""
    return _machine_of("epsilon", p).fact("epsilon")


def is_matrix(p: Number) -> bool:
    """Whether the parameter has two dimensions or more, which may decide an `if`."""
    return _machine_of("is_matrix", p).is_matrix()


class _Step(threading.local):
    machine: Machine | None = None


_step = _Step()


@contextmanager
def step_by(machine: Machine) -> Generator[None]:
    """Within this, random numbers are drawn by this machine."""
    before, _step.machine = _step.machine, machine
    try:
        yield
    finally:
        _step.machine = before


def _drawn(word: str) -> Number:
    if _step.machine is None:
        raise rule_errors.drawn_outside_of_a_step(word)
    return Number(_step.machine, _step.machine.draw(word))


def gaussian() -> Number:
    """A random number for every element, of the normal distribution with mean 0 and variance 1."""
    return _drawn("gaussian")


def coin() -> Number:
    """1 or -1 for every element, at random."""
    return _drawn("coin")


def becomes(value: Number | float) -> Becomes:
    """Returned by `update` in place of a change: the parameter becomes this value."""
    return Becomes(value)


def __getattr__(name: str) -> NoReturn:
    if name.startswith("_"):
        raise AttributeError(name)
    raise rule_errors.no_such_word(name, __all__)
