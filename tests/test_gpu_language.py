"""The language of rules in GPU kernels, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from formulas import (
    FLOATS,
    STEPS,
    assert_all_right,
    assert_meant,
    drawn,
    give,
    make,
    parameter_of_all,
    rule_of,
    rule_of_all,
)
from gpu import DEVICE, INTERPRETED, SHAPES, Kernels, assert_same_numbers, pretend_a_gpu, small_chunks
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rules import assert_same, flat
from test_draws import Drawn, Lined
from torch import nn

from steprule.engine.runners.kernels.gpu import kernel as gpu_kernel

# Half precision hardly learns, and is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")


@pytest.fixture(autouse=True, scope="module")
def cut_up_small() -> Iterator[None]:
    with small_chunks():
        yield


@pytest.mark.parametrize("counts", ["host", "device"])
def test_what_a_formula_comes_to(counts: str) -> None:
    optimizer = rule_of_all()([parameter_of_all(torch.float32, DEVICE)])
    assert_all_right(optimizer, lambda: Kernels(optimizer, counts).step())


@settings(max_examples=6)
@given(parts=drawn(), dtype=st.sampled_from(FLOATS))
def test_random_formulas_come_to_what_they_mean(parts: Any, dtype: torch.dtype) -> None:
    optimizer = make(rule_of(*parts), dtype, device=DEVICE)
    give(optimizer, 0)
    program = optimizer.program(optimizer.param_groups[0])
    assume(gpu_kernel.why_not(program, dict.fromkeys(program.inputs, dtype)) is None)
    kernels = Kernels(optimizer)
    for step in range(STEPS):
        give(optimizer, step)
        kernels.step()
    assert_meant(parts, optimizer, dtype)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [*((dtype, {}) for dtype in FLOATS), (torch.bfloat16, {"low_precision": "stochastic"})],
)
def test_random_numbers_are_those_of_the_loop(dtype: torch.dtype, options: dict[str, str]) -> None:
    given, loop = (
        Drawn([nn.Parameter(torch.zeros(shape, dtype=dtype, device=where)) for shape in SHAPES], **more)
        for where, more in ((DEVICE, options), ("cpu", {**options, "foreach": False}))
    )
    give(given, 0)
    kernels = Kernels(given)
    for _ in range(2):
        give(loop, 0)
        kernels.step()
        loop.step()
    assert_same_numbers(given, loop)


def test_random_numbers_of_rows_are_those_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        pretend_a_gpu(monkeypatch)
    shapes = ((9, 40), (5, 3), (20,))
    given = Lined([nn.Parameter(torch.zeros(x, device=DEVICE)) for x in shapes], fused=True)
    loop = Lined([nn.Parameter(torch.zeros(x)) for x in shapes], foreach=False)
    for optimizer in (given, loop):
        for _ in range(2):
            give(optimizer, 0)
            optimizer.step()
    for one, other in zip(flat(given), flat(loop), strict=True):
        assert_same(given.state[one]["m"].cpu(), loop.state[other]["m"])
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-6, atol=1e-6)
