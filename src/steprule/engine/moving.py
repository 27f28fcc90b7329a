"""Moving the state between devices, independently of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine import plans, storage

Move = Callable[[Tensor], Tensor]
# Values kept once per tensor, besides the scalar slots that a rule declares.
ON_HOST = frozenset({"step", *storage.KEYS})


def move_state(optimizer: Any, move_for: Callable[[Tensor], Move]) -> None:
    """Put every tensor of the state where `move_for(parameter)` puts it.

    Values kept once per tensor, such as step counts, stay where they are: they are read on the host.
    """
    plans.forget(optimizer)
    stay = {slot.key for slot in optimizer.all_slots().values() if slot.per_tensor} | ON_HOST
    for param, state in optimizer.state.items():
        move = move_for(param)
        for key, value in state.items():
            if key not in stay:
                state[key] = _moved(value, move)


def _moved(value: Any, move: Move) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, (list, tuple)):
        entries = [_moved(entry, move) for entry in cast("list[Any]", value)]
        return entries if isinstance(value, list) else tuple(entries)
    if isinstance(value, dict):
        return {key: _moved(entry, move) for key, entry in cast("dict[Any, Any]", value).items()}
    return value


def to(device: torch.device) -> Move:
    """Onto this device; a tensor that is already there stays the same tensor."""
    return lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned())


def to_host(tensor: Tensor) -> Tensor:
    """Into main memory; from CUDA into pinned memory, which the device can read back at full speed."""
    if type(tensor) is Tensor and tensor.is_cuda:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
    return tensor.to("cpu")
