"""What of a race can be trained now: it depends on what has been measured, not on the order of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steprule.lab.racing.folder import Contestant, PlannedTrial, Trial
from steprule.lab.racing.planning import rung_of
from steprule.lab.racing.search import best_of, near_best, survivors

__all__ = ["Next", "next_of"]


@dataclass(frozen=True)
class Next:
    """A trial that can go on: with this setting, up to a step.

    stop: it does not go on, because it is one of the worse half.
    """

    planned: PlannedTrial
    setting: Mapping[str, float]
    until: int
    stop: bool = False


def next_of(
    one: Contestant,
    planned: Sequence[PlannedTrial],
    done: Mapping[int, Trial],
    rung: Mapping[int, float | None],
) -> list[Next]:
    """The trials of a contestant that can go on.

    done: its trials that have ended, by number. rung: the losses of its first trials where the worse half
    stops.
    """
    first = [trial for trial in planned if trial.stage == "tune" and trial.setting is not None]
    near = [trial for trial in planned if trial.near is not None]
    if len(first) > 1:
        waiting = [trial for trial in first if trial.number not in done and trial.number not in rung]
        if waiting:
            stops = rung_of(one.steps)
            return [Next(trial, _given(trial), one.steps if trial.default else stops) for trial in waiting]
        kept = survivors({trial.number: rung.get(trial.number) for trial in first}, always=[0])
    else:
        kept = {trial.number for trial in first}
    going = [trial for trial in first if trial.number not in done]
    if going:
        return [Next(t, _given(t), one.steps, stop=t.number not in kept) for t in going]
    tuned = [done[trial.number] for trial in first]
    if near and any(trial.number not in done for trial in near):
        best = best_of(tuned).setting
        return [
            Next(trial, near_best(one.ranges, best, trial.near or ()), one.steps)
            for trial in near
            if trial.number not in done
        ]
    chosen = best_of([*tuned, *(done[trial.number] for trial in near)]).setting
    return [
        Next(trial, chosen if trial.setting is None else trial.setting, one.steps)
        for trial in planned
        if trial.stage == "seeds" and trial.number not in done
    ]


def _given(trial: PlannedTrial) -> Mapping[str, float]:
    return {} if trial.setting is None else trial.setting
