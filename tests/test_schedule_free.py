"""Schedule-free rules: the weights to evaluate with are the average, and the training weights come back."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from papers import schedule_free as meant
from rules import assert_same, flat, numbers
from torch import nn
from torch.optim import lr_scheduler

import steprule

KINDS = {
    "adamw": steprule.ScheduleFreeAdamW,
    "radam": steprule.ScheduleFreeRAdam,
    "sgd": steprule.ScheduleFreeSGD,
}
RUNNERS = {
    "loop": {"foreach": False, "fused": False},
    "lists": {"foreach": True, "fused": False},
    "kernel": {"fused": True},
}
each = pytest.mark.parametrize("kind", KINDS)


def advance(optimizer: Any, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for place, param in enumerate(flat(optimizer)):
            param.grad = numbers(tuple(param.shape), param.dtype, seed=100 * step + place)
        optimizer.step()


def make(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    params = [nn.Parameter(numbers(shape, dtype, seed=i)) for i, shape in enumerate(((40, 3), (7,)))]
    return KINDS[kind](params, **options)


@each
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_average_is_what_the_model_is_evaluated_with(kind: str, runner: str) -> None:
    optimizer = make(kind, lr=0.1, **RUNNERS[runner])
    thetas = [p.detach().numpy().copy() for p in flat(optimizer)]
    states = [meant.init(theta) for theta in thetas]
    for step in range(12):
        shapes = enumerate(theta.shape for theta in thetas)
        gradients = [numbers(shape, torch.float64, seed=100 * step + i).numpy() for i, shape in shapes]
        thetas = [
            meant.step(theta, g, state, step + 1, kind=kind, lr=0.1)
            for theta, g, state in zip(thetas, gradients, states, strict=True)
        ]
        advance(optimizer, 1, first=step)
    with optimizer.averaged_weights():
        for param, theta, state in zip(flat(optimizer), thetas, states, strict=True):
            np.testing.assert_allclose(
                param.detach().numpy(), meant.average(theta, state), rtol=1e-6, atol=1e-7
            )
    for param, theta in zip(flat(optimizer), thetas, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-6, atol=1e-7)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_a_checkpoint_written_in_evaluation(kind: str, dtype: torch.dtype) -> None:
    low = {"low_precision": "kahan"} if dtype is torch.bfloat16 else {}
    one, other = make(kind, dtype, **low), make(kind, dtype, **low)
    advance(one, 4)
    one.eval()
    file = io.BytesIO()
    torch.save([one.state_dict(), [p.detach() for p in flat(one)]], file)
    file.seek(0)
    state, params = torch.load(file, weights_only=True)
    with torch.no_grad():
        for param, value in zip(flat(other), params, strict=True):
            param.copy_(value)
    other.load_state_dict(state)
    for optimizer in (one, other):
        optimizer.train()
        advance(optimizer, 3, first=4)
    assert_same([p.detach() for p in flat(other)], [p.detach() for p in flat(one)])
    assert_same(other.state_dict(), one.state_dict())


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
}


@each
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_drive_it(kind: str, scheduler: str) -> None:
    optimizer = make(kind, lr=0.1)
    schedule = SCHEDULERS[scheduler](optimizer)
    for step in range(6):
        advance(optimizer, 1, first=step)
        schedule.step()
    assert all(p.isfinite().all() for p in flat(optimizer))
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]


@each
def test_other_averages_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="weights of its own to evaluate with"):
        make(kind, modifiers=[steprule.EMA()])


def test_the_modifier_on_sgd_is_the_rule() -> None:
    rule = make("sgd", lr=0.1)
    params = copy.deepcopy(flat(rule))
    on_sgd = steprule.SGD(params, lr=0.1, modifiers=[steprule.ScheduleFree()])
    advance(rule, 9)
    advance(on_sgd, 9)
    for one, other in zip(flat(rule), params, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
