"""Checkpoints between storage formats, and between torch.optim and state in 8 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rules import LOOPS, Case, assert_same, can_store, each, flat, numbers
from torch import nn

import steprule
from steprule import parameter
from steprule.declare import Matrix
from steprule.engine import storage

SHAPE = (70, 90)


def in_kernels(case: Case) -> bool:
    return issubclass(case.rule, Matrix) or case.elementwise


CODED = [case for case in LOOPS if in_kernels(case) and not case.sparse_only]


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
    slots = [x.key for x in case.rule.slots.values() if x.per == "element" and x.starts is not parameter]
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


def decoded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What codes with a float32 for each 256 neighbours stand for."""
    small = 2.0**-15 if codes.dtype == torch.int8 else 2.0**-31
    bias = 112 if codes.dtype == torch.int8 else 96
    code = codes.reshape(-1).to(torch.int64)
    size = code & 127 if codes.dtype == torch.int8 else code
    value = (1 + (size % 8).double() / 8) * 2.0 ** ((size // 8).double() + bias - 127) - small
    value = torch.where(code < 0, -value, value)
    return (value * scale.double().repeat_interleave(256)[: len(value)]).reshape(codes.shape)


def test_codes_with_wider_scales_are_converted() -> None:
    p = nn.Parameter(numbers((30, 200), torch.float32, 0))
    optimizer = steprule.AdamW([p], state_dtype="int8")
    optimizer.init_state()
    saved = optimizer.state_dict()
    generator = torch.Generator().manual_seed(0)
    state, wanted = saved["state"][0], {}
    for key, low in (("exp_avg", -128), ("exp_avg_sq", 0)):
        codes = torch.randint(low, low + 248, (30, 200), generator=generator).to(state[f"{key}_codes"].dtype)
        scale = 2.0 ** torch.randint(-10, 10, (-(-6000 // 256),), generator=generator)
        state |= {f"{key}_codes": codes, f"{key}_scale": scale.float()}
        wanted[key] = decoded(codes, scale)
    report = optimizer.load_state_dict(saved)
    assert {change.what.partition(": ")[2] for change in report.converted} == {"exp_avg", "exp_avg_sq"}
    assert "older 8-bit codes" in str(report)
    loaded = optimizer.state_dict()["state"][0]
    assert loaded["exp_avg_scale"].shape == (30, 2)
    for key, value in wanted.items():
        found = storage.load(optimizer.state[p], key).double()
        largest = value.abs().max()
        assert ((found - value).abs() <= value.abs() / 15 + largest * 2.0**-17).all()
    p.grad = torch.ones_like(p)
    optimizer.step()


def test_the_lower_half_of_a_parameter_was_a_16_bit_number() -> None:
    p = nn.Parameter(numbers((30, 20), torch.bfloat16, 0))
    optimizer = steprule.AdamW([p], low_precision="master")
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    kept = optimizer.state[p]["low_bits"].clone()
    assert (kept.dtype, tuple(kept.shape)) == (torch.uint8, (30, 20, 2))
    saved["state"][0]["low_bits"] = kept.view(torch.int16).squeeze(-1)
    report = optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[p]["low_bits"], kept)
    assert "low_bits" in str(report)


def test_codes_without_their_scales_are_refused() -> None:
    (case,) = (case for case in CODED if str(case) == "AdamW-loop")
    saved = trained(case, state_dtype="int8").state_dict()
    state = saved["state"][0]
    saved["state"][0] = {key: x for key, x in state.items() if key != "exp_avg_scale"}
    with pytest.raises(ValueError, match=r"'exp_avg_codes' of parameter 0 .* without 'exp_avg_scale'"):
        case.make(params(), state_dtype="int8").load_state_dict(saved)
    assert storage.holds(state, "exp_avg")


# From one storage format to another

KINDS: dict[str, Any] = {
    "plain": {},
    "fp32": {"state_dtype": "fp32"},
    "bf16": {"state_dtype": "bf16"},
    "int8": {"state_dtype": "int8"},
    "mixed": {"state_dtype": {"exp_avg": "int8"}},
}
ADAMW = next(case for case in LOOPS if str(case) == "AdamW-loop")


def as_created(optimizer: Any) -> dict[Any, Any]:
    """For each parameter: its keys and dtypes, as a new optimizer of the same kind creates them."""
    return {place: {key: x.dtype for key, x in state.items()} for place, state in enumerate(states(optimizer))}


def states(optimizer: Any) -> list[Any]:
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("here", KINDS)
@pytest.mark.parametrize("there", KINDS)
@pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")
def test_state_is_stored_as_the_optimizer_was_constructed_to(there: str, here: str, dtype: torch.dtype) -> None:
    source = trained(ADAMW, dtype, **KINDS[there])
    target, fresh = (ADAMW.make(params(dtype), **KINDS[here]) for _ in range(2))
    fresh.init_state()
    report = target.load_state_dict(source.state_dict())
    assert as_created(target) == as_created(fresh)
    assert target.param_groups[0].get("state_dtype") == KINDS[here].get("state_dtype")
    pairs = list(zip(as_created(source).values(), as_created(target).values(), strict=True))
    differ = any(new.get(key) != kept for old, new in pairs for key, kept in old.items())
    assert bool(report.converted or report.unexpected) == differ
    for old, new in zip(states(source), states(target), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            was, now = (storage.load(x, key).float() for x in (old, new))
            if as_created(source) == as_created(target):
                assert torch.equal(was, now)
            assert torch.allclose(was, now, rtol=0.07, atol=was.abs().max().item() * 2**-16)
    assert steprule.memory_report(target).state_bytes == sum(
        x.numel() * x.element_size() for state in states(target) for x in state.values()
    )
    ADAMW.advance(target, 1, first=3)


@pytest.mark.parametrize("there", ["int8", "bf16", "plain"])
def test_the_files_storage_can_be_asked_for(there: str) -> None:
    source = trained(ADAMW, **KINDS[there])
    target = (
        ADAMW.make(params(), state_dtype="fp16" if there == "bf16" else None)
        if there != "bf16"
        else (ADAMW.make(params(), state_dtype={"exp_avg": "fp16"}))
    )
    report = target.load_state_dict(source.state_dict(), hyperparams={"state_dtype": "saved"})
    assert not report.converted
    assert as_created(target) == as_created(source)
    assert target.param_groups[0].get("state_dtype") == source.param_groups[0].get("state_dtype")


@pytest.mark.parametrize("choice", ["saved", "current", {"lr": "current"}])
def test_the_default_of_hyperparams_does_not_choose_the_storage(choice: Any) -> None:
    target = ADAMW.make(params(), lr=0.5)
    report = target.load_state_dict(trained(ADAMW, state_dtype="int8").state_dict(), hyperparams=choice)
    assert "state_dtype" not in target.param_groups[0]
    assert states(target)[0]["exp_avg"].dtype == torch.float32
    assert "'int8' in the checkpoint, None here: current value taken" in str(report)
    assert "parameter 0: exp_avg " in str(report)


def test_what_nobody_asks_for_keeps_its_dtype() -> None:
    """A checkpoint with fp32 state for parameters that are now bf16, as some trainers write it."""
    saved = trained(ADAMW).state_dict()
    target = ADAMW.make(params(torch.bfloat16), low_precision="none")
    assert not target.load_state_dict(saved).converted
    assert states(target)[0]["exp_avg"].dtype == torch.float32
    again = ADAMW.make(params(torch.bfloat16), low_precision="none")
    again.load_state_dict(target.state_dict())
    assert states(again)[0]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("here", [None, "none", "stochastic", "kahan", "master"])
@pytest.mark.parametrize("there", ["none", "stochastic", "kahan", "master"])
def test_what_16_bits_leave_out_is_kept_as_constructed_and_the_rest_reported(there: str, here: Any) -> None:
    source = trained(ADAMW, torch.bfloat16, low_precision=there, lr=0.1)
    target = ADAMW.make(params(torch.bfloat16), low_precision=here)
    report = target.load_state_dict(source.state_dict())
    beside = {"stochastic": "rounding_key", "kahan": "compensation", "master": "low_bits"}
    kept = {beside.get(here)} - {None}
    assert set(states(target)[0]) == {"step", "exp_avg", "exp_avg_sq"} | kept
    dropped = {beside[there]} - kept if there in beside else set()
    assert set(report.unexpected) == {f"parameter {i}: {key}" for i in (0, 1) for key in dropped}
    added = kept & {"compensation", "low_bits"} if there != here else set[str]()
    assert {change.what for change in report.converted} == {
        f"parameter {i}: {x}" for i in (0, 1) for x in added
    }
    if there == here:
        assert_same(target.state_dict()["state"], source.state_dict()["state"])


def test_elements_too_large_for_fp16_are_refused_by_name() -> None:
    saved = trained(ADAMW).state_dict()
    saved["state"][0]["exp_avg"][3, 3] = 1e5
    target = ADAMW.make(params(), state_dtype={"exp_avg": "fp16"})
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 has elements that are too large for"):
        target.load_state_dict(saved)
    assert target.load_state_dict(saved, strict=False).nonfinite == ("parameter 0: exp_avg",)


def test_codes_of_a_channels_last_parameter_come_back_in_its_layout() -> None:
    made = [nn.Parameter(numbers((32, 16, 3, 3), torch.float32, 1).to(memory_format=torch.channels_last))]
    source = ADAMW.make(made, state_dtype="int8")
    source.init_state()
    target = ADAMW.make(made)
    target.load_state_dict(source.state_dict())
    assert target.state[made[0]]["exp_avg"].stride() == made[0].stride()


# For torch


@each(lambda case: case.torch_class is not None and not case.closure and not case.sparse_only, among=LOOPS)
def test_torch_goes_on_from_a_converted_checkpoint(case: Case) -> None:
    """From fp32 with torch's own results; from codes with their decoded values."""
    kinds = ["int8", "bf16"] if case.name != "Muon" else ["int8"]
    for kind in [None, *(kind for kind in kinds if can_store(case, kind))]:
        shapes = None if case.name != "Muon" else (SHAPE, (5, 3))
        ours = case.make(case.parameters(shapes=shapes or ((70, 90), (5,))), state_dtype=kind)
        case.advance(ours, 3)
        converted, report = steprule.convert_state(ours.state_dict(), from_=case.rule, to="torch")
        assert report.to == f"torch.optim.{case.name}"
        plain = case.make([nn.Parameter(p.detach().clone()) for p in flat(ours)], nonfinite="ignore")
        plain.load_state_dict(ours.state_dict())
        theirs = case.make_torch([nn.Parameter(p.detach().clone()) for p in flat(ours)])
        assert {key for group in converted["param_groups"] for key in group} <= {"params", *theirs.defaults}
        theirs.load_state_dict(converted)
        for optimizer in (plain, theirs):
            case.advance(optimizer, 2, first=3)
        for p, q in zip(flat(theirs), flat(plain), strict=True):
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_without_the_rule_what_only_steprule_knows_is_dropped() -> None:
    ours = trained(ADAMW, torch.bfloat16, state_dtype="int8", low_precision="kahan", nonfinite="skip", lr=0.1)
    converted, report = steprule.convert_state(ours.state_dict(), to="torch")
    assert set(converted["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "decoded from 8 bits" in str(report)
    assert {"compensation", "slot_rounding_key", "state_dtype (group 0)"} <= set(report.dropped)
    theirs = torch.optim.AdamW(params(torch.bfloat16))
    theirs.load_state_dict(converted)
    for p in theirs.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    theirs.step()


@pytest.mark.parametrize(
    ("make", "rule", "message"),
    [
        (lambda p: steprule.AdaBelief(p), "AdaBelief", "torch.optim has no AdaBelief"),
        (lambda p: steprule.Adam(p, optimized_update=True), "Adam", "has no optimized_update, which is True"),
        (
            lambda p: steprule.AdamW(p, weight_decay=steprule.WeightDecay(0.1, absolute=True)),
            None,
            "group 0 decays weights in the mode 'absolute'",
        ),
        (lambda p: steprule.SGD(p, weight_decay=steprule.WeightDecay(0.1)), "SGD", "in the mode 'decoupled'"),
    ],
)
def test_what_torch_cannot_do_is_refused(make: Any, rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"convert_state: .*{message}"):
        steprule.convert_state(make(params()).state_dict(), from_=rule, to="torch")
