"""Parameters that must be stepped one after the other, since they have memory in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}


def state(states: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """The places of parameters whose states hold the same tensor, which must be stepped one after the other."""
    first: dict[int, int] = {}
    found: set[int] = set()
    for place, entries in states.items():
        for value in entries.values():
            other = first.setdefault(id(value), place) if isinstance(value, Tensor) else place
            if other != place:
                found |= {other, place}
    return found


def memory(params: Sequence[Tensor]) -> set[int]:
    """The places of parameters that overlap in memory, which must be stepped one after the other."""
    found: set[int] = set()
    spans = sorted(
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), place)
        for place, x in enumerate(params)
        if type(x) in PLAIN and x.numel() and x.layout == torch.strided and x.data_ptr()
    )
    reach, reaching = 0, 0
    for start, end, place in spans:
        if start < reach:
            found |= {reaching, place}
        if end > reach:
            reach, reaching = end, place
    return found
