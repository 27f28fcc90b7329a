"""Whether a kernel can step a parameter: the kind and the memory of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine import blocks, lines, storage
from steprule.engine.blocks import Region
from steprule.engine.program.program import Program
from steprule.engine.runners.kernels import printing
from steprule.engine.runners.kernels.counters import KINDS, keys_of
from steprule.engine.sharding.parts import region_in

_OWN_DISPATCH = cast(Any, Tensor).__torch_dispatch__


def why_not(program: Program, param: Tensor, gradient: Tensor, state: Mapping[str, Any]) -> str | None:
    """Why the kernel of a program cannot step this parameter, or None."""
    whole = program.matrices.slots.values() if program.matrices is not None else ()
    if missing := [slot.key for slot in whole if slot.key not in state]:
        return f"it has no state '{missing[0]}'"
    slots = slots_of(program, state)
    reason = _odd_tensors(program, param, gradient, slots)
    if reason is None and program.lined:
        reason = _odd_lines(program, param)
    if reason is None and not param.is_contiguous():
        reason = _odd_order(program, slots, state, region_in(state))
    return reason or _no_count(keys_of(program, state), state) or _odd_storage(program, param, state)


def slots_of(program: Program, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a program's slots, or of their codes, by letter."""
    return {x: state[storage.entry_of(state, slot.key)] for x, slot in program.slots.items()}


def _odd_tensors(program: Program, param: Tensor, gradient: Tensor, slots: Mapping[str, Tensor]) -> str | None:
    tensors = {"the parameter": param, "its gradient": gradient}
    tensors |= {f"its state '{program.slots[x].key}'": value for x, value in slots.items()}
    lined = [slots[x] for x, slot in program.slots.items() if slot.per != "element"]
    for name, tensor in tensors.items():
        if _wrapped(tensor):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.layout != torch.strided:
            return f"{name} is sparse"
        if tensor.is_neg() or tensor.is_conj():
            return f"{name} has a lazy sign (is_neg, is_conj)"
        if tensor.device != param.device:
            return f"{name} is on {tensor.device}"
        if tensor.numel() and not tensor.data_ptr():
            return f"{name} has no memory of its own"
        if any(tensor is x for x in lined):
            if not tensor.is_contiguous():
                return f"{name} has gaps in memory"
            continue
        if tensor.shape != param.shape:
            return f"{name} has another shape than the parameter"
        if not _ordered_as(tensor, param):
            return f"{name} has another memory layout than the parameter"
    if not _dense(param):
        return "the parameter's elements have gaps between them in memory"
    return printing.why_not({name: tensor.dtype for name, tensor in tensors.items()})


def _odd_lines(program: Program, param: Tensor) -> str | None:
    """Why a kernel cannot find the rows and columns of a parameter, or None."""
    if not param.numel():
        return "it has rows or columns without elements"
    if program.stacked and param.dim() > 2:
        return f"it is a stack of matrices ({param.dim()} dimensions), and kernels take one matrix"
    by_column = any(slot.per == "column" for slot in program.slots.values())
    rows = lines.fact(param.shape, "rows", stacked=False)
    if not param.is_contiguous() and (by_column or (rows > 1 and param.stride(0) * rows != param.numel())):
        return "its rows are not one after the other in memory"
    return None


def _in_lines(program: Program, region: Region) -> bool:
    """Whether a part of a tensor has one stretch of each line, and for rows, all lines in order."""
    part = blocks.part_of(blocks.layout(region.whole), region)
    return part is not None and (len(part.runs) < 2 or not program.lined)


def _odd_order(
    program: Program, slots: Mapping[str, Tensor], state: Mapping[str, Any], region: Region | None
) -> str | None:
    """Why elements must lie in memory row by row, or None."""
    if program.matrices is not None:
        return "words on whole matrices take its elements row by row"
    if any(x.dtype in printing.CODED for x in slots.values()):
        return "the neighbours that share a scale are not neighbours in memory"
    if storage.NOISE_KEY in state:
        return "its elements are not in memory in the order in which random numbers are drawn"
    if region is not None and (storage.SLOT_KEY in state or "rounding_key" in state):
        return "its elements are not in memory in the order in which they are rounded at random"
    sums = (x for sweep in program.passes for x in sweep.reductions)
    in_order = region is not None or program.lined
    if in_order and any(x.word != "largest" and x.operand.level == "element" for x in sums):
        return "its elements are not in memory in the order in which they are added up"
    return None


def _no_count(keys: Sequence[str], state: Mapping[str, Any]) -> str | None:
    """Why what is kept once per tensor cannot be read and written as memory, or None."""
    for key in keys:
        count = state[key]
        if not isinstance(count, Tensor) or count.numel() != 1 or count.dtype not in KINDS:
            return f"its state '{key}' is not a single float32 or float64"
        if _wrapped(count) or count.is_neg() or count.data_ptr() % count.itemsize:
            return f"its state '{key}' has no plain memory of its own"
    return None


def _odd_storage(program: Program, param: Tensor, state: Mapping[str, Any]) -> str | None:
    """Why what is kept next to the slots cannot be used as it is, or None."""
    region = region_in(state)
    if region is not None and not _in_lines(program, region):
        return "its part of the whole tensor is in pieces"
    for key, value in state.items():
        if key in storage.EXTRA_KEYS or key.endswith("_scale"):
            if _wrapped(value) or value.is_neg():
                return f"its state '{key}' has no plain memory of its own"
            beside = storage.of_bytes(value) if key == "low_bits" else value
            fits = beside.shape == param.shape and _ordered_as(beside, param)
            if key in ("compensation", "low_bits") and not fits:
                return f"its state '{key}' has another memory layout than the parameter"
            if key.endswith("_scale") and not value.is_contiguous():
                return f"its state '{key}' is not contiguous"
    return None


def _ordered_as(tensor: Tensor, param: Tensor) -> bool:
    """Whether a tensor of the same shape has its elements in the same order."""
    # Of a side of length 1, the stride says nothing.
    return (tensor.is_contiguous() and param.is_contiguous()) or tensor.stride() == param.stride()


def _wrapped(tensor: Tensor) -> bool:
    """Whether the tensor's operations are not torch's own, as a DTensor's are."""
    kind: Any = type(tensor)
    return kind.__torch_dispatch__ is not _OWN_DISPATCH


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True
