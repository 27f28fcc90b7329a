"""The state of one rule as the state of another: what means the same is kept, and no step becomes too large."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from rules import Case, assert_same, numbers
from torch import Tensor, nn

import steprule
from steprule import AdaBelief, AdamW, Lion, convert_state
from steprule.engine import storage

RULES = {name: rule for name, rule in steprule.catalogue().items() if name != "LBFGS"}
PAIRS = list(itertools.product(RULES, RULES))


def made(rule: Any, **options: Any) -> Any:
    params = [("a", nn.Parameter(numbers((4, 3), torch.float32, 1))), ("b", nn.Parameter(torch.ones(3, 5)))]
    return rule(params, **options)


def noisy(optimizer: Any, steps: int, first: int = 0) -> None:
    """Steps with gradients that are mostly noise, as in the middle of training."""
    case = Case(type(optimizer))
    for number in range(first, first + steps):
        for place, param in enumerate(optimizer.param_groups[0]["params"]):
            gradient = 0.1 + numbers(tuple(param.shape), param.dtype, 1000 * number + place)
            param.grad = gradient.to_sparse(1) if case.sparse_only else gradient
        case.step(optimizer)


def trained(rule: Any, steps: int = 60, **options: Any) -> Any:
    optimizer = made(rule, **options)
    noisy(optimizer, steps)
    return optimizer


def longest_steps(optimizer: Any) -> float:
    """The largest change of any element in one of five steps."""
    longest = 0.0
    for number in range(100, 105):
        before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        noisy(optimizer, 1, first=number)
        after = optimizer.param_groups[0]["params"]
        longest = max(
            longest, *((x.detach() - y).abs().max().item() for x, y in zip(after, before, strict=True))
        )
    return longest


@pytest.mark.filterwarnings("ignore:Sophia. update_hessian was never called")
@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_every_pair_loads_and_steps_no_farther_than_from_a_fresh_start(old: str, new: str) -> None:
    converted, report = convert_state(trained(RULES[old]).state_dict(), from_=old, to=new)
    optimizer = made(RULES[new])
    loaded = optimizer.load_state_dict(converted)
    optional = {f"{name}: max_exp_avg_sq" for name in "ab"}
    assert optional.issuperset((*loaded.missing, *loaded.unexpected))
    if old != new:
        fresh = made(RULES[new])
        assert longest_steps(optimizer) < 3 * longest_steps(fresh)
    else:
        assert not report.dropped
        kept = [state for state in optimizer.state_dict()["state"].values() if state]
        wanted = [state for state in trained(RULES[old]).state_dict()["state"].values() if state]
        assert_same(kept, wanted)


def test_adamw_to_adabelief() -> None:
    source = trained(AdamW)
    saved = source.state_dict()
    before = copy.deepcopy(saved)
    converted, report = convert_state(saved, from_="AdamW", to="AdaBelief")
    assert_same(saved, before)
    optimizer = made(AdaBelief, lr=0.25)
    optimizer.load_state_dict(converted)
    for param, old in zip(optimizer.param_groups[0]["params"], saved["state"].values(), strict=True):
        state = optimizer.state[param]
        assert_same(state["exp_avg"], old["exp_avg"])
        assert_same(state["exp_avg_var"], old["exp_avg_sq"])
        assert_same(state["step"], old["step"])
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert list(report.kept) == ["step", "exp_avg", "exp_avg_var"]
    assert "which is larger" in report.kept["exp_avg_var"]
    assert (report.dropped, report.reset) == ((), ())
    lines = [line.split(maxsplit=2) for line in str(report).splitlines()]
    assert lines[0] == ["from", "AdamW", "to AdaBelief"]
    assert ["kept", "step", "AdamW's step"] in lines


@pytest.mark.parametrize(
    ("old", "new", "kept", "dropped", "reset"),
    [
        ("AdamW", "Lion", {"step", "exp_avg"}, {"exp_avg_sq"}, set()),
        ("AdamW", "RMSprop", {"step", "square_avg"}, {"exp_avg"}, set()),
        ("RMSprop", "Adam", {"step", "exp_avg_sq"}, set(), {"exp_avg"}),
        ("Adadelta", "RMSprop", {"step", "square_avg"}, {"acc_delta"}, set()),
        ("Muon", "Lion", {"exp_avg"}, set(), {"step"}),
        ("NAdam", "RAdam", {"step", "exp_avg", "exp_avg_sq"}, {"mu_product"}, set()),
        ("AdamW", "LAMB", {"step", "exp_avg", "exp_avg_sq"}, set(), set()),
        ("LAMB", "NAdamW", {"step", "exp_avg", "exp_avg_sq"}, set(), set()),
        ("Adam", "AdamAtan2", {"step", "exp_avg", "exp_avg_sq"}, set(), set()),
        ("NAdamW", "AdEMAMix", {"step", "exp_avg", "exp_avg_sq"}, set(), {"exp_avg_slow"}),
        ("AdEMAMix", "Signum", {"step", "exp_avg"}, {"exp_avg_slow", "exp_avg_sq"}, set()),
        ("AdamW", "LaProp", {"step", "exp_avg_sq"}, {"exp_avg"}, {"exp_avg"}),
        ("Adan", "Lion", {"step", "exp_avg"}, {"exp_avg_diff", "exp_avg_sq", "prev"}, set()),
        ("Signum", "Muon", {"momentum_buffer"}, {"step"}, set()),
        ("Muon", "NorMuon", {"momentum_buffer"}, set(), {"step", "second_momentum_buffer"}),
        # Without the divisor nothing is kept.
        ("AdamW", "StableAdamW", set(), {"step", "exp_avg", "exp_avg_sq"}, {"step", "exp_avg", "exp_avg_sq"}),
        ("AdamW", "Yogi", set(), {"step", "exp_avg", "exp_avg_sq"}, {"step", "exp_avg", "exp_avg_sq"}),
        ("Lion", "AdamW", set(), {"step", "exp_avg"}, {"step", "exp_avg", "exp_avg_sq"}),
        ("AdamW", "Adamax", set(), {"step", "exp_avg", "exp_avg_sq"}, {"step", "exp_avg", "exp_inf"}),
        ("AdamW", "Sophia", set(), {"step", "exp_avg", "exp_avg_sq"}, {"step", "exp_avg", "hessian"}),
        ("AdaHessian", "Lion", {"step", "exp_avg"}, {"exp_hessian_diag_sq", "estimates"}, set()),
        ("AdamW", "AdaHessian", set(), {"step", "exp_avg", "exp_avg_sq"},
         {"step", "exp_avg", "exp_hessian_diag_sq", "estimates"}),
        ("AdaBelief", "Adam", set(), {"step", "exp_avg", "exp_avg_var"}, {"step", "exp_avg", "exp_avg_sq"}),
        ("Adam", "NAdam", set(), {"step", "exp_avg", "exp_avg_sq"},
         {"step", "exp_avg", "exp_avg_sq", "mu_product"}),
        # A sum of gradients is not a mean.
        ("AdamW", "SGD", set(), {"step", "exp_avg", "exp_avg_sq"}, set()),
        ("RMSprop", "Adagrad", set(), {"step", "square_avg"}, {"step", "sum"}),
    ],
)  # fmt: skip
def test_what_is_kept(old: str, new: str, kept: set[str], dropped: set[str], reset: set[str]) -> None:
    converted, report = convert_state(trained(RULES[old]).state_dict(), old, new)
    assert (set(report.kept), set(report.dropped), set(report.reset)) == (kept, dropped, reset)
    for state in converted["state"].values():
        for key in kept:
            assert isinstance(state[key], (Tensor, int))
    assert bool(converted["state"]) == bool(kept)


def test_the_largest_square_goes_along_where_both_keep_one() -> None:
    saved = trained(AdamW, amsgrad=True).state_dict()
    converted, report = convert_state(saved, "AdamW", "AMSGrad")
    assert_same(converted["state"][0]["max_exp_avg_sq"], saved["state"][0]["max_exp_avg_sq"])
    assert report.dropped == ()
    # The new optimizer may do without, and says so.
    loaded = made(steprule.Adam).load_state_dict(convert_state(saved, "AdamW", "Adam")[0])
    assert loaded.unexpected == ("a: max_exp_avg_sq", "b: max_exp_avg_sq")


def test_a_parameter_without_state_stays_without() -> None:
    source = made(AdamW)
    source.param_groups[0]["params"][1].requires_grad_(False)
    source.param_groups[0]["params"][0].grad = torch.ones(4, 3)
    source.step()
    converted, _ = convert_state(source.state_dict(), AdamW, Lion)
    assert set(converted["state"]) == {0}


@pytest.mark.parametrize(
    ("saved", "old", "new", "message"),
    [
        ({}, "AdamW", "Lion", "not a state dict"),
        ([], "AdamW", "Lion", "not a state dict"),
        (None, "AdamV", "Lion", "no rule 'AdamV'. Did you mean 'Adam'"),
        (None, "AdamW", "Lyon", "no rule 'Lyon'. Did you mean 'Lion'"),
        (None, "Adagrad", "Lion", "'exp_avg', which Adagrad does not keep"),
    ],
)
def test_what_cannot_be_converted(saved: Any, old: str, new: str, message: str) -> None:
    given = trained(AdamW, 1).state_dict() if saved is None else saved
    with pytest.raises(ValueError, match=f"convert_state: .*{message}"):
        convert_state(given, old, new)


# State in fewer bits


STORED: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "bf16": (torch.float32, {"state_dtype": "bf16"}),
    "kahan": (torch.bfloat16, {"low_precision": "kahan"}),
    "master": (torch.bfloat16, {"low_precision": "master", "state_dtype": "int8"}),
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("new", ["Adam", "AdaBelief", "Lion", "RMSprop"])
def test_what_is_stored_in_fewer_bits_goes_along(new: str, kind: str) -> None:
    dtype, options = STORED[kind]
    param = nn.Parameter(numbers((64, 80), dtype, 1))
    old = AdamW([param], **options)
    noisy(old, 5)
    converted, report = convert_state(old.state_dict(), from_="AdamW", to=new)
    assert not [key for key in report.dropped if "_scale" in key or "_key" in key]
    optimizer = RULES[new]([param], **options)
    optimizer.load_state_dict(converted)
    before = {key: value.clone() for key, value in old.state[param].items()}
    for key, value in optimizer.state[param].items():
        source = next((x for x in before if report.kept.get(key, "").startswith(f"AdamW's {x}:")), key)
        if key in report.kept or key in ("compensation", "low_bits", "slot_rounding_key"):
            assert_same(value, before[source], key)
    noisy(optimizer, 2, first=5)
    assert param.isfinite().all()


def test_a_rule_on_matrices_keeps_codes() -> None:
    param = nn.Parameter(numbers((64, 80), torch.float32, 1))
    old = AdamW([param], state_dtype="int8")
    noisy(old, 3)
    converted, _ = convert_state(old.state_dict(), from_="AdamW", to="Muon")
    (state,) = converted["state"].values()
    assert set(state) == {"momentum_buffer_codes", "momentum_buffer_scale", "slot_rounding_key"}
    assert_same(storage.load(state, "momentum_buffer"), storage.load(old.state[param], "exp_avg"))
