"""The plan of a race: who trains what, with which seeds and for how long, before the first training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steprule.lab.racing.contestants import Entrant
from steprule.lab.racing.folder import Contestant, PlannedTrial
from steprule.lab.racing.search import points, setting_at
from steprule.lab.racing.trial import Measured

__all__ = [
    "Budget",
    "Size",
    "contestants_of",
    "evaluations_of",
    "race_seconds",
    "rung_of",
    "size_for",
    "trials_of",
]

STOP_AT = 0.3
LOCAL_SHARE = 4
EVALUATION_SHARE = 0.1
# Each divides the steps so that one evaluation is where the worse half stops.
EVALUATIONS = (20, 10)
FEWEST_TRIALS, FEWEST_SEEDS = 8, 3
# What a training takes beside its steps and evaluations, and how much of two cores two processes can use.
START_SECONDS, USED = 0.15, 0.9


@dataclass(frozen=True)
class Size:
    """How thorough a race is: trainings to tune each optimizer, fresh seeds, and what is tuned."""

    trials: int
    seeds: int
    tuned: tuple[str, ...] = ("lr",)


def size_for(minutes: float) -> Size:
    """A first look below 5 minutes, a thorough one from 30 on."""
    if minutes < 5:
        return Size(FEWEST_TRIALS, FEWEST_SEEDS)
    return Size(16, 5) if minutes < 30 else Size(32, 10, ("lr", "weight_decay"))


@dataclass(frozen=True)
class Budget:
    """How many steps each optimizer gets.

    kind: "steps" for the same number of gradients, "time" for the same time. steps: of one gradient each, or
    those that the first optimizer takes.
    """

    kind: str
    steps: int

    def steps_of(self, measured: Measured, first: Measured) -> int:
        """The steps of one optimizer."""
        if self.kind == "time":
            return max(1, round(self.steps * first.seconds_per_step / measured.seconds_per_step))
        return max(1, round(self.steps / max(1.0, measured.gradients_per_step)))


def evaluations_of(steps: int, number: int) -> list[int]:
    """The steps after which the validation loss is measured: evenly, at the rung and at the end."""
    if number in EVALUATIONS:
        return sorted({max(1, round(steps * i / number)) for i in range(1, number + 1)})
    return sorted({rung_of(steps), steps})


def rung_of(steps: int) -> int:
    """The step at which the worse half of the first trials stops."""
    return max(1, round(steps * STOP_AT))


def _evaluations_that_fit(measured: Sequence[Measured], steps: Sequence[int]) -> int:
    """How often to evaluate, so that it takes no optimizer more than a tenth of its time."""
    most = min(
        EVALUATION_SHARE * one.seconds_per_step * count / max(1e-9, one.seconds_per_evaluation)
        for one, count in zip(measured, steps, strict=True)
    )
    return next((number for number in EVALUATIONS if number <= most), 2)


def contestants_of(
    found: Sequence[Entrant], measured: Sequence[Measured], budget: Budget, schedule: str
) -> list[Contestant]:
    """The contestants with their steps and evaluations."""
    steps = [budget.steps_of(one, measured[0]) for one in measured]
    number = _evaluations_that_fit(measured, steps)
    return [
        Contestant(
            name=one.name,
            label=one.label,
            optimizer=one.optimizer,
            fixed=one.fixed,
            default=one.default,
            ranges=one.ranges,
            # The averages of schedule-free rules are their schedule.
            schedule="warmup"
            if "schedule_free" in one.optimizer or "ScheduleFree" in one.optimizer
            else schedule,
            steps=count,
            gradients_per_step=time.gradients_per_step,
            evaluated_at=evaluations_of(count, number),
        )
        for one, time, count in zip(found, measured, steps, strict=True)
    ]


def trials_of(
    contestants: Sequence[Contestant], size: Size, tuning_seed: int, seeds: Sequence[int], default_too: bool
) -> list[PlannedTrial]:
    """Every training: the default, Sobol points, places near the best of these, and fresh seeds.

    default_too: whether the default is trained on the fresh seeds, too.
    """
    trials: list[PlannedTrial] = []
    for one in contestants:
        count = size.trials if one.ranges else 1
        places = points(len(one.ranges), count - 1, tuning_seed)
        first = first_of(count)
        for number in range(count):
            place = places[number - 1] if number else ()
            planned = PlannedTrial(one.name, number, "tune", tuning_seed, number == 0, one.steps)
            if number == 0:
                planned = replace(planned, setting=dict(one.default))
            elif number < first:
                planned = replace(planned, setting=setting_at(one.ranges, place))
            else:
                planned = replace(planned, near=place)
            trials.append(planned)
        runs = [(seed, False) for seed in seeds] + [(seed, True) for seed in seeds if default_too]
        for number, (seed, default) in enumerate(runs, count):
            setting = dict(one.default) if default else None
            trials.append(PlannedTrial(one.name, number, "seeds", seed, default, one.steps, setting))
    return trials


def first_of(trials: int) -> int:
    """How many trials come before those near the best."""
    return trials - trials // LOCAL_SHARE


def race_seconds(
    contestants: Sequence[Contestant], measured: Sequence[Measured], size: Size, seeds: int, workers: int
) -> tuple[float, float]:
    """How long a race takes: seconds that do not depend on the steps, and those of steps and evaluations."""
    fixed = going = 0.0
    for one, time in zip(contestants, measured, strict=True):
        count = size.trials if one.ranges else 1
        first = first_of(count)
        stopped = first // 2 if count > 1 else 0
        trainings = count - stopped * (1 - STOP_AT) + seeds
        fixed += START_SECONDS * (count + seeds)
        going += trainings * one.steps * time.seconds_per_step
        going += trainings * len(one.evaluated_at) * time.seconds_per_evaluation
    used = 1 if workers == 1 else workers * USED
    return fixed / used, going / used
