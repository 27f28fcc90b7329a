"""What words are applied to: the numbers of elements, rows and columns, and plain numbers not known yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NoReturn, Protocol, Self

from steprule import rule_errors
from steprule.levels import finest


class Machine(Protocol):
    """What carries out words: a runner's table, or the tracer that records them."""

    rule: str
    # Whether that rule sees a stack of matrices in a tensor of more than two dimensions.
    stacked: bool
    # Whether the rule of the group works on whole matrices.
    on_matrices: bool

    def emit(self, word: str, *operands: Any) -> Any:
        """Carry out one word on handles and plain numbers, and return the new handle."""
        ...

    def reduce(self, word: str, operand: Any, over: str) -> Any:
        """What a handle comes to: a Number for each row or column, or one plain number for more."""
        ...

    def whole(self, word: Any, operands: Sequence[Any], form: str) -> Any:
        """Carry out a word on whole matrices, given as handles, and plain numbers. form: of its result."""
        ...

    def level_of(self, handle: Any) -> str:
        """What has one value each of what a handle stands for."""
        ...

    def draw(self, word: str) -> Any:
        """A random number for every element, another at each call."""
        ...

    def fact(self, name: str) -> Any:
        """The parameter's size, its number of rows or columns or its epsilon, as a plain number."""
        ...

    def is_matrix(self) -> bool:
        """Whether the parameter has two dimensions or more."""
        ...

    def plain(self, value: Any) -> Any:
        """The value as a plain number. Raises: TypeError if it is not one."""
        ...


class Number:
    """One value per element of a tensor: what `p`, `g` and the slots are inside `update`.

    Products are kept unevaluated until they are used, so that a sum can fuse with the product on its
    right. `product` is (w, b, c) for `w * b * c`; w or c may be None.
    """

    __slots__ = ("_handle", "machine", "product")
    __hash__ = None  # type: ignore[assignment]
    # The names of all words, for messages, and a word that builds on this module.
    words: ClassVar[Sequence[str]] = ()
    product_of_matrices: ClassVar[Callable[[Number, Number], Number]]

    def __init__(self, machine: Machine, handle: Any, product: tuple[Any, Any, Any] | None = None):
        self.machine = machine
        self._handle = handle
        self.product = product

    @classmethod
    def of(cls, value: Number) -> Self:
        """The same value, of this class."""
        return cls(value.machine, value._handle, value.product)

    @property
    def handle(self) -> Any:
        """The evaluated value, as the machine knows it."""
        if self._handle is None and self.product is not None:
            w, b, c = self.product
            value = b if w is None else self.machine.emit("scale", b, w)
            self._handle = value if c is None else self.machine.emit("mul", value, c)
        return self._handle

    @property
    def level(self) -> str:
        """What has one value each; asking does not evaluate a product."""
        if self._handle is None and self.product is not None:
            return finest(self.machine.level_of(x) for x in self.product[1:] if x is not None)
        return self.machine.level_of(self.handle)

    def _word(self, word: str, *operands: Any) -> Number:
        return Number(self.machine, self.machine.emit(word, self.handle, *operands))

    def _with(self, word: str, other: Any) -> Number:
        return self._word(word, operand(self.machine, other))

    def _compared(self, word: str, other: Any) -> Condition:
        return Condition(self.machine, self._with(word, other).handle)

    def _plus(self, other: Number, sign: int) -> Number:
        """`self + other` or `self - other`, fused with the product on the right if there is one."""
        if other.product is None:
            return self._word("add" if sign > 0 else "sub", other.handle)
        w, b, c = other.product
        w = float(sign) if w is None else (w if sign > 0 else -w)
        return self._word("add_scaled", b, w) if c is None else self._word("addcmul", b, c, w)

    def __add__(self, other: Number | float) -> Number:
        return self._plus(other, 1) if isinstance(other, Number) else self._with("shift", other)

    def __radd__(self, other: float) -> Number:
        return self._with("shift", other)

    def __sub__(self, other: Number | float) -> Number:
        if isinstance(other, Number):
            return self._plus(other, -1)
        return self._word("shift", -operand(self.machine, other))

    def __rsub__(self, other: float) -> Number:
        return self._word("neg")._with("shift", other)

    def __mul__(self, other: Number | float) -> Number:
        if not isinstance(other, Number):
            return self._with("scale", other)
        if self.product is not None and self.product[2] is None:
            return Number(self.machine, None, (self.product[0], self.product[1], other.handle))
        return Number(self.machine, None, (None, self.handle, other.handle))

    def __rmul__(self, other: float) -> Number:
        return Number(self.machine, None, (operand(self.machine, other), self.handle, None))

    def __truediv__(self, other: Number | float) -> Number:
        return self._with("div" if isinstance(other, Number) else "divide", other)

    def __rtruediv__(self, other: float) -> Number:
        return self._word("reciprocal")._with("scale", other)

    def __pow__(self, other: Number | float) -> Number:
        return self._with("power", other)

    def __rpow__(self, other: float) -> Number:
        return self._with("exponential", other)

    def __matmul__(self, other: Number) -> Number:
        return Number.product_of_matrices(self, other)

    def __neg__(self) -> Number:
        return self._word("neg")

    def __abs__(self) -> Number:
        return self._word("abs")

    def __lt__(self, other: Number | float) -> Number:
        return self._compared("less", other)

    def __le__(self, other: Number | float) -> Number:
        return self._compared("less_equal", other)

    def __gt__(self, other: Number | float) -> Number:
        return self._compared("greater", other)

    def __ge__(self, other: Number | float) -> Number:
        return self._compared("greater_equal", other)

    def __eq__(self, other: Number | float) -> Number:  # type: ignore[override]
        return self._compared("equal", other)

    def __ne__(self, other: Number | float) -> Number:  # type: ignore[override]
        return self._compared("not_equal", other)

    def __bool__(self) -> NoReturn:
        raise rule_errors.truth_of_a_value(self.machine.rule)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or name in Number.__slots__:
            raise AttributeError(name)
        raise rule_errors.no_such_method(self.machine.rule, name, Number.words)


