"""The plan of a race, and what is trained next: neither depends on the order in which trainings end."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from races import canned_trials

import steprule
from steprule.lab.errors import LabError
from steprule.lab.racing.contestants import Entrant, entrants, parse_search
from steprule.lab.racing.folder import Contestant, Range, Trial
from steprule.lab.racing.planning import (
    Budget,
    Size,
    contestants_of,
    evaluations_of,
    race_seconds,
    rung_of,
    size_for,
    trials_of,
)
from steprule.lab.racing.search import best_of, edges, near_best, points, setting_at, survivors, within
from steprule.lab.racing.stages import next_of

LR = {"lr": Range(1e-4, 1e-1)}


def measured(seconds: float = 0.004, evaluation: float = 0.001, gradients: float = 1.0) -> Any:
    return SimpleNamespace(
        seconds_per_step=seconds, seconds_per_evaluation=evaluation, gradients_per_step=gradients
    )


def contestant(name: str = "adamw", ranges: Mapping[str, Range] = LR, steps: int = 100) -> Contestant:
    default = dict.fromkeys(ranges, 0.001)
    evaluated = evaluations_of(steps, 10)
    return Contestant(name, name, "AdamW", {}, default, ranges, "cosine", steps, 1.0, evaluated)


@given(dimensions=st.integers(1, 4), count=st.integers(1, 40), more=st.integers(0, 40), seed=st.integers(0, 9))
def test_more_points_begin_with_the_same_ones(dimensions: int, count: int, more: int, seed: int) -> None:
    few, many = points(dimensions, count, seed), points(dimensions, count + more, seed)
    assert many[:count] == few
    assert all(0 <= place <= 1 for point in many for place in point)


def test_every_rule_says_where_to_look_for_its_lr() -> None:
    for name, rule in steprule.catalogue().items():
        search = rule.fields["lr"].search
        assert search is not None, name
        assert math.log10(search[1] / search[0]) == pytest.approx(3) or search == (0.3, 3.0), name


def test_the_plan_of_an_optimizer_does_not_depend_on_the_others() -> None:
    one, two = contestant("a"), contestant("b", {"lr": Range(1e-3, 1.0)})
    plans = [
        trials_of(some, Size(16, 5), 0, (1, 2), default_too=False) for some in ([one, two], [two, one], [one])
    ]
    of_a = [[trial for trial in plan if trial.optimizer == "a"] for plan in plans]
    assert of_a[0] == of_a[1] == of_a[2]
    # At the same places of their ranges.
    b = [trial for trial in plans[0] if trial.optimizer == "b"]
    for left, right in zip(of_a[0][1:12], b[1:12], strict=True):
        assert left.setting is not None
        assert right.setting is not None
        assert right.setting["lr"] == pytest.approx(10 * left.setting["lr"])


def test_the_default_comes_first_and_a_longer_plan_begins_with_the_shorter_ones_settings() -> None:
    few = trials_of([contestant()], Size(8, 3), 0, (1, 2, 3), default_too=False)
    many = trials_of([contestant()], Size(16, 5), 0, (1, 2, 3, 4, 5), default_too=False)
    assert few[0].setting == {"lr": 1e-3}
    assert few[0].default
    assert [trial.setting for trial in few[:6]] == [trial.setting for trial in many[:6]]
    assert [trial.near is not None for trial in many[:16]] == [False] * 12 + [True] * 4
    assert [trial.seed for trial in many] == [0] * 16 + [1, 2, 3, 4, 5]


def test_an_optimizer_with_nothing_to_tune_is_trained_at_its_default() -> None:
    plan = trials_of([contestant(ranges={})], Size(16, 5), 0, (1, 2), default_too=False)
    assert [(trial.stage, trial.seed) for trial in plan] == [("tune", 0), ("seeds", 1), ("seeds", 2)]


def loss_of(lr: float, share: float) -> float:
    return abs(math.log(lr / 0.02)) + 1 / share


def carried_out(one: Contestant, order: random.Random) -> list[Trial]:
    """All trials of a contestant, ended in a random order; the loss depends on setting and step."""
    planned = trials_of([one], Size(16, 3), 0, (1, 2, 3), default_too=True)
    done: dict[int, Trial] = {}
    rung: dict[int, float | None] = {}
    while following := next_of(one, planned, done, rung):
        each = order.choice(following)
        number, lr = each.planned.number, each.setting["lr"]
        diverged = lr > 0.06
        rung.setdefault(number, None if diverged else loss_of(lr, 0.3))
        if each.until < one.steps and not diverged:
            continue
        stopped = 5 if diverged else rung_of(one.steps) if each.stop else None
        loss = None if diverged else loss_of(lr, 0.3 if each.stop else 1)
        done[number] = Trial(
            one.name, number, each.planned.stage, each.planned.seed, dict(each.setting), each.planned.default,
            loss, None, stopped or one.steps, stopped, diverged, 1.0, 1.0, 8.0,
        )  # fmt: skip
    assert sorted(done) == [trial.number for trial in planned]
    return [done[number] for number in sorted(done)]


def test_what_is_trained_does_not_depend_on_the_order_of_ends() -> None:
    first = carried_out(contestant(), random.Random(0))
    for seed in range(1, 6):
        assert carried_out(contestant(), random.Random(seed)) == first
    tuning = [trial for trial in first if trial.stage == "tune"]
    stopped = [trial for trial in tuning if trial.stopped_at == 30 and not trial.diverged]
    assert stopped
    assert not first[0].stopped_at
    best = best_of(tuning).setting
    assert all(trial.setting == best for trial in first if trial.stage == "seeds" and not trial.default)
    assert all(abs(math.log10(trial.setting["lr"] / best["lr"])) < 1.6 for trial in tuning[12:])
    assert sum(trial.default for trial in first) == 1 + 3


def test_the_better_half_goes_on_and_the_default_with_it() -> None:
    losses = {0: 9.0, 1: 1.0, 2: None, 3: 3.0, 4: 2.0, 5: 4.0}
    assert survivors(losses) == {1, 4, 3}
    assert survivors(losses, always=[0, 2]) == {0, 1, 4, 3}
    assert survivors({0: None, 1: None}, always=[0]) == set()


@given(middle=st.floats(0, 1), at=st.floats(0, 1))
def test_the_box_stays_in_the_range_unless_the_best_is_at_its_edge(middle: float, at: float) -> None:
    best = setting_at(LR, [middle])
    lr = near_best(LR, best, [at])["lr"]
    if 0.12 < middle < 0.88:
        assert 0.999e-4 <= lr <= 1.001e-1
        assert abs(math.log10(lr / best["lr"])) <= 0.46
    assert 0.99e-5 <= lr <= 1.01


def test_settings_are_short_enough_to_be_typed() -> None:
    ranges = {"lr": Range(1e-4, 1e-1), "momentum": Range(0.8, 0.99, "one_minus")}
    for place in points(2, 20, 0):
        setting = setting_at(ranges, place)
        assert float(f"{setting['lr']:g}") == setting["lr"]
        assert float(f"{setting['momentum']:g}") == setting["momentum"]
        assert 0.8 <= setting["momentum"] <= 0.99
    assert setting_at(ranges, [0.0, 0.0]) == {"lr": 1e-4, "momentum": 0.8}
    assert setting_at(ranges, [1.0, 1.0]) == {"lr": 1e-1, "momentum": 0.99}


def test_a_best_value_is_at_the_edge_if_nothing_beyond_it_was_tried() -> None:
    tried = [{"lr": 1e-4}, {"lr": 1e-2}, {"lr": 9e-2}]
    assert edges(LR, {"lr": 9e-2}, tried) == {"lr": "high"}
    assert edges(LR, {"lr": 1e-4}, tried) == {"lr": "low"}
    assert edges(LR, {"lr": 1e-2}, tried) == {}
    assert edges(LR, {"lr": 9e-2}, [*tried, {"lr": 2e-1}]) == {}
    assert edges(LR, {"lr": 0.0}, [{"lr": 0.0}]) == {"lr": "low"}


def test_the_range_within_a_share_of_the_best_ends_before_the_first_worse_one() -> None:
    trials = [trial for trial in canned_trials() if trial.optimizer == "lion"]
    low, high = within([trial for trial in trials if trial.stage == "tune"], "lr", 0.25)
    assert low <= 8e-4 <= high
    assert 1e-4 < low < high < 1e-2


# Budgets


def test_every_gradient_counts() -> None:
    sam = measured(gradients=2.0)
    assert Budget("steps", 550).steps_of(sam, sam) == 275
    assert Budget("time", 550).steps_of(measured(0.008), measured(0.004)) == 275
    assert Budget("time", 550).steps_of(measured(0.002, gradients=2.0), measured(0.004)) == 1100


def entrant(name: str, optimizer: str = "AdamW") -> Entrant:
    return Entrant(name, name, optimizer, {}, {"lr": 1e-3}, LR)


@pytest.mark.parametrize(("evaluation", "count"), [(0.001, 20), (0.02, 10), (3.0, 2)])
def test_evaluations_take_a_tenth_at_most_and_are_at_the_rung_and_the_end(
    evaluation: float, count: int
) -> None:
    (one,) = contestants_of(
        [entrant("adamw")], [measured(evaluation=evaluation)], Budget("steps", 550), "cosine"
    )
    assert len(one.evaluated_at) == count
    assert rung_of(550) in one.evaluated_at
    assert one.evaluated_at[-1] == 550


def test_schedule_free_rules_have_no_falling_rate() -> None:
    found = [entrant("a"), entrant("b", "ScheduleFreeAdamW"), entrant("c", "SGD+schedule_free")]
    made = contestants_of(found, [measured()] * 3, Budget("steps", 100), "cosine")
    assert [one.schedule for one in made] == ["cosine", "warmup", "warmup"]


def test_a_race_of_four_on_mnist_takes_less_than_two_minutes() -> None:
    made = [contestant(name, steps=550) for name in "abcd"]
    fixed, going = race_seconds(made, [measured(0.0036, 0.02)] * 4, Size(16, 5), 5, workers=2)
    trainings = 4 * (16 - 6 * 0.7 + 5)
    expected = trainings * (550 * 0.0036 + 10 * 0.02) / 1.8
    assert going == pytest.approx(expected)
    assert fixed + going < 120


def test_a_longer_race_is_more_thorough() -> None:
    sizes = [size_for(minutes) for minutes in (2, 10, 60)]
    assert [(size.trials, size.seeds) for size in sizes] == [(8, 3), (16, 5), (32, 10)]


# Names


def test_ranges_come_from_the_rule_its_namesake_or_the_command() -> None:
    found = entrants(["adamw", "torch:SGD", "prodigy"], ["lr", "weight_decay"], ["torch-sgd.lr=0.1..30"])
    assert [one.name for one in found] == ["adamw", "torch-sgd", "prodigy"]
    assert [one.ranges["lr"] for one in found] == [Range(1e-4, 0.1), Range(0.1, 30.0), Range(0.3, 3.0)]
    assert found[0].default == {"lr": 1e-3, "weight_decay": 0.01}
    assert found[1].ranges["weight_decay"] == Range(1e-6, 1e-3)


def test_two_optimizers_of_one_rule_have_two_names() -> None:
    found = entrants(["radam", "ranger", "radam+lookahead", "torch:RAdam"], ["lr"], [])
    assert len({one.name for one in found}) == 4
    assert len({one.label for one in found}) == 4
    with pytest.raises(LabError, match="AdamW is named twice"):
        entrants(["adamw", "lion", "AdamW"], ["lr"], [])


@pytest.mark.parametrize(
    "text", ["lr", "lr=", "lr=1..", "lr=1..0.1", "lr=0..1", "lr=a..b", "=1..2", "lr=1..inf"]
)
def test_a_range_must_be_two_numbers(text: str) -> None:
    with pytest.raises(LabError, match=r"must be NAME=LOW\.\.HIGH"):
        parse_search([text], ["adamw"])


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(
        LabError, match=r"AdamW has no number 'weigth_decay' to tune\. Did you mean 'weight_decay'"
    ):
        entrants(["adamw"], ["weigth_decay"], [])
    with pytest.raises(
        LabError, match=r"AdamW does not say where to look for eps\. Give --search adamw\.eps=LOW"
    ):
        entrants(["adamw"], ["lr", "eps"], [])
    with pytest.raises(LabError, match=r"--search names 'eps', which is not tuned\. Add it: --tune lr,eps"):
        entrants(["adamw"], ["lr"], ["eps=1e-9..1e-7"])
