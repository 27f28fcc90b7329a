"""The machine that carries words out at once, on tensors.

A value per row or column is `Lined`: a tensor in double precision, with one element for each, that broadcasts
to the parameter. Where it meets an element, it is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from steprule import matrix_errors, rule_errors
from steprule.engine import lines
from steprule.engine.blocks import Region
from steprule.engine.draws import Draws
from steprule.engine.fields import scalar_dtype
from steprule.engine.program import sums
from steprule.engine.views import AS_IT_IS
from steprule.levels import SIDES, finest, reduced
from steprule.plain import Double
from steprule.values import Number
from steprule.whole import MatrixWord


def _add_scaled(a: Tensor, b: Tensor, w: Any) -> Tensor:
    return torch.add(a, b, alpha=w)


def _addcmul(a: Tensor, b: Tensor, c: Tensor, w: Any) -> Tensor:
    return torch.addcmul(a, b, c, value=w)


def _exponential(x: Tensor, w: Any) -> Tensor:
    return torch.pow(w, x)


def _atan2(y: Any, x: Any) -> Tensor:
    like = y if isinstance(y, Tensor) else x
    return torch.atan2(*(z if isinstance(z, Tensor) else like.new_tensor(z) for z in (y, x)))


def _lerp(a: Tensor, b: Tensor, weight: Any) -> Tensor:
    return torch.lerp(a, b, weight.to(a.dtype) if isinstance(weight, Tensor) else weight)


def _as_stored(x: Tensor) -> Tensor:
    return x.to(scalar_dtype()).to(x.dtype)


def _larger(a: Tensor, b: Any) -> Tensor:
    return torch.maximum(a, b) if isinstance(b, Tensor) else torch.clamp(a, min=b)


def _smaller(a: Tensor, b: Any) -> Tensor:
    return torch.minimum(a, b) if isinstance(b, Tensor) else torch.clamp(a, max=b)


def _clamp(x: Tensor, low: Any, high: Any) -> Tensor:
    if isinstance(low, Tensor) == isinstance(high, Tensor):
        return torch.clamp(x, low, high)
    return _smaller(_larger(x, low), high)


MOST = torch.finfo(torch.float32).max
WORDS: dict[str, Callable[..., Any]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "sign": torch.sign,
    "exp": torch.exp,
    "log": torch.log,
    "atan2": _atan2,
    "reciprocal": torch.reciprocal,
    "shift": torch.add,
    "scale": torch.mul,
    "divide": torch.div,
    "power": torch.pow,
    "exponential": _exponential,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "add_scaled": _add_scaled,
    "addcmul": _addcmul,
    "lerp": _lerp,
    "larger": _larger,
    "smaller": _smaller,
    "clamp": _clamp,
    "less": torch.lt,
    "less_equal": torch.le,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "as_stored": _as_stored,
}


def in_range(number: float, dtype: torch.dtype) -> float:
    """A number as elements of this dtype have it: infinite beyond their range, where torch would raise."""
    most = MOST if dtype == torch.float32 else math.inf
    return math.copysign(math.inf, number) if abs(number) > most else number


class Lined(NamedTuple):
    """One value per row, per column, per matrix of a stack, or per element of a matrix of another form."""

    tensor: Tensor
    level: str


class SumsOverSeveral(Protocol):
    """What gives sums over several tensors."""

    def of(self, owner: str, word: str, x: Tensor, over: str, region: Region | None) -> Double:
        """The next one; x is this region of the parameter."""
        ...


class Eager:
    """Carries words out at once, on tensors.

    live: autograd records what is done. shared: what gives sums over several tensors. shape: the parameter's.
    parts: 2 for complex numbers. on_matrices: the rule works on whole matrices.
    region: which part of the whole parameter this is. as_torch: the rule whose sums are taken as torch takes
    them. draws: what gives random numbers.
    """

    __slots__ = (
        *("as_torch", "draws", "dtype", "live", "on_matrices", "parts", "region", "rule", "shape"),
        *("shared", "stacked", "view"),
    )

    def __init__(
        self,
        rule: str,
        dtype: torch.dtype,
        live: bool = False,
        shared: SumsOverSeveral | None = None,
        shape: Sequence[int] = (),
        parts: int = 1,
    ):
        self.rule = rule
        self.dtype = dtype
        self.live = live
        self.shared = shared
        self.shape = shape
        self.parts = parts
        self.stacked = False
        self.on_matrices = False
        self.view = AS_IT_IS
        self.region: Region | None = None
        self.as_torch: str | None = None
        self.draws: Draws | None = None

    def emit(self, word: str, *operands: Any) -> Any:
        """Carry out one word on tensors and plain numbers."""
        if any(type(x) is Lined for x in operands):
            return self._emit_lined(word, operands)
        if word == "where":
            return self.where(*operands)
        return WORDS[word](*map(self.counted, operands))

    def _emit_lined(self, word: str, operands: Sequence[Any]) -> Any:
        """The same where an operand is per row or column."""
        level = finest(self.level_of(x) for x in operands if isinstance(x, (Tensor, Lined)))
        machine = self if level in SIDES else Eager(self.rule, self.lined_dtype)
        tensors = [x.tensor if isinstance(x, Lined) else x for x in operands]
        wide = [
            x if not isinstance(x, Tensor) or x.dtype == torch.bool else x.to(machine.dtype) for x in tensors
        ]
        if level != "element":
            return Lined(machine.emit(word, *wide), level)
        return machine.emit(word, *_full(wide))

    @property
    def lined_dtype(self) -> torch.dtype:
        """The precision of values per row or column."""
        return self.dtype if self._as_torch else torch.float64

    @property
    def _as_torch(self) -> bool:
        return self.as_torch is not None and self.rule == self.as_torch

    def whole(self, word: MatrixWord, operands: Sequence[Any], form: str) -> Any:
        """Carry out a word on whole matrices at once."""
        if not lines.is_matrix(self.shape):
            raise matrix_errors.whole_matrices_in(self.rule, word.name, vectors=True)
        tensors = [x.tensor if isinstance(x, Lined) else self.counted(x) for x in operands]
        made = word.made(tensors, form, self.shape).to(self.dtype)
        return made if form == "element" else Lined(made, form)

    def level_of(self, handle: Any) -> str:
        """What has one value each."""
        if isinstance(handle, Lined):
            return handle.level
        return "tensor" if not handle.dim() and self.shape else "element"

    def draw(self, word: str) -> Tensor:
        """A random number for every element."""
        if self.draws is None:
            raise rule_errors.drawn_outside_of_a_step(word)
        drawn = self.draws.next(self.rule, word, self.dtype)
        return self.view.matrices(drawn) if self.on_matrices else drawn

    def fact(self, name: str) -> float:
        """The parameter's size, its rows or its columns, or its epsilon."""
        if name == "epsilon":
            return lines.epsilon(self.dtype == torch.float64)
        return lines.fact(self.shape, name, self.stacked, self.parts)

    def is_matrix(self) -> bool:
        """Whether the parameter has two dimensions or more."""
        return lines.is_matrix(self.shape)

    def reduce(self, word: str, operand: Any, over: str) -> Any:
        """A Number for each row or column, or a plain number that is made of a tensor, or of several."""
        if over in ("row", "column", "matrix"):
            return self._along(word, operand, over)
        x = self.counted(operand)
        if self.on_matrices and self.region is not None:
            x = self.view.back(x, self.region.shape)
        if over != "tensor" and self.shared is not None:
            return self.shared.of(self.rule, word, x, over, self.region)
        if self._as_torch and not self.live:
            return Double(sums.as_torch(word, x, None).item())
        if self.live:
            return Number(self, sums.on_tape(word, x))
        return Double(sums.finished(word, [sums.partial(word, x, self.region)]))

    def _along(self, word: str, operand: Any, over: str) -> Any:
        """A reduction of each row or column; of one value for each of them, a plain number unless stacked."""
        x = self.counted(operand.tensor if isinstance(operand, Lined) else operand)
        along = lines.dimensions(self.shape, over, self.stacked)
        if over == "row" and x.dim() > len(self.shape):
            along = (*along, len(self.shape))  # the two parts of complex numbers
        made = (sums.as_torch if self._as_torch else sums.along)(word, x, along)
        level = reduced(self.level_of(operand), over) or over
        if self.on_matrices or level != "matrix" or made.numel() != 1:
            return Number(self, Lined(made, level))
        return Number(self, made.reshape(()).to(self.dtype)) if self.live else Double(made.item())

    def plain(self, value: Any) -> Any:
        """A plain number unchanged, even if it is held in a tensor."""
        if type(value) in (int, Double) or (isinstance(value, Tensor) and value.dim() == 0):
            return value
        if not isinstance(value, Real):
            raise rule_errors.no_operand(f"{self.rule}.update", value)
        return float(value)

    def counted(self, value: Any) -> Any:
        """A comparison as 1 or 0, a number that elements cannot have as infinite; anything else unchanged."""
        if isinstance(value, float):
            return in_range(value, self.dtype)
        return value.to(self.dtype) if isinstance(value, Tensor) and value.dtype == torch.bool else value

    def where(self, condition: Any, a: Any, b: Any) -> Tensor:
        """Choose per element, or once for all if the condition is a plain boolean."""
        a, b = self.counted(a), self.counted(b)
        if not isinstance(condition, Tensor):
            chosen, other = (a, b) if condition else (b, a)
            if not isinstance(chosen, Tensor):
                return torch.full_like(other, chosen)
            if not isinstance(other, Tensor) or chosen.dim() >= other.dim():
                return chosen
            return chosen.to(self.dtype).expand_as(other).clone()
        # torch would give two plain numbers its default dtype.
        a, b = (x if isinstance(x, Tensor) else condition.new_tensor(x, dtype=self.dtype) for x in (a, b))
        return torch.where(condition if condition.dtype == torch.bool else condition != 0, a, b)


def _full(operands: Sequence[Any]) -> list[Any]:
    """The operands with a value for each element, in one order of memory: else torch may round differently.

    Single numbers, such as a tensor lr, stay so.
    """
    tensors = [x for x in operands if isinstance(x, Tensor)]
    shape = cast(Any, torch).broadcast_shapes(*(x.shape for x in tensors))
    like = next((x for x in tensors if x.shape == shape), None)
    like = tensors[0].new_empty(shape) if like is None else like
    return [
        torch.empty_like(like, dtype=x.dtype).copy_(x)
        if isinstance(x, Tensor) and x.dim() and x.shape != shape
        else x
        for x in operands
    ]
