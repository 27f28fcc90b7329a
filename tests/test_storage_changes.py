"""Storage that changes between steps: by the group, by a cast of the model, by a cast of the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import exact_roots
from rules import assert_same, numbers, snapshot
from torch import Tensor, nn

import steprule
from steprule.engine import storage

RUNNERS: list[dict[str, Any]] = [{}, {"foreach": False}]
SHAPE = (70, 90)


def made(dtype: torch.dtype, count: int = 2, **options: Any) -> tuple[Any, list[Any]]:
    params = [nn.Parameter(numbers(SHAPE, dtype, 5 + i)) for i in range(count)]
    return steprule.AdamW([(f"w{i}", p) for i, p in enumerate(params)], lr=0.01, **options), params


def advance(optimizer: Any, step: int = 0) -> None:
    for place, param in enumerate(optimizer.param_groups[0]["params"]):
        param.grad = numbers(tuple(param.shape), param.dtype, 100 * step + place)
    optimizer.step()


Spoil = Callable[[Tensor], Any]


def cast(dtype: torch.dtype) -> Spoil:
    return lambda x: x.to(dtype)


WIDTHS = (torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16)
# How values are kept, the entry that is put in another form, and that form.
SPOILED: dict[tuple[str, str, str], Spoil] = {
    **{("master", "low_bits", str(x)): cast(x) for x in (*WIDTHS[1:], torch.int16)},
    **{("int8", "exp_avg_codes", str(x)): cast(x) for x in (*WIDTHS[2:], torch.int16)},
    **{("int8", "exp_avg_scale", str(x)): cast(x) for x in (torch.float32, torch.int8)},
    ("int8", "exp_avg_sq_scale", "a number"): lambda x: 1.0,
    ("kahan", "compensation", "torch.int16"): cast(torch.int16),
    ("kahan", "compensation", "another shape"): lambda x: x[:7],
    **{("stochastic", "rounding_key", str(x)): cast(x) for x in (torch.int32, torch.float32)},
    ("stochastic", "rounding_key", "an int"): int,
    ("bf16", storage.SLOT_KEY, "torch.uint8"): cast(torch.uint8),
}


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("kind", "key", "name"), SPOILED, ids=str)
def test_an_entry_of_another_dtype_is_named_and_nothing_moves(
    kind: str, key: str, name: str, runner: dict[str, Any]
) -> None:
    half = kind in storage.BESIDE
    options = {"low_precision" if half else "state_dtype": kind}
    optimizer, params = made(torch.bfloat16 if half else torch.float32, **options, **runner)
    advance(optimizer)
    state = optimizer.state[params[1]]
    right, state[key] = state[key], SPOILED[kind, key, name](state[key])
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=rf"^AdamW: 'w1' cannot be stepped: its state '{key}' (is|has) "):
        advance(optimizer, 1)
    assert_same([p.detach() for p in params], before)
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1]
    state[key] = right
    advance(optimizer, 1)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("wanted", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("low_precision", ["kahan", "master"])
def test_what_16_bits_leave_out_is_not_lost_when_the_parameter_is_cast(
    low_precision: str, wanted: torch.dtype, runner: dict[str, Any]
) -> None:
    if low_precision == "master" and wanted == torch.float16:
        pytest.skip("it is refused")
    optimizer, params = made(torch.bfloat16, low_precision=low_precision, **runner)
    advance(optimizer)
    values = [storage.load_parameter(p.detach(), optimizer.state[p]) for p in params]
    for param in params:
        param.data = param.data.to(wanted)
    optimizer.param_groups[0]["lr"] = 0.0
    advance(optimizer, 1)
    for param, value in zip(params, values, strict=True):
        state = optimizer.state[param]
        kept = storage.load_parameter(param.detach(), state)
        torch.testing.assert_close(kept, value.to(kept.dtype), rtol=0, atol=1e-7)
        assert wanted == torch.float16 or not set(storage.BESIDE.values()) & state.keys()
        assert wanted != torch.float16 or state["compensation"].dtype == wanted


@pytest.mark.parametrize("low_precision", ["kahan", "master"])
def test_a_parameter_that_was_cast_steps_alike_in_every_runner(low_precision: str) -> None:
    results: list[Any] = []
    with exact_roots():
        for runner in RUNNERS:
            optimizer, params = made(torch.bfloat16, low_precision=low_precision, **runner)
            advance(optimizer)
            for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
                for param in params:
                    param.data = param.data.to(dtype)
                advance(optimizer, 1 + number)
            results.append([p.detach() for p in params])
    assert_same(*results)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize(("low_precision", "key"), [("master", "low_bits"), ("stochastic", "rounding_key")])
def test_what_belongs_to_bf16_is_refused_for_fp16(low_precision: str, key: str, runner: dict[str, Any]) -> None:
    optimizer, params = made(torch.bfloat16, low_precision=low_precision, **runner)
    advance(optimizer)
    optimizer.param_groups[0]["low_precision"] = None
    params[0].data, params[1].data = params[0].data.half(), params[1].data.half()
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=rf"'{key}' is for torch.bfloat16, and the parameter is torch.float16"
    ):
        advance(optimizer, 1)
    assert_same(snapshot(optimizer), before)


CHANGES = [
    ({"low_precision": "kahan"}, {"low_precision": "master"}),
    ({"low_precision": "master"}, {"low_precision": "stochastic"}),
    ({"low_precision": "kahan", "state_dtype": "fp32"}, {"low_precision": "kahan", "state_dtype": "int8"}),
    ({"low_precision": "none"}, {"low_precision": "kahan", "state_dtype": "bf16"}),
]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(("there", "here"), CHANGES, ids=str)
def test_a_step_that_is_not_taken_has_changed_no_storage(
    there: dict[str, Any], here: dict[str, Any], clipped: bool, runner: dict[str, Any], skips: bool
) -> None:
    modifiers = [steprule.GlobalNormClip(1.0)] if clipped else []
    asked = {"nonfinite": "skip" if skips else "raise", "modifiers": modifiers}
    optimizer, params = made(torch.bfloat16, **there, **asked, **runner)
    wanted, _ = made(torch.bfloat16, **there, **asked, **runner)
    for one in (optimizer, wanted):
        advance(one)
        one.param_groups[0].update(here)
    before, versions = snapshot(optimizer), [p._version for p in params]
    params[0].grad = numbers(SHAPE, torch.bfloat16, 3)
    params[1].grad = torch.full(SHAPE, torch.nan, dtype=torch.bfloat16)
    if skips:
        optimizer.step()
        optimizer.param_groups[0]["skipped_steps"] = 0
    else:
        with pytest.raises(RuntimeError, match="w1"):
            optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert [p._version for p in params] == versions
    advance(optimizer, 1)
    advance(wanted, 1)
    assert_same(snapshot(optimizer), snapshot(wanted))
