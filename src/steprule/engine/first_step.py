"""What the first step shows: a missing curvature; updates and state of 16-bit parameters that round away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steprule import curvature_errors, errors
from steprule.engine import notices, storage
from steprule.engine.runners.kernels.forms import has_elements
from steprule.engine.sharding import parts

SAMPLE = 1 << 16
TOO_MANY = 0.5


class Watch:
    """Compares the first elements of a group's largest 16-bit parameter before and after a step."""

    def __init__(self, group: dict[str, Any]):
        self.group = group
        half = [p for p in group["params"] if p.dtype in storage.HALF and _has_dense(p)]
        self.param: Tensor | None = max(half, key=Tensor.numel, default=None)
        self.narrow: Tensor | None = max(
            (p for p in half if p.dtype == torch.float16), key=Tensor.numel, default=None
        )
        if self.param is not None:
            self.before = _sample(self.param.detach()).clone()
            self.moving = _sample(self.param.grad) != 0
        if self.narrow is not None:
            self.sloped = _sample(self.narrow.grad) != 0

    def too_early(self, optimizer: Any) -> bool:
        """Whether the step was one that moves no parameter, as the rule says."""
        steps = [optimizer.state[p].get("step") for p in (self.param, self.narrow) if p is not None]
        moves = optimizer.rule_of(self.group).first_step_moves
        return not moves and any(count is not None and count <= 1 for count in steps)

    def messages(self, optimizer: Any) -> list[str]:
        """The warnings, after the step."""
        who, found = optimizer.who(self.group), list[str]()
        plain = self.group.get("low_precision") is None and self.group.get("lr", 1) != 0
        if self.param is not None and plain:
            lost = _fraction(_sample(self.param.detach()) == self.before, self.moving)
            if lost > TOO_MANY:
                name = optimizer.name_of(self.param)
                found.append(errors.updates_round_away(who, name, self.param.dtype, lost))
        if self.narrow is not None:
            for key, slot in _divisors(optimizer, self.group, self.narrow):
                lost = _fraction(_sample(slot) == 0, self.sloped)
                if lost > TOO_MANY:
                    name = optimizer.name_of(self.narrow)
                    found.append(errors.state_rounds_away(who, key, name, slot.dtype, lost))
        return found


def look_for_curvature(optimizer: Any, group: dict[str, Any]) -> bool:
    """Warn if the first step of a rule with `estimate` uses no curvature; whether a parameter could show it.

    Once: to look at every step would make the host wait for the device.
    """
    own = optimizer.composition(group)
    program = optimizer.program(group)
    # What steps read and never write is what estimates write.
    read, written = program.all_slots, program.written
    keys = [slot.key for x, slot in own.rule.slots.items() if x in read and x not in written]
    for param in group["params"]:
        gradient = param.grad
        if gradient is None or group.get("lr") == 0 or not has_elements(param) or not gradient.any():
            continue
        state = optimizer.state_of(param, group)
        # Codes of 8 bits show it, too: that of zero is 0.
        estimated = any(state[storage.entry_of(state, key)].any() for key in keys)
        if not estimated and float(state.get("step", 0)) == 0:
            notices.warn(curvature_errors.no_curvature(optimizer.who(group), optimizer.name_of(param)))
        return True
    return False


def _divisors(optimizer: Any, group: dict[str, Any], param: Tensor) -> list[tuple[str, Tensor]]:
    """The fp16 slots that a step writes and divides by."""
    state = optimizer.state.get(param, {})
    own = optimizer.composition(group)
    written = optimizer.program(group).of(param).outputs
    slots = [own.slots[letter].key for letter in written if letter in own.slots]
    never_negative = {slot.key for slot in own.slots.values() if slot.never_negative}
    kept = [(key, state[key]) for key in slots if key in never_negative and key in state]
    return [(key, x) for key, x in kept if x.dtype == torch.float16 and x.shape == param.shape]


def _has_dense(param: Tensor) -> bool:
    gradient = param.grad
    fits = gradient is not None and gradient.layout == param.layout and gradient.shape == param.shape
    return fits and has_elements(param)


def _fraction(which: Tensor, of: Tensor) -> float:
    return float((which & of).sum() / of.sum()) if of.any() else 0.0


def _sample(tensor: Any) -> Tensor:
    """The first elements; of a sharded tensor, those in this process."""
    local: Tensor = tensor.to_local() if parts.sharded(tensor) else tensor
    return local.reshape(-1)[:SAMPLE]