class Condition(Number):
    """A comparison: 1 where it holds and 0 elsewhere, which alone is not a change that a rule can return."""

    __slots__ = ()


class Parameter(Number):
    """The parameter, as it is given to `update`; `p - x` and `p -= x` make a new value of it, `Moved`."""

    __slots__ = ()

    def __add__(self, other: Number | float) -> Number:
        return Moved.of(super().__add__(other))

    def __radd__(self, other: Number | float) -> Number:
        return Moved.of(other + Number.of(self))

    def __sub__(self, other: Number | float) -> Number:
        result = super().__sub__(other)
        # The difference of two values of the parameter is a change.
        return result if isinstance(other, Parameter) else Moved.of(result)

    def __iadd__(self, other: Number | float) -> Moved:
        return Moved.of(self + other)

    def __isub__(self, other: Number | float) -> Moved:
        return Moved.of(self - other)

    def __imul__(self, other: Number | float) -> Moved:
        return Moved.of(self * other)

    def __itruediv__(self, other: Number | float) -> Moved:
        return Moved.of(self / other)


class Moved(Parameter):
    """The parameter plus or minus something, which is not a change that a rule can return."""

    __slots__ = ()


# What Python calls them in its own messages.
Condition.__name__ = Parameter.__name__ = Moved.__name__ = "Number"


def operand(machine: Machine, value: Any) -> Any:
    """A Number or a plain number, as a machine takes it."""
    if isinstance(value, Number):
        return value.handle
    return value if type(value) is float else machine.plain(value)


class Symbol:
    """A plain number that is not known yet: a hyper-parameter, `t`, a sum, or what is made of them.

    Only the tracer makes these. `text` is the Python expression that computes the number; all symbols of
    one trace share `memory`, which gives every distinct expression one name. `truth`: it is a comparison.
    `level`: what has one such number each. `stage`: how many sweeps over memory must come before it.
    """

    __slots__ = ("level", "memory", "stage", "text", "truth")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, memory: Any, text: str, truth: bool = False, level: str = "all", stage: int = 0):
        self.memory = memory
        self.text = text
        self.truth = truth
        self.level = level
        self.stage = stage

    def _make(self, form: str, *parts: Any, truth: bool = False) -> Any:
        if any(isinstance(part, Number) for part in parts):
            return NotImplemented
        texts = [spell_number(self.memory, part) for part in parts]
        return symbol_of(self.memory, form.format(*texts), parts, truth)

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
        return self._make(self._power(other), self, other)

    def __rpow__(self, other: Any) -> Any:
        return self._make(self._power(other), other, self)

    def _power(self, other: Any) -> str:
        late = self.stage or (isinstance(other, Symbol) and other.stage)
        return "power({}, {})" if late else "{} ** {}"

    def __mod__(self, other: Any) -> Any:
        return self._make("{} % {}", self, other)

    def __rmod__(self, other: Any) -> Any:
        return self._make("{} % {}", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self._make("{} // {}", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._make("{} // {}", other, self)

    def __neg__(self) -> Any:
        return self._make("-{}", self)

    def __abs__(self) -> Any:
        return self._make("abs({})", self)

    def __lt__(self, other: Any) -> Any:
        return self._make("{} < {}", self, other, truth=True)

    def __le__(self, other: Any) -> Any:
        return self._make("{} <= {}", self, other, truth=True)

    def __gt__(self, other: Any) -> Any:
        return self._make("{} > {}", self, other, truth=True)

    def __ge__(self, other: Any) -> Any:
        return self._make("{} >= {}", self, other, truth=True)

    def __eq__(self, other: object) -> Any:
        return self._make("{} == {}", self, other, truth=True)

    def __ne__(self, other: object) -> Any:
        return self._make("{} != {}", self, other, truth=True)

    def __bool__(self) -> bool:
        return self.memory.decide(self)


def symbol_of(memory: Any, text: str, parts: Iterable[Any], truth: bool = False) -> Symbol:
    """The symbol of an expression that is made of these parts."""
    symbols = [part for part in parts if isinstance(part, Symbol)]
    level = finest(part.level for part in symbols)
    return Symbol(memory, memory.name(text), truth, level, max((part.stage for part in symbols), default=0))


def spell(value: Any) -> str:
    """The Python expression for a symbol or a plain number."""
    if isinstance(value, Symbol):
        return value.text
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return f"({value!r})" if value < 0 else repr(value)


def spell_number(memory: Any, value: Any) -> str:
    """The same as an operand, for which a comparison counts as 1 or 0."""
    if isinstance(value, Symbol) and value.truth:
        # A boolean table on a device cannot be subtracted.
        return memory.name(f"select({value.text}, 1, 0)")
    return spell(memory.plain(value))


class Becomes:
    """The new value of the parameter, for a rule that does more than add a change to it."""

    __slots__ = ("value",)

    def __init__(self, value: Number | float):
        self.value = value
