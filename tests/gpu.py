"""What the tests of the GPU kernels share: a GPU, or Triton's interpreter where there is none."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from rules import assert_same, flat, numbers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="Triton makes the GPU kernels, and is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def parameters(shapes: Any, dtype: torch.dtype, device: Any = DEVICE) -> list[nn.Parameter]:
    return [nn.Parameter(numbers(shape, dtype, 100 + i).to(device)) for i, shape in enumerate(shapes)]


def give(optimizer: Any, step: int, scale: float = 1.0) -> None:
    """Give every parameter the gradient of this number, times the scale."""
    for place, param in enumerate(flat(optimizer)):
        gradient = numbers(tuple(param.shape), param.dtype, 1000 * step + place) * scale
        param.grad = gradient.to(param.device)


def assert_same_numbers(given: Any, wanted: Any, signed_zeros: bool = True) -> None:
    """The same parameters and state to the last bit, wherever they are; any NaN is as good as another."""
    for place, (one, other) in enumerate(zip(flat(given), flat(wanted), strict=True)):
        assert set(given.state[one]) == set(wanted.state[other])
        pairs = {"parameter": (one.detach(), other.detach())}
        pairs |= {key: (given.state[one][key], value) for key, value in wanted.state[other].items()}
        for name, pair in pairs.items():
            clean = [torch.where(x.isnan(), torch.full_like(x, math.nan), x).cpu() for x in pair]
            assert_same(*(clean if signed_zeros else [x + 0.0 for x in clean]), f"{name} {place}")


class NoLooking(TorchDispatchMode):
    """Refuses whatever hands a number of a tensor to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), f"{name} waits"
        return func(*args, **(kwargs or {}))
