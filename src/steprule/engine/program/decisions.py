"""Which program a parameter steps with, where conditions on plain numbers decide it before the step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from steprule.engine import lines, views
from steprule.engine.program.program import Program
from steprule.engine.sharding.parts import shape_of

# Asked for at every step of every parameter, and the same each time.
_facts = lru_cache(maxsize=4096)(lines.facts)


def chosen(
    program: Program, group: Mapping[str, Any], param: Tensor, state: Mapping[str, Any], t: Any
) -> Program:
    """The program of a parameter's next step.

    program: the group's. t: the number of that step.
    """
    own = program.of(param)
    while own.decision is not None:
        double = param.dtype == torch.float64
        shape = views.of(group, param).shape(shape_of(param, state))
        numbers: dict[str, Any] = {**_facts(tuple(shape), double, own.decision.facts)}
        for letter, slot in own.scalar_slots.items():
            numbers[letter] = float(group[slot.key]) if slot.shared else state[slot.key].item()
        own = own.decision.holds if own.decision.function(group, t, numbers) else own.decision.fails
    return own
