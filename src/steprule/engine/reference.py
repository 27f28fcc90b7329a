"""The definition of every rule: `update` carried out on tensors, one parameter at a time.

Nothing is traced and nothing is shared between parameters, so this runner is slow, differentiable and easy
to believe; every other runner is held against it. Half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steprule.engine import storage
from steprule.engine.compose import Hyper, Slots, Update, Worn, one_step
from steprule.engine.fields import Slot, scalar_dtype
from steprule.words import Number


def _add_scaled(a: Tensor, b: Tensor, w: Any) -> Tensor:
    return torch.add(a, b, alpha=w)


def _addcmul(a: Tensor, b: Tensor, c: Tensor, w: Any) -> Tensor:
    return torch.addcmul(a, b, c, value=w)


def _exponential(x: Tensor, w: Any) -> Tensor:
    return torch.pow(w, x)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum().sqrt()


def _as_stored(x: Tensor) -> Tensor:
    return x.to(scalar_dtype()).to(x.dtype)


def _larger(a: Tensor, b: Any) -> Tensor:
    return torch.maximum(a, b) if isinstance(b, Tensor) else torch.clamp(a, min=b)


def _smaller(a: Tensor, b: Any) -> Tensor:
    return torch.minimum(a, b) if isinstance(b, Tensor) else torch.clamp(a, max=b)


WORDS: dict[str, Callable[..., Any]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "sign": torch.sign,
    "exp": torch.exp,
    "log": torch.log,
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
    "lerp": torch.lerp,
    "larger": _larger,
    "smaller": _smaller,
    "clamp": torch.clamp,
    "less": torch.lt,
    "less_equal": torch.le,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "as_stored": _as_stored,
    "mean": torch.mean,
    "norm": _norm,
    "largest": torch.amax,
}


class Eager:
    """Carries words out at once, on tensors."""

    __slots__ = ("dtype", "rule")

    def __init__(self, rule: str, dtype: torch.dtype):
        self.rule = rule
        self.dtype = dtype

    def emit(self, word: str, *operands: Any) -> Any:
        """One word on tensors and plain numbers."""
        if word == "where":
            return self.where(*operands)
        return WORDS[word](*operands)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """Choose per number, or at once where the condition is a plain truth."""
        if not isinstance(condition, Tensor):
            chosen, other = (a, b) if condition else (b, a)
            return chosen if isinstance(chosen, Tensor) else torch.full_like(other, chosen)
        # torch would give two plain numbers its default dtype.
        a, b = (x if isinstance(x, Tensor) else condition.new_tensor(x, dtype=self.dtype) for x in (a, b))
        return torch.where(condition, a, b)


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones; anything else as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def compute_dtype(param: Tensor) -> torch.dtype:
    """The precision that a step of this parameter is computed in."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def as_plain(value: Any, machine: Eager, live: bool) -> Any:
    """A hyper-parameter as `update` sees it: a double, or a Number where it must stay on the tape."""
    if isinstance(value, tuple):
        return tuple(as_plain(entry, machine, live) for entry in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, Tensor):
        # A tensor lr keeps its own precision through the scalars, as it does in torch.
        return Number(machine, value.reshape(())) if live else value.detach().reshape(())
    return value


def run(
    rule: Any,
    update: Update,
    worn: Worn,
    group: dict[str, Any],
    param: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    t: Any,
) -> None:
    """One step of `update` on one parameter, in place."""
    dtype = compute_dtype(param)
    machine = Eager(rule.__name__, dtype)
    live = bool(group.get("differentiable"))
    h = Hyper(
        machine.rule,
        rule.fields,
        {k: as_plain(group[k], machine, live) for k, f in rule.fields.items() if k in group and not f.free},
    )
    slots: dict[str, Slot] = {k: v for k, v in rule.slots.items() if v.key in state}

    def load(tensor: Tensor) -> Number:
        return Number(machine, real(tensor).to(dtype))

    numbers: dict[str, Any] = {}
    for letter, slot in slots.items():
        once = slot.per_tensor and not live
        numbers[letter] = state[slot.key].item() if once else load(storage.load(state, slot.key))
    s = Slots(machine, rule.slots, numbers)
    # A differentiable step keeps old values on the tape, so the parameter must not alias them.
    p = load(param.clone() if live else storage.load_parameter(param, state))
    t = Number(machine, t) if isinstance(t, Tensor) else t
    new = one_step(update, worn, h, p, load(gradient), s, t)
    _store_state(s, slots, state, live)
    if param.dtype in storage.HALF and not live:
        storage.store_parameter(param, state, new.handle)
    else:
        real(param).copy_(new.handle)
    storage.next_keys(state)


def _store_state(s: Slots, slots: dict[str, Slot], state: dict[str, Any], live: bool) -> None:
    values = {slots[letter].key: s.numbers[letter] for letter in sorted(s.written)}
    values = {k: v.handle if isinstance(v, Number) else v for k, v in values.items()}
    for key, value in values.items():
        if isinstance(value, Tensor) and any(value is stored for stored in state.values()):
            values[key] = value.clone()  # one slot took over another's old value
    for key, value in values.items():
        if isinstance(value, Tensor) and live and not state[key].is_complex():
            state[key] = value.to(state[key].dtype)
        elif isinstance(value, Tensor) and state[key].is_complex():
            real(state[key]).copy_(value)
        elif isinstance(value, Tensor):
            storage.store(state, key, value)
        else:
            state[key].fill_(value)
