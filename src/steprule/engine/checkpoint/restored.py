"""Converts a loaded state to the storage that the optimizer's own groups ask for.

A slot for which neither the checkpoint nor the group asks for a format keeps the dtype in which it was saved,
whatever the parameter's dtype is. Conversion to fewer bits rounds to nearest: it happens only once, so there is
no drift that random rounding would have to prevent.
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
    """Convert one slot in place. Returns its old and its new dtype, or None if there was nothing to do."""
    if slot.per_tensor or not storage.holds(state, slot.key):
        return None
    there, here = (storage.kind_for(slot, param, x) for x in (saved_group, group))
    stored: Tensor = state[storage.entry_of(state, slot.key)]
    asked = there or here or slot.key in storage.rounded_at_random(state)
    if not asked and stored.dtype not in storage.CODES:
        return None
    dtype = storage.dtype_for(slot, param, here)
    older = storage.is_older(state, slot.key)
    if stored.dtype == dtype and not older:
        return None
    storage.recode(state, slot, dtype)
    return _shown(stored.dtype, older), _shown(dtype)


def follow(
    slots: Iterable[Slot], param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> dict[str, Any] | None:
    """Convert a state to what its group and the parameter's dtype ask for now, if they were changed.

    If the group asks for nothing, the state stays as it is. Returns the entries that hold a part of the
    parameter's value, if that has to be stored in another way; they are no longer in the state.
    """
    for slot in slots:
        kind = None if slot.per_tensor else storage.kind_for(slot, param, group)
        if kind is not None and storage.holds(state, slot.key):
            dtype = storage.dtype_for(slot, param, kind)
            if state[storage.entry_of(state, slot.key)].dtype != dtype:
                storage.recode(state, slot, dtype)
    beside, half = storage.beside_parameter(param, group), param.dtype in storage.HALF
    if half and "compensation" in state:
        state["compensation"] = state["compensation"].to(param.dtype)
    others = [key for key in storage.BESIDE.values() if key in state and key != beside]
    if not others or (beside is None and half):
        return None
    return {key: state.pop(key) for key in others}


def _shown(dtype: torch.dtype, older: bool = False) -> str:
    if dtype not in storage.CODES:
        return str(dtype)
    return f"{dtype} ({'older ' * older}8-bit codes)"
