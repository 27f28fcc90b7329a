"""What torch puts around an optimizer: every learning-rate scheduler, averaged weights, the gradient scaler."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from rules import (
    CASES,
    Case,
    assert_same,
    assert_same_run,
    each,
    flat,
    give_gradients,
    plain,
    snapshot,
    uses_curvature,
)
from torch import nn
from torch.optim import lr_scheduler, swa_utils

CLOSURELESS = [case for case in CASES if not case.closure]
STEPS = 6

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=cycles(o)
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.1, total_steps=STEPS + 1, cycle_momentum=cycles(o)
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def cycles(optimizer: Any) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


def test_no_scheduler_of_torch_is_left_out() -> None:
    theirs = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler)
    }
    assert theirs - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


def settings_of(optimizer: Any) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    return {key: group[key] for key in ("lr", "momentum", "betas") if key in group}


def advance_schedule(schedule: Any, number: int) -> None:
    plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
    schedule.step(float(number)) if plateau else schedule.step()


@each(plain)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_every_rule(case: Case, name: str) -> None:
    """The schedule is the same as on a torch optimizer, and the step uses its values."""
    optimizer, by_hand = case.make(lr=0.1), case.make(lr=0.1)
    stand_in = on_torch(optimizer)
    schedule, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](stand_in)
    seen: list[dict[str, Any]] = []
    for number in range(STEPS):
        assert settings_of(optimizer) == settings_of(stand_in)
        seen.append(settings_of(optimizer))
        by_hand.param_groups[0].update(settings_of(optimizer))
        case.advance(optimizer, 1, first=number)
        case.advance(by_hand, 1, first=number)
        stand_in.step()
        advance_schedule(schedule, number)
        advance_schedule(theirs, number)
    assert any(settings != seen[0] for settings in seen)
    assert_same([p.detach() for p in flat(optimizer)], [p.detach() for p in flat(by_hand)])


class Idle(torch.optim.Optimizer):
    """Moves nothing. A schedule needs no more."""

    def __init__(self, params: Any, **defaults: Any):
        super().__init__(params, defaults)

    def step(self, closure: Any = None) -> None:
        return None


def on_torch(optimizer: Any) -> Any:
    """A torch optimizer whose group has the same lr, momentum and betas."""
    group = settings_of(optimizer)
    rule: Any = torch.optim.Adagrad
    if len(group.get("betas", ())) > 2:  # none of torch's rules has three
        rule = Idle
    elif "betas" in group:
        rule = torch.optim.Adam
    elif "momentum" in group:
        rule = torch.optim.SGD
    return rule([nn.Parameter(torch.zeros(1))], **group)


@each(plain)
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR", "ReduceLROnPlateau", "SWALR"])
def test_a_scheduled_run_is_resumed(case: Case, name: str) -> None:
    optimizer = case.make(lr=0.1)
    schedule = SCHEDULERS[name](optimizer)
    for number in range(2):
        case.advance(optimizer, 1, first=number)
        advance_schedule(schedule, number)
    again = case.make([nn.Parameter(p.detach().clone()) for p in flat(optimizer)], lr=0.1)
    resumed = SCHEDULERS[name](again)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    for number in range(2, 5):
        for o, s in ((optimizer, schedule), (again, resumed)):
            case.advance(o, 1, first=number)
            advance_schedule(s, number)
        assert settings_of(optimizer) == settings_of(again)
    assert_same_run(again, optimizer)


@each(plain)
def test_averaged_model(case: Case) -> None:
    model = nn.Module()
    for place, param in enumerate(case.parameters()):
        model.register_parameter(f"weight_{place}", param)
    averaged = swa_utils.AveragedModel(model)
    optimizer = case.make(model)
    sums = [torch.zeros_like(p) for p in flat(optimizer)]
    for number in range(3):
        case.advance(optimizer, 1, first=number)
        averaged.update_parameters(model)
        sums = [total + p.detach() for total, p in zip(sums, flat(optimizer), strict=True)]
    for average, total in zip(averaged.module.parameters(), sums, strict=True):
        torch.testing.assert_close(average.detach(), total / 3)


# The gradient scaler


def scaled_step(case: Case, scaler: Any, optimizer: Any, number: int, spoil: bool = False) -> None:
    scaler.scale(torch.zeros(()))
    give_gradients(case, optimizer, number)
    for param in flat(optimizer):
        param.grad = param.grad * scaler.get_scale()
    if spoil:
        gradient = flat(optimizer)[-1].grad
        (gradient._values() if gradient.is_sparse else gradient).view(-1)[0] = float("inf")
    scaler.unscale_(optimizer)
    case.prepare(optimizer)
    scaler.step(optimizer)
    scaler.update()


@each(among=CLOSURELESS)
def test_gradient_scaler(case: Case) -> None:
    optimizer, twin = case.make(), case.make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(3):
        scaled_step(case, scaler, optimizer, number)
    case.advance(twin, 3)
    assert_same_run(optimizer, twin)


@each(lambda case: not uses_curvature(case.rule), among=CLOSURELESS)
def test_a_step_with_infinite_gradients_is_skipped(case: Case) -> None:
    """No decay, no momentum, no step count."""
    optimizer = case.make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(case, scaler, optimizer, 0)
    kept = snapshot(optimizer)
    scaled_step(case, scaler, optimizer, 1, spoil=True)
    assert_same(snapshot(optimizer), kept)
    assert scaler.get_scale() == 512.0
    scaled_step(case, scaler, optimizer, 2)
    assert not torch.equal(flat(optimizer)[0], kept[0][0])
