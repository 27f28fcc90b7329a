"""Modifiers: on every rule, in every runner, alone and together, they do what their papers say."""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from papers import modifiers as meant
from rules import (
    assert_same,
    by_lines,
    estimate_curvature,
    flat,
    matrices_only,
    numbers,
    sums_of,
    uses_curvature,
)
from test_rules import FOLLOWS
from torch import nn

import steprule

RUNNERS = {
    "loop": {"foreach": False, "fused": False},
    "lists": {"foreach": True, "fused": False},
    "kernel": {"fused": True},
}
# Limits that are met now and then.
OPTIONS: dict[str, dict[str, Any]] = {
    "GlobalNormClip": {"max_norm": 4.0},
    "NormClip": {"max_norm": 4.0},
    "ValueClip": {"clip_value": 0.7},
    "AdaptiveClip": {"clip_factor": 0.8},
    "MARSCorrection": {"gamma": 0.3, "beta": 0.5},
    "GrokFast": {"decay": 0.7},
    "UpdateClip": {"max_rms": 0.7},
    "EMA": {"decay": 0.9},
    "Average": {"start": 3},
    "Lookahead": {"every": 3, "step_back": 0.4},
    "Cautious": {"floor": 0.5},
    "OuterNesterov": {"every": 3},
    "RadialBrake": {"growth": 0.3},
    "ToStart": {"strength": 0.5},
    "Noise": {"sigma": 0.3, "seed": 2**32 + 5},
}
# SAM and ASAM need the loss twice: tests/test_sam.py.
MODIFIERS = {x.__name__: x for x in steprule.modifier_catalogue().values() if not hasattr(x, "climb")}
RULES = {
    name: rule
    for name, rule in steprule.catalogue().items()
    if name not in ("LBFGS", "SparseAdam") and not hasattr(rule, "evaluate")
}
NO_CHANGE = {"ASGD"}
TOLERANCE = {"ASGD": 1e-6, "LDoG": 1e-6}
STEPS = 8


def pairs() -> list[Any]:
    """Every rule with every modifier, in every runner."""
    found: list[Any] = []
    for name, rule in RULES.items():
        for modifier in MODIFIERS.values():
            changes = hasattr(modifier, "change")
            if "seed" in rule.fields and "seed" in modifier.fields:
                continue  # what both draw is numbered together: tests/test_draws.py
            if name in modifier.not_with or (changes and name in NO_CHANGE):
                continue
            lists = [] if by_lines(rule) or by_lines(modifier) else ["lists"]
            runners = ["loop", *lists, "kernel"]
            found += [
                pytest.param(name, modifier.__name__, x, id=f"{name}-{modifier.__name__}-{x}") for x in runners
            ]
    return found


def own_options(name: str, rule: Any) -> dict[str, Any]:
    return {"weight_decay": 0.0} if "weight_decay" in rule.fields else {}


def trained(
    name: str, given: list[str], runner: str, steps: int = STEPS
) -> tuple[Any, list[np.ndarray], list[np.ndarray]]:
    """An optimizer after some steps, and what its weights and those to evaluate with are meant to be."""
    rule = RULES[name]
    file, fixed = FOLLOWS.get(name, (name.lower(), {}))
    paper = importlib.import_module(f"papers.{file}")
    fixed = fixed | own_options(name, rule)
    random = np.random.default_rng(7)
    # The transcriptions of rules with sums over all parameters know one tensor.
    shapes = ((9, 6),) if sums_of(rule) & {"group", "all"} else ((7, 5), (4, 3), (3, 6), (5,))
    shapes = shapes[:3] if matrices_only(rule) else shapes
    # Where gradients have more than one direction less than a side has elements, its first basis is arbitrary.
    shapes = ((5, 6), (3, 4), (4, 5), (5,)) if name == "SOAP" else shapes
    thetas = [random.standard_normal(shape) for shape in shapes]
    params = [nn.Parameter(torch.from_numpy(x.copy())) for x in thetas]
    groups = [{"params": x} for x in (params[:2], params[2:]) if x]
    modifiers = [MODIFIERS[x](**OPTIONS.get(x, {})) for x in given]
    flags = RUNNERS[runner]
    optimizer = rule(groups, modifiers=modifiers, **own_options(name, rule), **flags)
    lr = optimizer.param_groups[0].get("lr", 1.0)
    known = inspect.signature(paper.init).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    states = [paper.init(x, **{k: v for k, v in fixed.items() if takes_all or k in known}) for x in thetas]
    if "seed" in rule.fields:
        for place, state in enumerate(states):
            state["place"] = place
    wanted = [getattr(meant, x)(**OPTIONS.get(x, {})) for x in given]
    for t in range(1, steps + 1):
        gs = [random.standard_normal(x.shape) for x in thetas]
        for param, g in zip(params, gs, strict=True):
            param.grad = torch.from_numpy(g.copy())
        if uses_curvature(rule):
            estimate_curvature(optimizer)
            for modifier in wanted:
                modifier.estimated()
            for g, state in zip(gs, states, strict=True):
                paper.update_hessian(g, state, *([4] if name == "Sophia" else []))
        optimizer.step()
        for modifier in wanted:
            gs = modifier.gradients(thetas, gs)
        moved = thetas
        for modifier in wanted:
            moved = modifier.parameters(moved, lr)
        seen = moved if rule.decays_first else thetas
        ended = [paper.step(x, g, s, t, **fixed) for x, g, s in zip(seen, gs, states, strict=True)]
        us = [new - old for new, old in zip(ended, seen, strict=True)]
        for modifier in wanted:
            us = modifier.changes(thetas, gs, us, lr)
        news = [x + u for x, u in zip(moved, us, strict=True)]
        for modifier in wanted:
            news = modifier.applied(thetas, news, lr)
        thetas = news
    evaluated = thetas
    for modifier in wanted:
        evaluated = modifier.evaluated(evaluated)
    return optimizer, thetas, evaluated


