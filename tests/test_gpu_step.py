"""The path from `step()` to a GPU kernel, in Triton's interpreter, with CPU tensors in place of a GPU's."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from gpu import INTERPRETED, NoLooking, give, parameters, pretend_a_gpu
from rules import assert_same, flat
from torch import Tensor

import steprule
from steprule.engine.runners import reference
from steprule.engine.runners.kernels.gpu import launch as gpu_launch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
SHAPES = ((), (5,), (0,), (70,))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(gpu_launch, "CHUNK", 64)
    monkeypatch.setattr(gpu_launch, "BLOCK", 16)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_a_step_takes_the_kernel_and_a_checkpoint_goes_on(options: dict[str, Any]) -> None:
    given = steprule.NAdam(parameters(SHAPES, torch.float32), **options)
    loop = steprule.NAdam(parameters(SHAPES, torch.float32), foreach=False)
    for step in range(4):
        for optimizer in (given, loop):
            give(optimizer, step)
            optimizer.step()
        if step == 1:
            saved = copy.deepcopy(given.state_dict())
            pickle.loads(pickle.dumps(given.state_dict()))
            given.load_state_dict(saved)
    assert "runner: gpu_kernel" in given.explain()
    assert given._step_supports_amp_scaling == bool(options.get("fused"))
    for one, other in zip(flat(given), flat(loop), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        for key, value in loop.state[other].items():
            torch.testing.assert_close(given.state[one][key], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_an_estimate_takes_the_kernel_and_counts_no_step(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = steprule.AdaHessian(parameters(SHAPES, torch.float32), **options)
    loop = steprule.AdaHessian(parameters(SHAPES, torch.float32), foreach=False)
    for step in range(3):
        for optimizer in (loop, given):
            give(optimizer, step)
            with monkeypatch.context() as patch:
                if optimizer is given:
                    patch.setattr(reference, "run", None)
                optimizer.update_hessian({p: 2 * p.grad for p in flat(optimizer)})
            optimizer.step()
    for one, other in zip(flat(given), flat(loop), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert given.state[one]["step"] == given.state[one]["estimates"] == 3
        for key, value in loop.state[other].items():
            torch.testing.assert_close(given.state[one][key], value, rtol=1e-6, atol=1e-9)


def test_a_skipped_step_moves_nothing() -> None:
    optimizer = steprule.AdamW(parameters(SHAPES, torch.float32), fused=True)
    give(optimizer, 0)
    optimizer.step()
    before = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in flat(optimizer)]))
    give(optimizer, 1, math.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.ones(1)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    after = (optimizer.state_dict(), [p.detach() for p in flat(optimizer)])
    assert_same(after, before)


def test_a_live_step_is_never_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    lr = torch.tensor(0.1)
    optimizer = steprule.AdamW(parameters(SHAPES, torch.float32), lr=lr, capturable=True)
    give(optimizer, 0)
    optimizer.step()
    lr.fill_(0.2)
    with monkeypatch.context() as looking, NoLooking():
        looking.setattr(Tensor, "numpy", None)
        optimizer.step()
    assert optimizer.state[flat(optimizer)[1]]["step"] == 2
