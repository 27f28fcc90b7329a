"""Prodigy, DAdaptAdam and DoG over several tensors and groups: what they share, and when it stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from papers import dadaptadam, dog, dowg, prodigy
from rules import assert_same, assert_same_run, flat, numbers, snapshot
from torch import nn

import steprule

SHAPES = [[(3, 4), (50, 7)], [(17,), ()]]
RUNNERS = {"loop": {"foreach": False, "fused": False}, "lists": {"foreach": True}, "kernel": {"fused": True}}
# The paper, what it is for one long vector of, and options with which it soon moves.
RULES: dict[Any, tuple[Any, str, dict[str, Any]]] = {
    steprule.Prodigy: (prodigy, "all", {"d0": 0.05, "weight_decay": 0.1}),
    steprule.DAdaptAdam: (dadaptadam, "all", {"d0": 0.05, "betas": (0.5, 0.9), "weight_decay": 0.1}),
    steprule.DoG: (dog, "group", {"reps_rel": 0.01, "weight_decay": 0.1}),
    steprule.LDoG: (dog, "tensor", {"reps_rel": 0.01}),
    steprule.DoWG: (dowg, "group", {"reps_rel": 0.05}),
}
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
each_runner = pytest.mark.parametrize("runner", RUNNERS)


def made(rule: Any, runner: str, dtype: torch.dtype = torch.float64) -> Any:
    params = [[nn.Parameter(numbers(shape, dtype, 7)) for shape in group] for group in SHAPES]
    return rule([{"params": group} for group in params], **RULES[rule][2], **RUNNERS.get(runner, {}))


def advance(optimizer: Any, first: int, last: int, without: Any = ()) -> Any:
    for step in range(first, last):
        for place, param in enumerate(flat(optimizer)):
            given = place not in without
            param.grad = numbers(tuple(param.shape), param.dtype, 100 * step + place) if given else None
        optimizer.step()
    return optimizer


def vectors(optimizer: Any, per: str, value: Any) -> list[np.ndarray]:
    """One vector for each set of parameters that share their sums."""
    groups = [group["params"] for group in optimizer.param_groups]
    sets = {"all": [flat(optimizer)], "group": groups, "tensor": [[p] for p in flat(optimizer)]}[per]
    return [np.concatenate([value(p).detach().double().numpy().ravel() for p in params]) for params in sets]


@each_rule
@pytest.mark.parametrize("runner", [*RUNNERS, "gpu"])
def test_tensors_that_share_sums_are_one_long_vector(
    rule: Any, runner: str, request: pytest.FixtureRequest
) -> None:
    paper, per, options = RULES[rule]
    if runner == "gpu":
        request.getfixturevalue("on_a_gpu")
    optimizer = made(rule, runner)
    theta = vectors(optimizer, per, lambda p: p)
    states = [paper.init(x, **options) for x in theta]
    for t in range(1, 13):
        advance(optimizer, t, t + 1)
        gradients = vectors(optimizer, per, lambda p: p.grad)
        triples = zip(theta, gradients, states, strict=True)
        theta = [paper.step(x, g, state, t, **options) for x, g, state in triples]
    # What a tensor has one of is kept in single precision.
    tolerance = 1e-6 if per == "tensor" else 1e-12
    for given, wanted in zip(vectors(optimizer, per, lambda p: p), theta, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=tolerance, atol=tolerance)


@each_rule
@each_runner
def test_without_any_gradient_nothing_moves(rule: Any, runner: str) -> None:
    optimizer = advance(made(rule, runner), 0, 3)
    kept = snapshot(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(snapshot(optimizer), kept)
    fresh = made(rule, runner)
    kept = snapshot(fresh)
    fresh.step()
    assert_same(snapshot(fresh), kept)


@each_rule
@each_runner
def test_zero_gradients_leave_the_step_size_finite(rule: Any, runner: str) -> None:
    optimizer = made(rule, runner)
    for param in flat(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(param.isfinite().all() for param in flat(optimizer))
    advance(optimizer, 0, 2)
    assert all(param.isfinite().all() for param in flat(optimizer))


@each_rule
@each_runner
def test_a_parameter_without_a_gradient_stays_and_joins_later(rule: Any, runner: str) -> None:
    optimizer, loop = made(rule, runner), made(rule, "loop")
    before = flat(optimizer)[1].detach().clone()
    for one in (optimizer, loop):
        advance(one, 0, 3, without=[1])
    assert_same(flat(optimizer)[1].detach(), before)
    for one in (optimizer, loop):
        advance(one, 3, 6)
    assert not torch.equal(flat(optimizer)[1], before)
    for given, wanted in zip(flat(optimizer), flat(loop), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)


@each_rule
@each_runner
@pytest.mark.parametrize("hyperparams", ["saved", "current"])
def test_a_checkpoint_in_mid_training_goes_on_with_the_same_bits(
    rule: Any, runner: str, hyperparams: Any
) -> None:
    whole = advance(made(rule, runner), 0, 6)
    first = advance(made(rule, runner), 0, 3)
    second = made(rule, runner)
    for here, there in zip(flat(second), flat(first), strict=True):
        here.data.copy_(there.data)
    report = second.load_state_dict(copy.deepcopy(first.state_dict()), hyperparams=hyperparams)
    assert "hyper-parameter" not in str(report)
    assert_same_run(advance(second, 3, 6), whole)
    assert_same(second.state_dict()["param_groups"], whole.state_dict()["param_groups"])


def test_prodigy_decays_by_the_old_d_and_has_the_new_one_beside_eps() -> None:
    """d0 = 1, ε = 1, β = (½, ¾), λ = ½: d grows in the second step, which is still by 1."""
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = steprule.Prodigy([param], d0=1.0, eps=1.0, betas=(0.5, 0.75), weight_decay=0.5, d_coef=20)
    param.grad = torch.ones_like(param)
    optimizer.step()
    # m = ½, v = ¼, r = 0, s = 1; d stays 1
    first = -0.5 / (0.5 + 1)
    assert param.item() == pytest.approx(first, rel=1e-14)
    optimizer.step()
    # m = ¾, v = 7/16; r = -first, s = √¾ + 1; d = 20·r/s
    d = 20 * -first / (0.75**0.5 + 1)
    assert optimizer.param_groups[0]["d"] == pytest.approx(d, rel=1e-14)
    wanted = first * (1 - 0.5) - 0.75 / ((7 / 16) ** 0.5 + d)
    assert param.item() == pytest.approx(wanted, rel=1e-14)
