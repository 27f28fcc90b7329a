"""Options that have no effect on these parameters, each explained in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule.engine import lines, storage

NAMES = {dtype: name for name, dtype in storage.DTYPES.items()} | {torch.float64: "fp64"}


def without_effect(optimizer: Any, group: dict[str, Any]) -> list[str]:
    """What a group asks for but does not get."""
    params: list[Tensor] = [p for p in group["params"] if not is_lazy(p)]
    low = group.get("low_precision")
    lines: list[str] = []
    if low not in (None, "none"):
        lines += _said(low, params, lambda p: p.dtype not in storage.HALF)
    for kind, slots in _asked(optimizer, group).items():
        lines += _of_state_dtype(kind, slots, params)
    lines += _created_before(optimizer, group, params)
    asked = group.get("state_dtype")
    if isinstance(asked, dict):
        absent = [
            slot
            for slot in optimizer.composition(group).slots.values()
            if slot.key in asked and not slot.exists(group)
        ]
        lines += [f"{asked[x.key]}: {x.when} is off, so there is no {x.key}" for x in absent]
    elif asked is not None and not _asked(optimizer, group):
        lines.append(f"{asked}: there are no slots that it could be used for")
    if group.get("capturable") and params and all(p.device.type == "cpu" for p in params):
        lines.append("capturable: parameters are on the CPU, nothing to do")
    return lines


def _asked(optimizer: Any, group: dict[str, Any]) -> dict[str, list[Any]]:
    """The slots of this group for each kind that `state_dtype` asks for."""
    found: dict[str, list[Any]] = {}
    kinds = {lines.is_matrix(p.shape) for p in group["params"] if not is_lazy(p)}
    for slot in optimizer.composition(group).slots.values():
        there = slot.exists(group) and any(map(slot.fits, kinds))
        kind = storage.kind_of(slot, group) if there else None
        if kind is not None:
            found.setdefault(kind, []).append(slot)
    return found


def _of_state_dtype(kind: str, slots: list[Any], params: list[Tensor]) -> list[str]:
    lines: list[str] = []
    if kind == "int8":
        small = [p for p in params if p.numel() < storage.SMALLEST and not p.is_complex()]
        lines += _stays(kind, small, f"of fewer than {storage.SMALLEST:,} elements ")
    elif kind != "bf16":  # bf16 has an effect on bf16 parameters, too: it rounds at random
        lines += _said(kind, params, lambda p: p.dtype == storage.DTYPES[kind])
    return lines + _stays(kind, [p for p in params if p.is_complex()], "")


def _said(option: str, params: list[Tensor], idle: Callable[[Tensor], bool]) -> list[str]:
    """One line about the parameters on which an option has no effect."""
    found = list(filter(idle, params))
    if not found:
        return []
    who = "parameters" if len(found) == len(params) else _count(found)
    return [f"{option}: {who} {_are(found) if who != 'parameters' else 'are'} {_dtypes(found)}, nothing to do"]


def _stays(kind: str, params: list[Tensor], which: str) -> list[str]:
    if not params:
        return []
    return [f"{kind}: {_count(params)} {which}stay{'s' * (len(params) == 1)} {_dtypes(params)}"]


def _created_before(optimizer: Any, group: dict[str, Any], params: list[Tensor]) -> list[str]:
    """Slots that exist in another form than the group asks for now."""
    lines: dict[str, int] = {}
    for param in params:
        state = optimizer.state.get(param, {})
        for slot in optimizer.composition(group).slots.values():
            kind = storage.kind_for(slot, param, group)
            if kind is None or not storage.holds(state, slot.key):
                continue
            dtype = state[storage.entry_of(state, slot.key)].dtype
            if dtype != storage.dtype_for(slot, param, kind):
                line = f"{kind}: {slot.key} was created as {NAMES.get(dtype, 'int8')} and stays that way"
                lines[line] = lines.get(line, 0) + 1
    return [f"{line}, for {n} parameter{'s' * (n > 1)}" for line, n in lines.items()]


def _count(params: list[Tensor]) -> str:
    return f"{len(params)} parameter{'s' * (len(params) != 1)}"


def _are(params: list[Tensor]) -> str:
    return "is" if len(params) == 1 else "are"


def _dtypes(params: list[Tensor]) -> str:
    return " or ".join(dict.fromkeys(NAMES.get(p.dtype, str(p.dtype).removeprefix("torch.")) for p in params))
