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
from gpu import DEVICE, Kernels, small_chunks
from hypothesis import assume, given, settings
from hypothesis import strategies as st

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
