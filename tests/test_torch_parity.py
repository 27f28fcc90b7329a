"""Every rule that torch.optim has, against torch's for-loop: the same bits in fp32 and fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import steprule

STEPS = 50
SHAPES = [(17, 33), (129,), (), (3, 5, 4, 2)]
CONFIGURATIONS = [
    pytest.param(info, entry, id=f"{info.optim_cls.__name__}-{entry.desc}")
    for info in optim_db
    for entry in info.optim_inputs_func(device="cpu")
]


def gradients(shapes: list[tuple[int, ...]], dtype: torch.dtype, sparse: bool = False):
    """The same random gradients for both optimizers; some elements are zero, of both signs."""
    generator = torch.Generator().manual_seed(7)
    while True:
        batch = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
        for g in batch:
            if g.dim():
                g[0] = 0.0
                g[-1] = -0.0 if g.dim() == 1 else g[-1]
        yield [g.to_sparse() if sparse else g for g in batch]


def start(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    values = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return [torch.nn.Parameter(v) for v in values]


def shapes_for(info: Any) -> list[tuple[int, ...]]:
    if info.optim_cls is torch.optim.Muon:
        return [(17, 33), (33, 17), (8, 8)]
    return [(6, 4), (9, 3)] if info.only_supports_sparse_grads else SHAPES


def assert_same_bits(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    mine, other = ours.state_dict()["state"], theirs.state_dict()["state"]
    for group, reference in zip(ours.param_groups, theirs.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], reference["params"], strict=True)):
            assert torch.equal(p, q), f"parameter {i}: {(p != q).sum()} of {p.numel()} differ"
    for i, saved in other.items():
        for key, value in saved.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(mine[i][key].to(value.dtype), value), f"{key} of {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("info", "entry"), CONFIGURATIONS)
def test_reference_equals_torch_bit_for_bit(info: Any, entry: Any, dtype: torch.dtype) -> None:
    if info.step_requires_closure:
        pytest.skip("LBFGS has its own test: it needs a loss")
    shapes = shapes_for(info)
    flags = {"foreach": False} if "foreach" in info.supported_impls else {}
    theirs = info.optim_cls(start(shapes, dtype), **copy.deepcopy(entry.kwargs), **flags)
    ours = getattr(steprule, info.optim_cls.__name__)(
        start(shapes, dtype), **copy.deepcopy(entry.kwargs), **flags
    )
    stream = gradients(shapes, dtype, info.only_supports_sparse_grads)
    for _, batch in zip(range(STEPS), stream, strict=False):
        for optimizer in (ours, theirs):
            for p, g in zip(optimizer.param_groups[0]["params"], batch, strict=True):
                p.grad = g.clone()
            optimizer.step()
    assert_same_bits(ours, theirs)


ERRORS = [
    pytest.param(info, entry, id=f"{info.optim_cls.__name__}-{i}-{entry.optimizer_error_input.desc}")
    for info in optim_db
    for i, entry in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32))
]


@pytest.mark.parametrize(("info", "entry"), ERRORS)
def test_errors_have_torchs_type(info: Any, entry: Any) -> None:
    rule = getattr(steprule, info.optim_cls.__name__)
    given = entry.optimizer_error_input
    params = given.params if given.params is not None else [torch.nn.Parameter(torch.randn(2, 2))]
    catch = pytest.warns if issubclass(entry.error_type, Warning) else pytest.raises
    with catch(entry.error_type):
        optimizer = rule(params, **given.kwargs)
        if entry.error_on is OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()
