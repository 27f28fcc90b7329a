"""SAM and ASAM: the gradient is taken uphill, the step from where the weights are."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from rules import assert_same, flat, numbers
from torch import nn

import steprule
from steprule.engine import climbing

RUNNERS = {
    "loop": {"foreach": False, "fused": False},
    "lists": {"foreach": True, "fused": False},
    "kernel": {"fused": True},
}
KINDS: dict[str, Any] = {"SAM": steprule.SAM, "ASAM": steprule.ASAM}
SHAPES = ((4, 3), (5,), (30, 2))


def bowl(thetas: list[np.ndarray]) -> list[np.ndarray]:
    """The gradients of Σ (x² + x⁴/4)."""
    return [2 * x + x**3 for x in thetas]


def by_hand(kind: str, thetas: list[np.ndarray], steps: int, rho: float, lr: float) -> list[np.ndarray]:
    """Foret et al. 2021, Kwon et al. 2021, with plain gradient descent."""
    for _ in range(steps):
        gs = bowl(thetas)
        if kind == "SAM":
            norm = np.sqrt(sum(np.sum(g**2) for g in gs))
            uphill = [x + rho * g / (norm + 1e-12) for x, g in zip(thetas, gs, strict=True)]
        else:
            norm = np.sqrt(sum(np.sum((x * g) ** 2) for x, g in zip(thetas, gs, strict=True)))
            uphill = [x + rho * x**2 * g / (norm + 1e-12) for x, g in zip(thetas, gs, strict=True)]
        thetas = [x - lr * g for x, g in zip(thetas, bowl(uphill), strict=True)]
    return thetas


def loss_of(params: list[Any]) -> Any:
    return sum((p**2 + p**4 / 4).sum() for p in params)


def make(kind: str, dtype: torch.dtype = torch.float64, rule: Any = steprule.SGD, **options: Any) -> Any:
    params = [nn.Parameter(numbers(shape, dtype, seed=i)) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    return rule(groups, modifiers=[KINDS[kind](0.3)], **{"lr": 0.1, **options})


def closure_of(optimizer: Any) -> Any:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(flat(optimizer))
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("way", ["closure", "two calls"])
def test_it_is_what_the_paper_says(kind: str, runner: str, way: str) -> None:
    optimizer = make(kind, **RUNNERS[runner])
    wanted = by_hand(kind, [p.detach().numpy().copy() for p in flat(optimizer)], 5, 0.3, 0.1)
    for _ in range(5):
        if way == "closure":
            before = float(loss_of(flat(optimizer)).detach())
            assert float(optimizer.step(closure_of(optimizer)).detach()) == pytest.approx(before, rel=1e-12)
        else:
            closure_of(optimizer)()
            optimizer.climb()
            closure_of(optimizer)()
            optimizer.step()
    for param, value in zip(flat(optimizer), wanted, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [steprule.AdamW, steprule.Lion, steprule.ScheduleFreeAdamW])
def test_any_rule_steps_from_where_the_weights_are(rule: Any) -> None:
    optimizer = make("SAM", rule=rule, lr=0.01)
    other = rule([nn.Parameter(p.detach().clone()) for p in flat(optimizer)], lr=0.01)
    for _ in range(4):
        optimizer.step(closure_of(optimizer))
        for mine, theirs in zip(flat(optimizer), flat(other), strict=True):
            theirs.grad = mine.grad.clone()
        other.step()
        for mine, theirs in zip(flat(optimizer), flat(other), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_the_climb_does_not_depend_on_how_gradients_are_scaled() -> None:
    """So that it may come before a GradScaler unscales them."""
    one, other = make("SAM"), make("SAM")
    for optimizer, scale in ((one, 1.0), (other, 1024.0)):
        (loss_of(flat(optimizer)) * scale).backward()
        optimizer.climb()
    for mine, theirs in zip(flat(one), flat(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_with_a_gradient_scaler() -> None:
    scaled, plain = make("SAM", torch.float32), make("SAM", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(3):
        scaled.zero_grad()
        scaler.scale(loss_of(flat(scaled))).backward()
        scaled.climb()
        scaled.zero_grad()
        scaler.scale(loss_of(flat(scaled))).backward()
        scaler.step(scaled)
        scaler.update()
        plain.step(closure_of(plain))
    for mine, theirs in zip(flat(scaled), flat(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_an_error_in_the_closure_leaves_the_weights() -> None:
    optimizer = make("SAM")
    before = [p.detach().clone() for p in flat(optimizer)]
    calls: list[int] = []

    def closure() -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("too steep")
        return closure_of(optimizer)()

    with pytest.raises(ArithmeticError, match="too steep"):
        optimizer.step(closure)
    assert_same([p.detach() for p in flat(optimizer)], before)


def test_nonfinite_gradients_uphill_skip_the_step() -> None:
    optimizer = make("SAM", nonfinite="skip")
    before = [p.detach().clone() for p in flat(optimizer)]

    def closure() -> Any:
        loss = closure_of(optimizer)()
        flat(optimizer)[0].grad[0] = float("nan")
        return loss

    optimizer.step(closure)
    assert_same([p.detach() for p in flat(optimizer)], before)


def test_what_is_missing_is_named() -> None:
    optimizer = make("SAM")
    loss_of(flat(optimizer)).backward()
    with pytest.raises(RuntimeError, match=r"SAM needs the gradient twice.*closure.*climb"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no group has a modifier that climbs"):
        steprule.AdamW(flat(optimizer)).climb()
    with pytest.raises(ValueError, match="does not go with"):
        steprule.AdamW(flat(optimizer), modifiers=[steprule.SAM(), steprule.ASAM()])


def test_parameters_without_gradients_stay() -> None:
    optimizer = make("SAM")
    resting = flat(optimizer)[1]
    before = resting.detach().clone()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of([p for p in flat(optimizer) if p is not resting])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_same(resting.detach(), before)


def test_the_climb_finds_its_plan_again_and_follows_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = climbing.rule_of
    monkeypatch.setattr(climbing, "rule_of", lambda x: made.append(x) or real(x))
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = steprule.SGD(params[:2], lr=0.1, modifiers=[steprule.SAM(rho=0.1)])
    for param in params:
        param.grad = torch.ones(3)

    def height() -> float:
        optimizer.climb()
        found = float((flat(optimizer)[0].detach() - 1).norm())
        climbing.descend(optimizer)
        return found

    heights = [height(), height()]
    optimizer.param_groups[0]["sam.rho"] = 0.2
    heights.append(height())
    assert len(made) == 1
    optimizer.add_param_group({"params": params[2:]})
    height()
    assert len(made) == 2
    assert heights[2] == pytest.approx(2 * heights[0], rel=1e-4)
    assert heights[0] == heights[1] == pytest.approx(0.1 / 2**0.5, rel=1e-4)


def test_the_climb_makes_its_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llvmlite")
    from steprule.engine.runners.kernels import fused

    made: list[Any] = []
    real = fused.Plan
    monkeypatch.setattr(fused, "Plan", lambda *x: made.append(x[0]) or real(*x))
    optimizer = make("SAM", torch.float32, fused=True)
    for _ in range(3):
        optimizer.step(closure_of(optimizer))
    assert sum(isinstance(x, climbing.RuleOptimizer) and x is not optimizer for x in made) == 2  # a group each


def with_gradients(**options: Any) -> tuple[list[Any], Any]:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    for param in params:
        param.grad = torch.ones_like(param)
    return params, steprule.SGD(params, **{"lr": 0.5, "modifiers": [steprule.SAM(0.1)], **options})


def test_a_parameter_that_is_reshaped_uphill_is_named_once() -> None:
    params, optimizer = with_gradients()
    optimizer.climb()
    params[0].data = torch.ones(5)
    params[0].grad = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"parameter 0 had the shape \(3,\) at climb\(\) and has \(5,\) now"):
        optimizer.step()
    assert_same([p.detach() for p in params], [torch.ones(5), torch.ones(2, 2)])
    optimizer.climb()
    optimizer.step()
    assert_same([p.detach() for p in params], [torch.full((5,), 0.5), torch.full((2, 2), 0.5)])


def test_the_climb_takes_the_groups_as_they_are_now() -> None:
    pytest.importorskip("llvmlite")
    _, optimizer = with_gradients(fused=True)
    optimizer.climb()
    optimizer.step()
    optimizer.param_groups[0]["fused"] = None
    optimizer.climb()
    (climber,) = climbing._climbers[optimizer].values()
    assert climber.param_groups[0].get("fused") is None
    optimizer.step()
    optimizer.param_groups[0]["sam.rho"] = -1.0
    with pytest.raises(ValueError, match=r"SAM: rho = -1.0, must be at least 0 \(parameter group 0\)"):
        optimizer.climb()


def test_parameters_that_left_the_optimizer_are_freed() -> None:
    params, optimizer = with_gradients()
    optimizer.climb()
    optimizer.step()
    gone = weakref.ref(params[0])
    optimizer.param_groups[0]["params"] = params[1:]
    optimizer.state.clear()
    del params[0]
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_uphill_finds_the_way_back(copied: Any) -> None:
    params, optimizer = with_gradients()
    optimizer.climb()
    other = copied(optimizer)
    assert not torch.equal(flat(other)[0], torch.ones(3))
    for param in flat(other):
        param.grad = torch.ones_like(param)
    for each in (other, optimizer):
        each.step()
        assert_same([p.detach() for p in flat(each)], [torch.full((3,), 0.5), torch.full((2, 2), 0.5)])
    assert_same(params[0].detach(), flat(optimizer)[0].detach())


def test_a_step_comes_back_also_where_nothing_climbs_any_more() -> None:
    params, optimizer = with_gradients()
    optimizer.climb()
    optimizer.param_groups[0]["modifiers"] = None
    optimizer.step()
    assert_same(params[0].detach(), torch.full((3,), 0.5))


def test_after_a_climb_a_closure_takes_the_second_gradient_only() -> None:
    optimizer, other = make("SAM"), make("SAM")
    for _ in range(3):
        closure_of(optimizer)()
        optimizer.climb()
        calls: list[int] = []
        optimizer.step(lambda calls=calls: calls.append(1) or closure_of(optimizer)())
        assert len(calls) == 1
        other.step(closure_of(other))
    assert_same([p.detach() for p in flat(optimizer)], [p.detach() for p in flat(other)])


def test_a_differentiable_step_does_not_climb() -> None:
    with pytest.raises(ValueError, match="differentiable=True does not go with ASAM"):
        steprule.SGD([torch.ones(3)], lr=0.1, differentiable=True, modifiers=[steprule.ASAM()])
