"""torch's default dtype and default device do not affect a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rules import CASES, Case, assert_same, can_store, each, flat, numbers
from torch import nn

import steprule
from steprule.engine import fields

SHAPES = ((70, 90), (5,))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(SHAPES)]


def run(case: Case, where: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Three steps with gradients from outside, and everything of the optimizer inside `where`."""
    shapes = SHAPES if case.any_shape else ((70, 90), (5, 3))
    made = [nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(shapes)]
    gradients = [[numbers(tuple(p.shape), dtype, 10 * n + i) for i, p in enumerate(made)] for n in range(3)]
    with where:
        optimizer = case.make(made, **options)
        for now in gradients:
            for p, g in zip(made, now, strict=True):
                p.grad = g.to_sparse(1) if case.sparse_only else g
            case.step(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


KINDS = [{}, {"state_dtype": "int8"}, {"low_precision": "master"}]
KINDS += [{"low_precision": "stochastic", "state_dtype": "bf16"}]
OTHERS = [torch.bfloat16, torch.float64]


def dtype_for(options: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if "low_precision" in options else torch.float32


def takes(case: Case, options: dict[str, Any]) -> bool:
    """Whether the rule and the runner take this storage."""
    if options and (case.closure or case.runner == "lists" or case.sparse_only):
        return False
    return "state_dtype" not in options or can_store(case, options["state_dtype"])


@pytest.mark.parametrize("options", KINDS, ids=str)
@each(among=CASES)
@pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")
def test_the_default_dtype_changes_no_number(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not takes(case, options) or case.closure:
        pytest.skip("the rule or its runner refuses this storage")
    usual = run(case, contextlib.nullcontext(), dtype_for(options), **options)
    for dtype in OTHERS:
        # As in torch, counts are kept in double if that is the default; they are not compared here.
        with monkeypatch.context() as patch:
            patch.setattr(fields, "scalar_dtype", lambda: torch.float32)
            other = run(case, default_dtype(dtype), dtype_for(options), **options)
        assert_same([p.detach() for p in flat(other)], [p.detach() for p in flat(usual)], str(dtype))
        for p, q in zip(flat(other), flat(usual), strict=True):
            for key, value in usual.state[q].items():
                kept = torch.as_tensor(other.state[p][key])
                assert torch.equal(kept.to(torch.as_tensor(value).dtype), torch.as_tensor(value)), key


@pytest.mark.parametrize("options", KINDS, ids=str)
@each(among=CASES)
@pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")
def test_the_default_device_is_not_asked(case: Case, options: dict[str, Any]) -> None:
    if not takes(case, options) or case.closure:
        pytest.skip("the rule or its runner refuses this storage")
    usual, other = (
        run(case, where, dtype_for(options), **options)
        for where in (contextlib.nullcontext(), torch.device("meta"))
    )
    assert_same([p.detach() for p in flat(other)], [p.detach() for p in flat(usual)])
    assert_same(other.state_dict()["state"], usual.state_dict()["state"])


def test_reports_do_not_ask_the_defaults() -> None:
    optimizer = steprule.AdamW(params(), state_dtype="int8")
    usual = steprule.memory_report(optimizer).state_bytes
    with default_dtype(torch.bfloat16), torch.device("meta"):
        assert steprule.memory_report(optimizer).state_bytes == usual
