"""Weight decay as users give it: how much and which kind. The kinds are modifiers, in `modifiers/decay.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steprule import errors
from steprule.engine.composition import PEAK_LR, Hyper
from steprule.engine.fields import Field
from steprule.engine.runners.eager import Eager
from steprule.words import Number

# The kinds of weight decay, by mode.
MODES: dict[str, Any] = {}


class Own:
    """Weight decay that is a part of the rule's own formula, so that nothing is added to it."""

    name = ""
    mode = "own"
    remembers_lr = False


def of_group(rule: Any, group: Mapping[str, Any]) -> Any | None:
    """The kind of weight decay that a group of this rule has; None if it is zero or the rule has none."""
    strength = group.get("weight_decay", 0)
    if rule.decay_default is None or (not isinstance(strength, Tensor) and strength == 0):
        return None
    decoupled = group.get("decoupled_weight_decay")
    usual = {None: rule.decay_default, True: "decoupled", False: "l2"}[decoupled]
    mode = group.get("weight_decay_mode", usual)
    return Own if mode == "own" else MODES[mode]


def check_mode(who: str, group: Mapping[str, Any], index: int | None, name: str = "weight_decay_mode") -> None:
    """Refuse a mode that does not exist."""
    mode = group.get("weight_decay_mode")
    if mode is not None and mode not in MODES:
        raise errors.out_of_range(who, name, mode, "one of " + ", ".join(MODES), index)


def remember_lr(who: str, group: dict[str, Any], index: int) -> None:
    """Where the kind of decay needs it, keep the lr that the group was made with."""
    kind = MODES.get(group.get("weight_decay_mode", ""))
    if kind is not None and kind.remembers_lr:
        given = group.get(PEAK_LR.name, group["lr"])
        group[PEAK_LR.name] = float(PEAK_LR.check(who, given, index))


class WeightDecay:
    """How much weight decay and which kind; accepted wherever `weight_decay=` takes a number.

    weight_decay: λ, at least 0. weight_decouple: shrink the parameter itself (True) or add λ·θ to the
    gradient (False). absolute: a decoupled decay of λ per step rather than lr·λ. mode: the kind by name, in
    place of these two; it may also be
        "independent": λ·lr/peak_lr per step, which follows the schedule but not the size of lr;
        "corrected": λ·lr²/peak_lr per step (AdamC), for layers that are followed by a normalization;
        "cautious": decoupled, and only where the change does not move away from zero.
    peak_lr is a key of the group: the lr that it was made with.

    Called as `decay(param, grad, group)` inside `step_param`, it decays and returns the gradient to use;
    the group's own `weight_decay` and mode win over the object's, so they survive a checkpoint.
    """

    def __init__(
        self,
        weight_decay: float = 0.0,
        weight_decouple: bool = True,
        absolute: bool = False,
        mode: str | None = None,
    ):
        check_mode("WeightDecay", {"weight_decay_mode": mode}, None, "mode")
        if mode is not None and (absolute or not weight_decouple):
            raise errors.contradiction(
                "WeightDecay", f"mode={mode!r}", "weight_decouple or absolute", "Leave those out."
            )
        self._mode = mode
        check = Field(0.0, name="weight_decay", at_least=0).check
        self.weight_decay: float = check("WeightDecay", weight_decay, None)
        self.weight_decouple = weight_decouple
        self.absolute = absolute
        if absolute and not weight_decouple:
            raise errors.contradiction(
                "WeightDecay",
                "absolute=True",
                "weight_decouple=False",
                "L2 decay goes through the gradient and always scales with lr.",
            )

    @property
    def mode(self) -> str:
        """`l2`, `decoupled`, `absolute`, or the one that was given."""
        if self._mode is not None:
            return self._mode
        return "l2" if not self.weight_decouple else "absolute" if self.absolute else "decoupled"

    def defaults(self) -> dict[str, Any]:
        """What goes into the parameter group."""
        return {"weight_decay": self.weight_decay}

    def __call__(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """Decay `param` in place, or return a new gradient that includes the decay."""
        strength = group.get("weight_decay", self.weight_decay)
        if strength == 0:
            return grad
        kind = MODES[group.get("weight_decay_mode", self.mode)]
        machine = Eager("WeightDecay", param.dtype)
        h = Hyper("WeightDecay", {}, {**group, "weight_decay": float(strength)})
        with torch.no_grad():
            p, g = Number(machine, param), Number(machine, grad)
            if hasattr(kind, "gradient"):
                return kind.gradient(h, p, g, None, None).handle
            param.copy_(kind.parameter(h, p, None, None, None).handle)
        return grad

    def __repr__(self) -> str:
        if self._mode is not None:
            return f"WeightDecay({self.weight_decay}, mode={self._mode!r})"
        return (
            f"WeightDecay({self.weight_decay}, weight_decouple={self.weight_decouple}, "
            f"absolute={self.absolute})"
        )
