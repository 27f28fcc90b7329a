"""Whether a parameter and its state can be stepped, checked before anything moves.

A state can come from anywhere: users put entries into `optimizer.state[p]`, and models change under it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine import blocks, storage
from steprule.engine.fields import Slot

SIZE = "delete optimizer.state[p] of a resized parameter"
DEVICE = "call optimizer.to(device) after moving the model"
VALUE = "use load_state_dict, or delete optimizer.state[p] to start over"

CLONE = "clone it outside of torch.inference_mode()"
READ_ONLY = "cannot be written in place: its elements share memory, or it was made in torch.inference_mode()"

# What is wrong, and what to do.
Problem = tuple[str, str]


def problem_of(slots: Iterable[Slot], param: Tensor, state: Any, group: Mapping[str, Any]) -> Problem | None:
    """What is wrong with a parameter's state, or None. Entries may be missing: they are created."""
    if not isinstance(state, dict):
        return f"its state is {type(state).__name__}, must be a dict", VALUE
    entries = cast("dict[str, Any]", state)
    if "step" in entries and (problem := _problem_of_number("step", entries["step"])):
        return problem
    for slot in slots:
        key = storage.entry_of(entries, slot.key)
        value = entries.get(key)
        if key not in entries or (value is None and "step" not in entries):
            continue  # torch's SGD stores None for a buffer that does not exist
        if slot.per_tensor:
            fine = isinstance(value, Tensor) and value.is_floating_point()
            problem = _problem_of_number(key, value, "a floating-point tensor of one number", fine)
        elif key == slot.key:
            problem = _problem(key, value, param, slot.shape_for(param, group), _kind_of(param))
        else:
            scale, shape = f"{slot.key}_scale", blocks.layout(param.shape).scales
            problem = _problem(key, value, param, tuple(param.shape)) or _other_dtype(key, value, storage.CODES)
            problem = problem or _problem(scale, entries.get(scale), param, shape)
            problem = problem or _other_dtype(scale, entries.get(scale), (torch.uint8,))
        if problem is not None:
            return problem
    return _problem_beside(param, entries)


def _problem_beside(param: Tensor, entries: Mapping[str, Any]) -> Problem | None:
    """What is wrong with the entries that `storage` keeps next to the slots, or None."""
    for key in storage.KEYS:
        if key in entries:
            value: Any = entries[key]
            fine = isinstance(value, Tensor) and value.dtype == torch.int64
            if problem := _problem_of_number(key, value, "a tensor of one number in torch.int64", fine):
                return problem
    shape = tuple(param.shape)
    for key, kind, own in (("compensation", "floating-point", shape), ("low_bits", None, (*shape, 2))):
        if key in entries and (problem := _problem(key, entries[key], param, own, kind)):
            return problem
    if "low_bits" in entries and (problem := _other_dtype("low_bits", entries["low_bits"], (torch.uint8,))):
        return problem
    for key in ("low_bits", "rounding_key"):
        if key in entries and param.dtype == torch.float16:
            return f"its state '{key}' is for torch.bfloat16, and the parameter is {param.dtype}", VALUE
    return None


def _other_dtype(key: str, value: Any, allowed: Collection[torch.dtype]) -> Problem | None:
    """What is wrong if an entry has none of these dtypes: others would be read as something else."""
    if value.dtype in allowed:
        return None
    return f"its state '{key}' is {value.dtype}, must be {' or '.join(map(str, allowed))}", VALUE


def _problem(
    key: str, value: Any, param: Tensor, shape: tuple[int, ...] | None, kind: str | None = None
) -> Problem | None:
    """kind: which numbers it must hold, if that is not asked for more exactly."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return f"its state '{key}' is {_shown(value)}, must be a dense tensor", VALUE
    if shape is not None and tuple(value.shape) != shape:
        return f"its state '{key}' has shape {tuple(value.shape)}, not {shape}", SIZE
    if value.device != param.device:
        return f"its state '{key}' is on {value.device}, the parameter on {param.device}", DEVICE
    if kind not in (None, _kind_of(value)):
        return f"its state '{key}' is {value.dtype}, must be {kind} numbers", VALUE
    return None if is_writable(value) else (f"its state '{key}' {READ_ONLY}", CLONE)


def _problem_of_number(key: str, value: Any, wanted: str = "one number", fine: bool = True) -> Problem | None:
    if not (fine and _is_number(value)):
        return f"its state '{key}' is {_shown(value)}, must be {wanted}", VALUE
    if isinstance(value, Tensor) and not is_writable(value):
        return f"its state '{key}' {READ_ONLY}", CLONE
    return None


def _kind_of(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "floating-point" if tensor.is_floating_point() else "whole"


def is_writable(tensor: Tensor) -> bool:
    """Whether torch can write to the tensor in place."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    if 0 not in strides or not tensor.numel():
        return True
    return all(stride or size < 2 for stride, size in zip(strides, tensor.shape, strict=True))


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype is not torch.bool and not value.is_complex()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value) if isinstance(value, (str, bool)) else type(value).__name__
    layout = "" if value.layout == torch.strided else f" ({value.layout})"
    return f"{value.dtype} of shape {tuple(value.shape)}{layout}"
