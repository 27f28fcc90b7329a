"""Moving the state: to a file and back, to another process, to another device."""

from __future__ import annotations

import copy
import gc
import io
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from rules import (
    CASES,
    SWITCHES,
    Case,
    assert_same,
    assert_same_run,
    each,
    flat,
    numbers,
    plain,
    snapshot,
)
from torch import Tensor, nn

from steprule import SGD, AdamW, load_checkpoint, save_checkpoint
from steprule.engine import moving


def as_bytes(saved: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


# What is replaced is freed


REPLACED = {
    "loaded": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "moved": lambda optimizer: optimizer.to("meta"),
}


@each(lambda case: case.runner != "loop" and not case.closure)
@pytest.mark.parametrize("how", REPLACED)
def test_replaced_state_is_freed_before_the_next_step(case: Case, how: str) -> None:
    optimizer = case.make()
    case.advance(optimizer, 2)
    per_tensor = {slot.key for slot in case.rule.slots.values() if slot.per_tensor} | moving.ON_HOST
    states = list(optimizer.state.values())
    old = [weakref.ref(v) for state in states for key, v in state.items() if key not in per_tensor]
    assert old
    del states
    REPLACED[how](optimizer)
    gc.collect()
    assert not [ref for ref in old if ref() is not None]


# To a file and back


@each()
@pytest.mark.parametrize("names", [False, True])
def test_saved_loaded_and_saved_again_is_the_same_file_to_the_byte(case: Case, names: bool) -> None:
    params: list[Any] = case.parameters()
    given = [(f"layer{i}", p) for i, p in enumerate(params)] if names else params
    optimizer = case.make(given)
    # The second parameter gets no gradient at first, so that states are created out of order.
    case.advance(optimizer, without=[1] if not case.closure else [])
    case.advance(optimizer, 2, first=1)
    first = as_bytes(optimizer.state_dict())
    again = case.make(given)
    report = again.load_state_dict(from_bytes(first))
    assert report.matched_by == ("name" if names else "position")
    assert not report.converted
    assert as_bytes(again.state_dict()) == first


@each(lambda case: not case.closure and case.any_shape and not case.sparse_only)
def test_every_layout_survives(case: Case) -> None:
    """Transposed and channels-last parameters have slots with the same layout in memory."""
    made = [torch.zeros(3, 5).t(), torch.zeros(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)]
    params = [nn.Parameter(p.copy_(numbers(tuple(p.shape), p.dtype, i))) for i, p in enumerate(made)]
    optimizer, again = case.make(params), case.make(params)
    case.advance(optimizer, 2)
    again.load_state_dict(from_bytes(as_bytes(optimizer.state_dict())))
    for param in params:
        for key, value in optimizer.state[param].items():
            assert again.state[param][key].stride() == value.stride(), key
    assert as_bytes(again.state_dict()) == as_bytes(optimizer.state_dict())


@each(lambda case: plain(case) and case.name not in ("LBFGS", "SGD"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_slot_keeps_a_dtype_that_is_not_the_parameters(case: Case, dtype: torch.dtype) -> None:
    """As if a checkpoint had been written with state in fewer bits than the parameters have."""
    optimizer, again = case.make(), case.make()
    case.advance(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = value.to(dtype)
    report = again.load_state_dict(saved)
    assert not report.converted
    assert_same(again.state_dict()["state"], saved["state"])
    case.advance(again)
    for state in again.state_dict()["state"].values():
        assert {v.dtype for k, v in state.items() if isinstance(v, Tensor) and v.dim()} <= {dtype}


@pytest.mark.parametrize("rule", [AdamW, SGD])
@pytest.mark.parametrize("low_precision", ["none", "kahan", "stochastic", "master"])
@pytest.mark.parametrize("state_dtype", [None, "bf16", "int8"])
def test_fewer_bits_are_saved_as_they_are(rule: Any, low_precision: str, state_dtype: str | None) -> None:
    """Codes, their scales, what 16 bits leave out, and the keys of random rounding."""
    case = Case(rule, {"momentum": 0.9} if rule is SGD else {})
    shapes = ((80, 70), (3,))
    options: dict[str, Any] = {"low_precision": low_precision, "state_dtype": state_dtype, "lr": 0.1}
    optimizer = case.make(case.parameters(torch.bfloat16, shapes), **options)
    case.advance(optimizer, 2)
    first = as_bytes(optimizer.state_dict())
    again = case.make([nn.Parameter(p.detach().clone()) for p in flat(optimizer)], **options)
    assert not again.load_state_dict(from_bytes(first)).converted
    assert as_bytes(again.state_dict()) == first
    for o in (optimizer, again):
        case.advance(o, 2, first=2)
    assert_same_run(again, optimizer)
    beside = [
        key
        for key in optimizer.state[flat(optimizer)[0]]
        if key.endswith("_scale") or key in ("low_bits", "compensation")
    ]
    for key in beside:
        saved = from_bytes(first)
        saved["state"][0][key] = saved["state"][0][key][:1].float()
        with pytest.raises(ValueError, match=f"{case.name}.*'{key}' of parameter 0 is .*, must be .* of shape"):
            again.load_state_dict(saved)
    assert bool(beside) == (state_dtype == "int8" or low_precision in ("kahan", "master"))


@each(plain)
def test_reading_the_state_changes_nothing(case: Case) -> None:
    optimizer, wanted = case.make(), case.make()
    for step in range(3):
        kept = snapshot(optimizer)
        optimizer.state_dict()
        assert_same(snapshot(optimizer), kept)
        case.advance(optimizer, first=step)
        case.advance(wanted, first=step)
    assert_same_run(optimizer, wanted)


@each(lambda case: not case.closure)
def test_a_swapped_parameters_old_state_is_not_saved_and_comes_back_with_it(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer, 2)
    whole = as_bytes(optimizer.state_dict())
    params = optimizer.param_groups[0]["params"]
    old = params[0]
    params[0] = case.parameters()[0]
    assert 0 not in optimizer.state_dict()["state"]
    params[0] = old
    assert as_bytes(optimizer.state_dict()) == whole
    params[0] = case.parameters()[0]
    optimizer.init_state()
    optimizer.load_state_dict(optimizer.state_dict())
    assert old not in optimizer.state


@each(lambda case: not case.closure)
def test_a_step_count_in_a_file_does_not_drag_the_others_along(case: Case) -> None:
    """The fused runner keeps all counts in one table; a file holds whole storages."""
    optimizer = case.make()
    case.advance(optimizer, 2)
    for state in optimizer.state_dict()["state"].values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key


# Into another process


def named_cases(runner: str) -> dict[str, Case]:
    return {str(case): case for case in CASES if case.runner == runner}


def go_on(file: str, runner: str) -> None:
    """What the other process does: load, step, compare."""
    torch.set_num_threads(1)
    saved = load_checkpoint(file)
    for name, case in named_cases(runner).items():
        before, optimizer_state, after, state_after = saved[name]
        optimizer = case.make([nn.Parameter(p) for p in before])
        optimizer.load_state_dict(optimizer_state)
        case.advance(optimizer, 3, first=3)
        assert_same([p.detach() for p in flat(optimizer)], after, name)
        assert_same(optimizer.state_dict()["state"], state_after, name)
    print(len(saved))


@pytest.mark.parametrize("runner", SWITCHES)
def test_a_new_process_continues_every_rule_to_the_same_bits(tmp_path: Path, runner: str) -> None:
    file = tmp_path / "run.pt"
    cases = named_cases(runner)
    saved: dict[str, Any] = {}
    for name, case in cases.items():
        optimizer = case.make()
        case.advance(optimizer, 3)
        before = copy.deepcopy(([p.detach() for p in flat(optimizer)], optimizer.state_dict()))
        case.advance(optimizer, 3, first=3)
        saved[name] = (*before, [p.detach() for p in flat(optimizer)], optimizer.state_dict()["state"])
    save_checkpoint(file, saved)
    script = f"import test_moving; test_moving.go_on({str(file)!r}, {runner!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    assert int(python("-W", "error", "-c", script, env={"PYTHONPATH": path})) == len(cases) > 15


# To another device


def devices_of(optimizer: Any) -> set[str]:
    """Where the slots are, without values kept per tensor."""
    found = {t.device.type for state in optimizer.state.values() for t in moving_tensors(state)}
    return found or {"none"}


def moving_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.dim() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in parts for tensor in moving_tensors(part)]


@each(lambda case: case.name != "SGD" or bool(case.options))
def test_the_state_goes_to_a_device_and_the_counts_stay(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer, 2)
    kept = [p.detach().clone() for p in flat(optimizer)]
    assert optimizer.to("meta") is optimizer
    assert devices_of(optimizer) == {"meta"}
    assert_same([p.detach() for p in flat(optimizer)], kept)
    per_tensor = {slot.key for slot in optimizer.slots.values() if slot.per_tensor} | {"step"}
    for state in optimizer.state.values():
        assert all(not isinstance(state[key], Tensor) or state[key].device.type == "cpu"
                   for key in per_tensor & state.keys())  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"state_dtype": "int8"}, {"state_dtype": "bf16"}, {"low_precision": "stochastic"}], ids=str
)
def test_keys_of_random_rounding_stay_where_they_are_read(options: dict[str, str]) -> None:
    """Like counts: on the device, each step would have to wait for them."""
    param = nn.Parameter(numbers((100, 50), torch.bfloat16, 1))
    optimizer = AdamW([param], **options)
    optimizer.init_state()
    keys = [key for key in optimizer.state[param] if key.endswith("rounding_key")]
    assert keys
    optimizer.to("meta")
    assert devices_of(optimizer) == {"meta"}
    assert {optimizer.state[param][key].device.type for key in keys} == {"cpu"}


