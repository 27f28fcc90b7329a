"""benchmarks/gpu_steps.py names optimizers that exist here and in torch; on a GPU its clocks run, too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steprule

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_steps


@pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")
@pytest.mark.parametrize(("name", "dtype", "options"), gpu_steps.OURS, ids=str)
def test_every_optimizer_takes_a_step(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    param = nn.Parameter(torch.full((4, 4), 0.01, dtype=dtype))
    steps = [steprule.create(name.lower(), [param], **options).step]
    if name in gpu_steps.TORCH and "state_dtype" not in options and "low_precision" not in options:
        steps += [getattr(torch.optim, name)([param], **options).step]
    for step in steps:
        param.grad = torch.ones_like(param)
        before = param.detach().clone()
        step()
        assert not torch.equal(param, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
def test_a_step_and_its_kernels_are_timed() -> None:
    params = gpu_steps.parameters([(1024, 1024)], torch.float32)
    step = steprule.AdamW(params).step
    assert 0 < gpu_steps.kernels_ms(step) < 1000
    assert 0 < gpu_steps.step_ms(step) < 1000
