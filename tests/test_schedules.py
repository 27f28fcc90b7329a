"""The schedules: their formulas, their ends, and their use with torch's own."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import steprule
from steprule.schedules import Noam, Warmup, WarmupCosine

BASE = 0.02
MAKERS: dict[str, Callable[..., Any]] = {
    "Warmup": lambda opt, **more: Warmup(opt, 4, **more),
    "Noam": lambda opt, **more: Noam(opt, 16, 4, **more),
    "WarmupCosine": lambda opt, **more: WarmupCosine(opt, 4, 12, **more),
}
EACH = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def an_optimizer(rule: Any = torch.optim.SGD, lr: Any = BASE, **options: Any) -> Any:
    return rule([nn.Parameter(torch.ones(3))], lr=lr, **options)


def lr_of(optimizer: Any, group: int = 0) -> float:
    return float(optimizer.param_groups[group]["lr"])


def advance(optimizer: Any, schedule: Any, steps: int) -> list[float]:
    """The lr that each step is taken with."""
    used: list[float] = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        used.append(lr_of(optimizer))
        optimizer.step()
        schedule.step()
    return used


def close(wanted: Any) -> Any:
    return pytest.approx(wanted, rel=1e-12, abs=0)


# Formulas


def test_warmup() -> None:
    optimizer = an_optimizer()
    used = advance(optimizer, Warmup(optimizer, 5), 8)
    assert used == close([BASE * f for f in (0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1)])


def test_noam() -> None:
    optimizer = an_optimizer(lr=1)
    used = advance(optimizer, Noam(optimizer, 512, 40), 200)
    assert used == close([512**-0.5 * min(t**-0.5, t * 40**-1.5) for t in range(1, 201)])
    assert max(used) == used[39]


def test_warmup_cosine() -> None:
    optimizer = an_optimizer()
    used = advance(optimizer, WarmupCosine(optimizer, 10, 110, floor=0.2), 200)
    assert used[:10] == close([BASE * t / 10 for t in range(1, 11)])
    cosine = [0.6 + 0.4 * math.cos(math.pi * (t - 10) / 100) for t in range(10, 111)]
    assert used[9:110] == close([BASE * f for f in cosine])
    assert used[109:] == close([0.2 * BASE] * 91)


@pytest.mark.parametrize("floor", [0, 0.1, 1])
def test_the_cosine_never_rises_again(floor: float) -> None:
    optimizer = an_optimizer()
    used = advance(optimizer, WarmupCosine(optimizer, 3, 20, floor), 100)
    falling = used[2:]
    assert all(later <= earlier for earlier, later in pairwise(falling))
    assert set(used[20:]) == {used[-1]}
    assert used[-1] == close(floor * BASE)


def test_the_usual_floor_is_a_tenth() -> None:
    optimizer = an_optimizer()
    assert advance(optimizer, WarmupCosine(optimizer, 0, 5), 6)[-1] == close(0.1 * BASE)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda opt: Warmup(opt, 0), [1, 1, 1]),
        (lambda opt: Warmup(opt, 1), [1, 1, 1]),
        (lambda opt: Noam(opt, 1, 0), [1, 2**-0.5, 3**-0.5]),
        (lambda opt: Noam(opt, 1, 1), [1, 2**-0.5, 3**-0.5]),
        (lambda opt: WarmupCosine(opt, 0, 2, 0), [0.5, 0, 0]),
        (lambda opt: WarmupCosine(opt, 1, 3, 0), [1, 0.5, 0]),
    ],
)
def test_no_warmup_divides_by_nothing(make: Any, wanted: list[float]) -> None:
    optimizer = an_optimizer()
    assert advance(optimizer, make(optimizer), 3) == close([BASE * f for f in wanted])


@EACH
def test_an_lr_of_zero_stays_zero(make: Any) -> None:
    optimizer = an_optimizer(lr=0.0)
    assert advance(optimizer, make(optimizer), 6) == [0] * 6


# Optimizers and groups


@EACH
def test_every_group_keeps_its_proportion(make: Any) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = steprule.AdamW([{"params": params[0]}, {"params": params[1], "lr": 10 * BASE}], lr=BASE)
    schedule = make(optimizer)
    for _ in range(15):
        assert lr_of(optimizer, 1) == close(10 * lr_of(optimizer, 0))
        advance(optimizer, schedule, 1)


@EACH
@pytest.mark.parametrize("rule", [steprule.AdamW, torch.optim.AdamW])
def test_a_tensor_lr_is_changed_in_place(make: Any, rule: Any) -> None:
    lr = torch.tensor(BASE, dtype=torch.float64)
    one, other = an_optimizer(rule, lr, foreach=False), an_optimizer(rule, BASE, foreach=False)
    with_tensor, with_float = make(one), make(other)
    assert advance(one, with_tensor, 15) == close(advance(other, with_float, 15))
    assert one.param_groups[0]["lr"] is lr
    assert lr.item() == close(lr_of(other))


def test_decoupled_decay_follows_the_schedule() -> None:
    optimizer = an_optimizer(steprule.AdamW, lr=1e-2, weight_decay=0.1)
    schedule = Warmup(optimizer, 1000)
    (p,) = optimizer.param_groups[0]["params"]
    for t in (1, 2, 3):
        before = p.detach().clone().double()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        schedule.step()
        factor = (p.detach().double() / before)[0].item()
        assert factor == pytest.approx(1 - t * 1e-2 / 1000 * 0.1, abs=6e-8)
    assert p[0].item() < 1


@EACH
def test_it_is_one_schedule_for_any_optimizer(make: Any) -> None:
    runs = []
    for rule in (torch.optim.SGD, steprule.SGD, steprule.AdaBelief, torch.optim.Adagrad):
        optimizer = an_optimizer(rule)
        runs.append(advance(optimizer, make(optimizer), 15))
    assert all(run == runs[0] for run in runs)


# Resuming


@EACH
@pytest.mark.parametrize("tensor", [False, True])
def test_resuming_continues_to_the_bit(make: Any, tensor: bool) -> None:
    def begin() -> Any:
        lr = torch.tensor(BASE) if tensor else BASE
        optimizer = an_optimizer(steprule.AdamW, lr)
        return optimizer, make(optimizer)

    optimizer, schedule = begin()
    advance(optimizer, schedule, 6)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), schedule.state_dict()), file)
    wanted = advance(optimizer, schedule, 20)

    optimizer, schedule = begin()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert advance(optimizer, schedule, 20) == wanted


def test_the_saved_formula_wins() -> None:
    optimizer = an_optimizer()
    long = WarmupCosine(optimizer, 2, 30, 0.3)
    advance(optimizer, long, 5)
    again = an_optimizer()
    schedule = WarmupCosine(again, 7, 8)
    again.load_state_dict(optimizer.state_dict())
    schedule.load_state_dict(long.state_dict())
    assert advance(again, schedule, 40) == advance(optimizer, long, 40)


@EACH
def test_last_epoch_continues(make: Any) -> None:
    optimizer = an_optimizer()
    schedule = make(optimizer)
    advance(optimizer, schedule, 3)
    place = schedule.last_epoch
    wanted = advance(optimizer, schedule, 10)
    again = an_optimizer(lr=wanted[0])
    again.param_groups[0]["initial_lr"] = BASE
    # As in torch: the group holds the lr of last_epoch, and creating the schedule goes one step further.
    assert advance(again, make(again, last_epoch=place), 9) == close(wanted[1:])


# Beside torch's schedules


@EACH
def test_chained_with_another_their_factors_multiply(make: Any) -> None:
    alone = an_optimizer()
    factors = [used / BASE for used in advance(alone, make(alone), 15)]
    for ours_first in (True, False):
        optimizer = an_optimizer()
        makers = [make, lambda opt: lr_scheduler.ExponentialLR(opt, 0.9)]
        schedules = [m(optimizer) for m in (makers if ours_first else makers[::-1])]
        used = advance(optimizer, lr_scheduler.ChainedScheduler(schedules), 15)
        assert used == close([BASE * f * 0.9**t for t, f in enumerate(factors)])


def test_in_a_sequence_each_counts_from_its_own_start() -> None:
    optimizer = an_optimizer()
    parts = [Warmup(optimizer, 4), WarmupCosine(optimizer, 0, 6, 0.5), Noam(optimizer, 4, 2)]
    used = advance(optimizer, lr_scheduler.SequentialLR(optimizer, parts, milestones=[6, 14]), 20)
    assert used[:6] == close([BASE * min(1, t / 4) for t in range(1, 7)])
    cosine = [0.75 + 0.25 * math.cos(math.pi * min(1, t / 6)) for t in range(1, 9)]
    assert used[6:14] == close([BASE * f for f in cosine])
    noam = [0.5 * min(t**-0.5, t * 2**-1.5) for t in range(1, 7)]
    assert used[14:] == close([BASE * f for f in noam])


def test_a_users_own_change_of_lr_is_kept() -> None:
    optimizer = an_optimizer()
    schedule = Warmup(optimizer, 10)
    advance(optimizer, schedule, 4)
    optimizer.param_groups[0]["lr"] *= 0.5
    assert advance(optimizer, schedule, 8)[-1] == close(0.5 * BASE)


# Refusals


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda opt: Warmup(opt, -1), ValueError, "Warmup: warmup_steps = -1, must be at least 0"),
        (lambda opt: Warmup(opt, 2.5), TypeError, "Warmup: warmup_steps = 2.5, must be a whole number"),
        (lambda opt: Warmup(opt, "many"), TypeError, "Warmup: warmup_steps = 'many'"),
        (lambda opt: Noam(opt, 0, 5), ValueError, "Noam: d_model = 0, must be at least 1"),
        (lambda opt: Noam(opt, 8, -2), ValueError, "Noam: warmup_steps = -2"),
        (
            lambda opt: WarmupCosine(opt, 10, 10),
            ValueError,
            "WarmupCosine: total_steps = 10, must be above warmup_steps = 10",
        ),
        (lambda opt: WarmupCosine(opt, 0, 0), ValueError, "WarmupCosine: total_steps = 0"),
        (lambda opt: WarmupCosine(opt, 0, 9, 1.5), ValueError, "WarmupCosine: floor = 1.5, .* at most 1"),
        (lambda opt: WarmupCosine(opt, 0, 9, -0.1), ValueError, "WarmupCosine: floor = -0.1"),
        (lambda opt: Warmup(nn.Linear(2, 2), 5), TypeError, "Linear is not an Optimizer"),
    ],
)
def test_bad_arguments_change_nothing(make: Any, error: type[Exception], message: str) -> None:
    optimizer = an_optimizer()
    with pytest.raises(error, match=message):
        make(optimizer)
    assert lr_of(optimizer) == BASE
    assert "initial_lr" not in optimizer.param_groups[0]