@each()
def test_going_where_it_is_already_moves_nothing(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer, 2)
    before = [id(value) for state in optimizer.state.values() for value in state.values()]
    optimizer.to("cpu").to(torch.device("cpu"))
    after = [id(value) for state in optimizer.state.values() for value in state.values()]
    assert case.closure or after == before


@each(lambda case: not case.closure and (case.name != "SGD" or bool(case.options)))
def test_loaded_state_follows_its_parameter(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer, 2)
    elsewhere = case.make([nn.Parameter(p.detach().to("meta")) for p in flat(optimizer)])
    elsewhere.load_state_dict(optimizer.state_dict())
    assert devices_of(elsewhere) == {"meta"}
    for state in elsewhere.state.values():
        assert not isinstance(state.get("step"), Tensor) or state["step"].device.type == "cpu"


@each()
def test_a_step_brings_offloaded_state_back(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with only one memory, newly allocated memory stands in for the other device."""
    away: list[Tensor] = []

    def to_host(tensor: Tensor) -> Tensor:
        away.append(tensor.clone())
        return away[-1]

    monkeypatch.setattr(moving, "to_host", to_host)
    optimizer, wanted = case.make(), case.make()
    case.advance(optimizer, 2)
    case.advance(wanted, 2)
    optimizer.offload_state()
    moved = {id(tensor) for tensor in away}
    assert moved.issuperset(id(t) for state in optimizer.state.values() for t in moving_tensors(state))
    assert_same(optimizer.state_dict()["state"], wanted.state_dict()["state"])
    back: list[int] = []
    reload = type(optimizer).reload_state
    monkeypatch.setattr(type(optimizer), "reload_state", lambda self: back.append(1) or reload(self))
    twin = copy.deepcopy(optimizer)
    case.advance(optimizer, 2, first=2)
    case.advance(wanted, 2, first=2)
    assert_same_run(optimizer, wanted)
    case.advance(twin, 2, first=2)
    assert_same_run(twin, wanted)
    assert len(back) == (0 if case.closure else 2)


def test_reloading_and_loading_end_the_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = AdamW(Case(AdamW).parameters())
    Case(AdamW).advance(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for end in (optimizer.reload_state, lambda: optimizer.load_state_dict(saved)):
        optimizer.offload_state()
        assert optimizer._state_is_away
        end()
        assert not optimizer._state_is_away
    assert_same(optimizer.state_dict(), saved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@each(lambda case: plain(case) and not case.sparse_only)
def test_from_cuda_to_pinned_memory_and_back(case: Case) -> None:
    params = [nn.Parameter(p.detach().cuda()) for p in case.parameters()]
    optimizer, wanted = case.make(params), case.make([nn.Parameter(p.detach().clone()) for p in params])
    case.advance(optimizer, 2)
    case.advance(wanted, 2)
    in_use = torch.cuda.memory_allocated()
    optimizer.offload_state()
    assert devices_of(optimizer) <= {"cpu", "none"}
    assert all(t.is_pinned() for s in optimizer.state.values() for t in moving_tensors(s))
    assert torch.cuda.memory_allocated() <= in_use
    case.advance(optimizer, 2, first=2)
    case.advance(wanted, 2, first=2)
    assert devices_of(optimizer) <= {"cuda", "none"}
    assert_same([p.detach().cpu() for p in flat(optimizer)], [p.detach().cpu() for p in flat(wanted)])
