"""Rules on whole matrices on a GPU, or in Triton's interpreter: the same steps as those of the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu import DEVICE, INTERPRETED, pretend_a_gpu, small_chunks
from test_matrices import VIEWS, Whitening, assert_close, stepped
from torch import nn

import steprule

pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")
SHAPES = ((6, 8), (8, 6), (6, 8), (3, 5))
STORAGE: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float32, {"state_dtype": "bf16"}),
    (torch.bfloat16, {"low_precision": "master"}),
]


@pytest.mark.parametrize("modifiers", [[], [steprule.GlobalNormClip(0.1)]])
@pytest.mark.parametrize("rule", [steprule.Muon, Whitening])
@pytest.mark.parametrize(("dtype", "storage"), STORAGE)
def test_kernels_step_as_the_loop_does(
    rule: Any,
    dtype: torch.dtype,
    storage: dict[str, Any],
    modifiers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"modifiers": modifiers, **storage}
    _, wanted = stepped(rule, 4, shapes=SHAPES, dtype=dtype, late=2, **options, fused=False)
    if INTERPRETED:
        pretend_a_gpu(monkeypatch)
    with small_chunks():
        ours, params = stepped(rule, 4, shapes=SHAPES, dtype=dtype, late=2, device=DEVICE, **options)
    assert "runner: gpu_kernel" in ours.explain()
    assert "by the reference" not in ours.explain()
    params = [param.cpu() for param in params]
    assert_close(params, wanted, 2e-2 if dtype == torch.bfloat16 or not INTERPRETED else 1e-5)


def test_views(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(device: Any, **runner: Any) -> list[Any]:
        params = [
            nn.Parameter(torch.linspace(-1, 1, steps=torch.Size(x).numel()).view(x).to(device))
            for _, x in VIEWS
        ]
        optimizer = steprule.Muon([{"params": params, "views": [view for view, _ in VIEWS]}], **runner)
        for param in params:
            param.grad = param.detach() ** 2
        optimizer.step()
        return [param.cpu() for param in params]

    wanted = made("cpu", fused=False)
    if INTERPRETED:
        pretend_a_gpu(monkeypatch)
    with small_chunks():
        assert_close(made(DEVICE), wanted, 1e-5 if INTERPRETED else 2e-2)