def assert_close(optimizer: Any, wanted: list[np.ndarray], tolerance: float) -> None:
    for param, value in zip(flat(optimizer), wanted, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("iterations_in_double")
@pytest.mark.parametrize(("name", "modifier", "runner"), pairs())
def test_on_every_rule_it_does_what_its_paper_says(name: str, modifier: str, runner: str) -> None:
    optimizer, wanted, evaluated = trained(name, [modifier], runner)
    # What is kept once per tensor, such as the radius of a ball, is kept in single precision.
    tolerance = max(TOLERANCE.get(name, 1e-9), 1e-6 if modifier in ("Hyperball", "ScheduleFree") else 0.0)
    # In a direction that no gradient has, it divides rounding by rounding.
    tolerance = 1e-6 if (name, modifier) == ("SOAP", "Centralize") else tolerance
    # These divide by how far the weights have moved, which is next to nothing at first.
    tolerance *= 100 if name in ("DAdaptAdam", "DoG", "LDoG", "DoWG", "Prodigy") else 1
    assert_close(optimizer, wanted, tolerance)
    before = [p.detach().clone() for p in flat(optimizer)]
    optimizer.eval()
    assert_close(optimizer, evaluated, tolerance)
    optimizer.train()
    assert_same([p.detach() for p in flat(optimizer)], before)


TOGETHER = [
    "GlobalNormClip",
    "NormClip",
    "ValueClip",
    "AdaptiveClip",
    "Centralize",
    "MARSCorrection",
    "OrthoGrad",
    "GrokFast",
    "Grams",
    "Cautious",
    "UpdateClip",
    "TrustRatio",
    "EMA",
    "Average",
    "Lookahead",
    "Hyperball",
    "OuterNesterov",
    "RadialBrake",
    "ToStart",
    "Noise",
]


@given(
    rule=st.sampled_from(["AdamW", "SGD", "Lion", "RAdam", "NAdam", "Adamax"]),
    given=st.lists(st.sampled_from(TOGETHER), min_size=2, max_size=4, unique=True),
    runner=st.sampled_from(["loop", "lists"]),
)
def test_several_together_act_in_order(rule: str, given: list[str], runner: str) -> None:
    kinds = [MODIFIERS[x] for x in given]
    refused = any(y.__name__ in x.not_with for x in kinds for y in kinds)
    refused |= sum(hasattr(x, "evaluate") for x in kinds) > 1
    if refused:
        with pytest.raises(ValueError, match="does not go with"):
            trained(rule, given, runner, 0)
        return
    if runner == "lists" and any(map(by_lines, kinds)):
        with pytest.raises(RuntimeError, match="torch's lists of tensors have no rows and columns"):
            trained(rule, given, runner)
        return
    optimizer, wanted, evaluated = trained(rule, given, runner)
    tolerance = 1e-6 if "Hyperball" in given else 1e-8
    assert_close(optimizer, wanted, tolerance)
    with optimizer.averaged_weights():
        assert_close(optimizer, evaluated, tolerance)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_gradient_along_the_weights_stays_as_it_is(runner: str) -> None:
    """What rounding leaves of its orthogonal part must not be made as long as the gradient."""
    along = numbers((20, 3), torch.float32, seed=1)
    params = [nn.Parameter(x.clone()) for x in (*along, *along[:, 0], torch.zeros(5))]
    wanted: list[torch.Tensor] = []
    for place, param in enumerate(params):
        zero = not param.detach().any()
        param.grad = torch.arange(5.0) if zero else (0.1 + place / 7) * param.detach()
        wanted.append(param.detach() - param.grad)
    steprule.SGD(params, lr=1.0, modifiers=[steprule.OrthoGrad()], **RUNNERS[runner]).step()
    assert_same([p.detach() for p in params], wanted)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    ("rule", "options", "beta"),
    [("AdamW", {"betas": (0.8, 0.9)}, 0.8), ("SGD", {"momentum": 0.7}, 0.7), ("Adagrad", {}, 0.95)],
)
def test_the_correction_takes_the_momentum_of_the_rule(
    rule: str, options: dict[str, Any], beta: float, runner: str
) -> None:
    ends: list[Any] = []
    for chosen in (None, beta):
        param = nn.Parameter(numbers((6, 4), torch.float64, seed=1))
        modifiers = [steprule.MARSCorrection(0.3, beta=chosen)]
        optimizer = RULES[rule]([param], modifiers=modifiers, **options, **RUNNERS[runner])
        for step in range(3):
            param.grad = numbers((6, 4), torch.float64, seed=10 + step)
            optimizer.step()
        ends.append(param.detach())
    assert_same(*ends)


