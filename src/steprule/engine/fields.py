"""What a rule declares: hyper-parameters with a range, slots with a checkpoint key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import index
from typing import Any, cast

import torch

from steprule import errors
from steprule.engine import lines, views
from steprule.engine.sharding import parts
from steprule.plain import SCALAR_WORDS

# The key under which a group with nonfinite="skip" counts its skipped steps.
SKIPPED_STEPS = "skipped_steps"
# Keys that schedulers and this library put into groups; no hyper-parameter may have such a name.
TAKEN_KEYS = frozenset(
    {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum"}
    | {"max_momentum", "swa_lr", "weight_decay_mode", "param_shapes", SKIPPED_STEPS, views.KEY}
)
# torch's switches. Not every rule of torch has each of them; groups hold the same keys as torch's.
FLAGS = ("maximize", "foreach", "capturable", "differentiable", "fused")
# Options that torch's rules do not have: a group has them only if they were given.
OPTIONS = ("modifiers", "state_dtype", "low_precision", "nonfinite")


@dataclass(frozen=True)
class Field:
    """A hyper-parameter: its default, its range, what it means.

    search: the smallest and the largest value to try when it is tuned.
    """

    default: Any
    name: str = ""
    type: str = "float"
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] | None = None
    switch: bool = False
    positional: bool = True
    free: bool = False
    decay: str | None = None
    not_decoupled: str | None = None
    search: tuple[float, float] | None = None
    meaning: str = ""

    @property
    def static(self) -> bool:
        """Whether `if h.name:` is decided when the program is built."""
        return self.switch or isinstance(self.default, bool) or self.choices is not None

    @property
    def allowed(self) -> str:
        """The range in words."""
        if self.free:
            return "None, or as its meaning says"
        if self.choices is not None:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        if isinstance(self.default, bool):
            return "True or False"
        bounds = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        words = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
        kind = {"int": "a whole number", "bool | None": "True, False or None"}.get(self.type, "")
        return " and ".join(words) or kind or "a finite number"

    def check(self, who: str, value: Any, group: int | None) -> Any:
        """The value as the group stores it; raises an error that says what is allowed."""
        if self.free:
            return value  # checked where it is used, against the slots that it names
        if self.choices is not None:
            if value not in self.choices:
                raise errors.out_of_range(who, self.name, value, self.allowed, group)
            return value
        if self.type in ("bool", "bool | None"):
            return self._check_boolean(who, value, group)
        if value is None and ("None" in self.type or self.default is None):
            return value
        if isinstance(self.default, tuple):
            return self._check_tuple(who, value, group)
        return self._check_number(who, self.name, value, group)

    def _check_boolean(self, who: str, value: Any, group: int | None) -> bool | None:
        if value is None:
            return None if self.type == "bool | None" else False
        try:
            # torch takes 0, 1 and numpy's booleans, too; text is more likely a mistake.
            if value in (True, False):
                return bool(value)
        except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several
            pass
        raise errors.wrong_type(who, self.name, value, self.allowed, group)

    def _check_tuple(self, who: str, value: Any, group: int | None) -> Any:
        defaults = cast(tuple[Any, ...], self.default)
        length = len(defaults)
        if type(value) in (str, bytes, dict) or not hasattr(value, "__getitem__"):
            raise errors.wrong_type(who, self.name, value, f"{length} numbers", group)
        # Configuration libraries pass lists of their own types, and arrays.
        entries = tuple(cast("Iterable[Any]", value))
        if len(entries) != length:
            raise errors.out_of_range(who, self.name, value, f"{length} numbers", group)
        return tuple(
            entry
            if entry is None and default is None
            else self._check_number(who, f"{self.name}[{i}]", entry, group)
            for i, (entry, default) in enumerate(zip(entries, defaults, strict=True))
        )

    def _check_number(self, who: str, what: str, value: Any, group: int | None) -> Any:
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise errors.tensor_not_one_element(who, what, value.shape, group)
            if value.is_complex():
                raise errors.wrong_type(who, what, value, "a real number", group)
            number: float = value.detach().item()
        else:
            value = number = self._plain(who, what, value, group)
        inside = (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )
        if not inside:
            raise errors.out_of_range(who, what, value, self.allowed, group)
        if not math.isfinite(number):
            allowed = self.allowed if self.allowed == "a finite number" else f"{self.allowed} and finite"
            raise errors.out_of_range(who, what, value, allowed, group)
        if self.type in ("int", "int | None") and number != int(number):
            raise errors.wrong_type(who, what, value, "a whole number", group)
        return value

    def _plain(self, who: str, what: str, value: Any, group: int | None) -> float:
        """A Python number for any kind of number; strings and booleans are refused."""
        if type(value) is int and abs(value) < 2**1000:
            return value
        try:
            if isinstance(value, (bool, str, bytes)):
                raise TypeError
            if "int" in self.type and type(value) is not int and hasattr(value, "__index__"):
                return index(value)
            return float(value)
        except (TypeError, ValueError):
            raise errors.wrong_type(who, what, value, "a number", group) from None
        except OverflowError:
            raise errors.out_of_range(who, what, value, self.allowed, group) from None

    def named(self, name: str, type_text: str) -> Field:
        """The field with the name and type that it has in the class body."""
        return replace(self, name=name, type=type_text)


class Parameter:
    """The start of a slot that begins as a copy of the parameter; `parameter` is the only one."""

    def __repr__(self) -> str:
        return "parameter"


parameter = Parameter()


class Identity:
    """The start of a slot that begins as the identity matrix; `identity` is the only one."""

    def __repr__(self) -> str:
        return "identity"


identity = Identity()
# Slots of such parameters keep 32 bits if they are copies, since differences to these are small, and if words
# on whole matrices use them, which need them and take little memory per row or column.
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Slot:
    """State that a rule keeps: one number per element, row, column, tensor or group, or one for all parameters.

    only: "matrices" or "vectors", if the others have none. up_to: the hyper-parameter that says how long a side
    may be that has one of each pair. stacked: for rows and columns, as in `lines`. on_matrices: it is one of a
    rule on whole matrices.
    """

    key: str
    when: str | None = None
    starts: float | str | Parameter | Identity = 0.0
    per: str = "element"
    never_negative: bool = False
    not_in_8_bits: str | None = None
    subtracted_from: str | None = None
    only: str | None = None
    up_to: str | None = None
    letter: str = ""
    stacked: bool = False
    on_matrices: bool = False

    @property
    def per_tensor(self) -> bool:
        """Whether each parameter has one number of it."""
        return self.per == "tensor"

    @property
    def of_pairs(self) -> bool:
        """Whether it has one value for each pair of rows, or of columns."""
        return self.per in ("left", "right")

    @property
    def has_elements(self) -> bool:
        """Whether each parameter has a tensor of it, with one element per element, row, column or pair."""
        return not self.shared and not self.per_tensor

    def fits(self, matrix: bool) -> bool:
        """Whether a parameter that is a matrix, or is not, has it."""
        return self.only is None or matrix == (self.only == "matrices")

    @property
    def shared(self) -> bool:
        """Whether parameters share it, so that it is in the groups."""
        return self.per in ("group", "all")

    def start(self, group: Mapping[str, Any]) -> float:
        """Its first value in this group."""
        given: Any = group[self.starts] if isinstance(self.starts, str) else self.starts
        return given.detach().item() if isinstance(given, torch.Tensor) else given

    def exists(self, group: dict[str, Any]) -> bool:
        """Whether this group's options need the slot."""
        return self.when is None or bool(group[self.when])

    def dtype_for(self, param: torch.Tensor) -> torch.dtype:
        """The slot's precision, where nobody asks for another one."""
        whole = self.on_matrices and self.has_elements and self.per != "element"
        wide = whole or self.starts is parameter
        return torch.float32 if wide and param.dtype in HALF else param.dtype

    def shape_for(self, param: torch.Tensor, group: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The slot's shape for this parameter of a group; None where the parameter has no such slot."""
        if self.shared or not self.fits(lines.is_matrix(param.shape)):
            return None
        if self.per_tensor:
            return ()
        if self.per == "element":
            return tuple(param.shape)
        shape = lines.shape_per(views.of(group, param).shape(param.shape), self.per, self.stacked)
        too_long = self.up_to is not None and shape[-1] > group[self.up_to]
        return None if too_long else shape

    def create(
        self, param: torch.Tensor, group: dict[str, Any], dtype: torch.dtype | None = None
    ) -> torch.Tensor | None:
        """The slot with its initial value, in the parameter's dtype unless another is given."""
        shape = self.shape_for(param, group)
        if shape is None:
            return None
        dtype = dtype or self.dtype_for(param)
        if self.starts is parameter:
            return param.detach().to(self.dtype_for(param), copy=True)
        if self.starts is identity:
            made = torch.eye(shape[-1], dtype=dtype, device=param.device).expand(shape)
            return parts.full(param, shape, dtype, made) if parts.sharded(param) else made.clone()
        given = group[self.starts] if isinstance(self.starts, str) else self.starts
        start = self.start(group)
        if self.per_tensor:
            state = torch.tensor(start, dtype=scalar_dtype(), device="cpu")
        elif self.per != "element" and parts.sharded(param):
            state = parts.full(param, shape, dtype, torch.full(shape, start, dtype=dtype))
        elif self.per != "element":
            state = param.new_full(shape, start, dtype=dtype)
        else:
            state = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
            # A complex number counts as two real ones, so both parts start at the value.
            (torch.view_as_real(state) if state.is_complex() else state).fill_(start)
        if isinstance(given, torch.Tensor) and given.requires_grad and group.get("differentiable"):
            return torch.zeros_like(state) + given.reshape(())
        return state


def _as_stored(x: float) -> float:
    return torch.tensor(float(x), dtype=scalar_dtype(), device="cpu").item()


SCALAR_WORDS["as_stored"] = _as_stored


def scalar_dtype() -> torch.dtype:
    """The dtype of step counts and other per-tensor values, as in torch.optim."""
    double = torch.get_default_dtype() == torch.float64
    return torch.float64 if double else torch.float32


def counts_on_device(group: Mapping[str, Any]) -> bool:
    """Whether step counts are on the device, where steps that are captured or may be skipped can count."""
    return bool(group.get("capturable") or group.get("fused"))


def make_step_counter(device: torch.device | str = "cpu") -> torch.Tensor:
    """A step count of zero; on the CPU, as in torch.optim, unless it has to be where the parameter is."""
    if str(device) == "cpu":
        # As a fake tensor, this keeps its value; torch.zeros would not.
        return torch.tensor(0.0, dtype=scalar_dtype(), device="cpu")
    return torch.zeros((), dtype=scalar_dtype(), device=device)
