"""Checkpoints between ways of storing, and between torch.optim and state in 8 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rules import LOOPS, Case, assert_same, can_store, each, numbers
from torch import nn

from steprule.engine import storage

SHAPE = (70, 90)
CODED = [case for case in LOOPS if case.name == "Muon" or (case.elementwise and not case.sparse_only)]


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(numbers(SHAPE, dtype, 1)), nn.Parameter(numbers((5, 3), dtype, 2))]


def trained(case: Case, dtype: torch.dtype = torch.float32, steps: int = 3, **options: Any) -> Any:
    optimizer = case.make(params(dtype), **options)
    case.advance(optimizer, steps)
    return optimizer


def in_the_older_form(saved: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint as it was when codes had the slot's key."""
    states = {
        place: {
            key.removesuffix("_codes"): value for key, value in state.items() if f"{key}_codes" not in state
        }
        for place, state in saved["state"].items()
    }
    return saved | {"state": states}


@each(lambda case: can_store(case, "int8"), among=CODED)
def test_no_codes_stand_under_the_key_of_a_slot(case: Case) -> None:
    saved = trained(case, state_dtype="int8").state_dict()
    slots = [slot.key for slot in case.rule.slots.values() if not slot.per_tensor]
    for key in slots:
        assert not isinstance(saved["state"][0].get(key), torch.Tensor)
    assert any(f"{key}_codes" in saved["state"][0] for key in slots)


@pytest.mark.parametrize("switches", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@each(lambda case: can_store(case, "int8") and case.torch_class is not None, among=CODED)
def test_torch_stops_when_it_meets_codes(case: Case, switches: dict[str, Any]) -> None:
    saved = trained(case, state_dtype="int8").state_dict()
    given = params()
    try:
        theirs = case.torch_class(given, **case.settings, **switches)
    except (TypeError, RuntimeError):
        pytest.skip("torch's class does not have this switch")
    theirs.load_state_dict(saved | {"param_groups": theirs.state_dict()["param_groups"]})
    before = given[0].detach().clone()
    for p in given:
        p.grad = torch.ones_like(p)
    with pytest.raises((KeyError, AttributeError, TypeError)):
        theirs.step()
    assert torch.equal(given[0], before)


@each(lambda case: can_store(case, "int8"), among=CODED)
def test_the_older_form_of_codes_is_read(case: Case) -> None:
    source = trained(case, state_dtype="int8")
    older = in_the_older_form(source.state_dict())
    assert not any(key.endswith("_codes") for key in older["state"][0])
    again = case.make(params(), state_dtype="int8")
    for p, q in zip(again.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(older)
    for optimizer in (source, again):
        case.advance(optimizer, 2, first=3)
    assert_same(again.state_dict(), source.state_dict())
    for p, q in zip(again.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_codes_without_their_scales_are_refused() -> None:
    (case,) = (case for case in CODED if str(case) == "AdamW-loop")
    saved = trained(case, state_dtype="int8").state_dict()
    state = saved["state"][0]
    saved["state"][0] = {key: x for key, x in state.items() if key != "exp_avg_scale"}
    with pytest.raises(ValueError, match=r"'exp_avg_codes' of parameter 0 .* without 'exp_avg_scale'"):
        case.make(params(), state_dtype="int8").load_state_dict(saved)
    assert storage.holds(state, "exp_avg")