# Weight decay


def decayed(mode: str, theta: Any, u: Any, lr: float, peak: float) -> Any:
    """θ before the change u is added, with λ = 0.1."""
    if mode == "independent":
        return theta * (1 - 0.1 * lr / peak)
    if mode == "corrected":
        return theta * (1 - 0.1 * lr * lr / peak)
    return np.where(u * theta <= 0, theta * (1 - 0.1 * lr), theta)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("mode", ["independent", "corrected", "cautious"])
@pytest.mark.parametrize("rule", ["SGD", "AdamW", "Lion"])
def test_decay_relative_to_the_peak_and_cautious_decay(rule: str, mode: str, runner: str) -> None:
    file, fixed = FOLLOWS.get(rule, (rule.lower(), {}))
    paper = importlib.import_module(f"papers.{file}")
    random = np.random.default_rng(3)
    theta = random.standard_normal((8, 5))
    param = nn.Parameter(torch.from_numpy(theta.copy()))
    decay = steprule.WeightDecay(0.1, mode=mode)
    optimizer = RULES[rule]([param], lr=0.2, weight_decay=decay, **RUNNERS[runner])
    (group,) = optimizer.param_groups
    assert group["weight_decay_mode"] == mode
    assert group.get("peak_lr") == (None if mode == "cautious" else 0.2)
    state = paper.init(theta)
    for t, lr in enumerate((0.05, 0.2, 0.1, 0.02), 1):
        group["lr"] = lr
        g = random.standard_normal(theta.shape)
        param.grad = torch.from_numpy(g.copy())
        optimizer.step()
        own = {**fixed, "weight_decay": 0.0}
        if mode == "cautious":
            u = paper.step(theta, g, state, t, lr=lr, **own) - theta
            theta = decayed(mode, theta, u, lr, 0.2) + u
        else:
            theta = paper.step(decayed(mode, theta, None, lr, 0.2), g, state, t, lr=lr, **own)
    np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-10, atol=1e-10)
    other = RULES[rule]([nn.Parameter(torch.zeros(8, 5, dtype=torch.float64))], lr=0.2, weight_decay=decay)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0].get("peak_lr") == group.get("peak_lr")


@pytest.mark.parametrize("runner", RUNNERS)
def test_l2_decay_comes_after_clipping_and_decoupled_decay_before_the_change(runner: str) -> None:
    theta, g = numbers((6, 4), torch.float64, seed=1), numbers((6, 4), torch.float64, seed=2)
    clipped = g * min(1.0, 0.5 / float(torch.linalg.vector_norm(g)))
    for mode, wanted in (
        ("l2", theta - 0.1 * (clipped + 0.3 * theta)),
        ("decoupled", theta * (1 - 0.1 * 0.3) - 0.1 * clipped),
    ):
        param = nn.Parameter(theta.clone())
        param.grad = g.clone()
        decay = steprule.WeightDecay(0.3, mode=mode)
        clip = [steprule.GlobalNormClip(0.5)]
        steprule.SGD([param], lr=0.1, weight_decay=decay, modifiers=clip, **RUNNERS[runner]).step()
        torch.testing.assert_close(param.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_every_group_has_its_own_peak() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    decay = steprule.WeightDecay(0.1, mode="independent")
    groups = [{"params": [params[0]], "lr": 0.01}, {"params": [params[1]]}]
    optimizer = steprule.AdamW(groups, lr=0.1, weight_decay=decay)
    optimizer.add_param_group({"params": [params[2]], "lr": 0.5, "peak_lr": 2.0})
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.01, 0.1, 2.0]
    with pytest.raises(TypeError, match=r"^AdamW: lr = 'x', must be a number\."):
        steprule.AdamW([params[0]], lr="x", weight_decay=decay)
    with pytest.raises(ValueError, match="peak_lr = -1"):
        steprule.AdamW([{"params": [params[0]], "peak_lr": -1.0}], weight_decay=decay)


def test_modes_of_decay_are_named() -> None:
    with pytest.raises(ValueError, match="mode = 'cautiuos', must be one of l2, decoupled, absolute"):
        steprule.WeightDecay(0.1, mode="cautiuos")
    with pytest.raises(ValueError, match="Leave those out"):
        steprule.WeightDecay(0.1, absolute=True, mode="cautious")
