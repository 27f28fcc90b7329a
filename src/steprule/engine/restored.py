"""A saved state, brought to how the optimizer that loads it keeps its slots.

That is what its own groups say. A slot for which neither side asks anything keeps the dtype in which it was
saved, whatever the parameter's is. Fewer bits are rounded to nearest: this happens once, so there is no drift
that random rounding would have to prevent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from steprule.engine import storage
from steprule.engine.fields import Slot


def convert(
    slot: Slot, param: Tensor, state: dict[str, Any], saved_group: dict[str, Any], group: dict[str, Any]
) -> tuple[str, str] | None:
    """Convert one slot in place. What it was and what it is now, or None if nothing had to be done."""
    if slot.per_tensor or not storage.holds(state, slot.key):
        return None
    there, here = (storage.kind_for(slot, param, x) for x in (saved_group, group))
    stored: Tensor = state[storage.entry_of(state, slot.key)]
    asked = there or here or slot.key in storage.rounded_at_random(state)
    if not asked and stored.dtype not in storage.CODES:
        return None
    dtype = storage.dtype_for(slot, param, here)
    if stored.dtype == dtype:
        return None
    storage.recode(state, slot, dtype)
    return _shown(stored.dtype), _shown(dtype)


def follow(slots: Iterable[Slot], param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
    """Convert a state to what its group asks for now, if that changed between steps.

    Where it asks for nothing, all stays. Returns the parameter's value if that is to be stored in another way.
    """
    for slot in slots:
        kind = None if slot.per_tensor else storage.kind_for(slot, param, group)
        if kind is not None and storage.holds(state, slot.key):
            dtype = storage.dtype_for(slot, param, kind)
            if state[storage.entry_of(state, slot.key)].dtype != dtype:
                storage.recode(state, slot, dtype)
    beside = storage.beside_parameter(param, group)
    others = [key for key in storage.BESIDE.values() if key in state and key != beside]
    if beside is None or not others:
        return None
    value = storage.load_parameter(param, state)
    for key in others:
        del state[key]
    return value


def _shown(dtype: torch.dtype) -> str:
    return f"{dtype} (8-bit codes)" if dtype in storage.CODES else str(dtype)
