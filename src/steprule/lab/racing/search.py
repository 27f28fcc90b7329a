"""Where to look for hyper-parameters: points in ranges, the half that goes on, a box around the best.

A place is a number from 0 to 1 for each tuned hyper-parameter, from the lower to the upper end of its range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from steprule.lab.racing.folder import Range, Trial

__all__ = ["best_of", "edges", "near_best", "points", "rounded", "setting_at", "survivors", "within"]

BOX = 0.15
EDGE = 0.1
DIGITS = 3

Setting = Mapping[str, float]


def points(dimensions: int, count: int, seed: int) -> list[tuple[float, ...]]:
    """The first of a scrambled Sobol sequence; more points begin with the same ones."""
    if dimensions == 0:
        return [() for _ in range(count)]
    drawn = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return [tuple(float(place) for place in row) for row in drawn]


def setting_at(ranges: Mapping[str, Range], place: Sequence[float]) -> dict[str, float]:
    """The values at a place, to three digits, so that they are the same when they are typed in."""
    return {name: _value(where, at) for (name, where), at in zip(ranges.items(), place, strict=True)}


def _value(where: Range, at: float) -> float:
    if where.scale == "log":
        return rounded(where.low * (where.high / where.low) ** at)
    rest = (1 - where.low) * ((1 - where.high) / (1 - where.low)) ** at
    return round(1 - rounded(rest), 12)


def rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.{DIGITS}g}")


def _place(where: Range, value: float) -> float:
    """The place of a value; minus infinity for one that has none, such as 0."""
    low, high, value = (
        (where.low, where.high, value) if where.scale == "log" else (1 - where.low, 1 - where.high, 1 - value)
    )
    return math.log(value / low) / math.log(high / low) if value > 0 else -math.inf


def near_best(ranges: Mapping[str, Range], best: Setting, near: Sequence[float]) -> dict[str, float]:
    """A setting in a box around the best one.

    near: where in the box, from 0 to 1. The box is 15 % of each range to both sides. It stays in the range,
    except where the best is in the outer tenth of it: there it reaches a decade further.
    """
    place: list[float] = []
    for (name, where), at in zip(ranges.items(), near, strict=True):
        middle = min(1.0, max(0.0, _place(where, best[name])))
        low, high = max(0.0, middle - BOX), min(1.0, middle + BOX)
        if where.scale == "log":
            decade = 1 / math.log10(where.high / where.low)
            low -= decade if middle <= EDGE else 0
            high += decade if middle >= 1 - EDGE else 0
        place.append(low + at * (high - low))
    return setting_at(ranges, place)


def survivors(losses: Mapping[int, float | None], always: Sequence[int] = ()) -> set[int]:
    """The better half of trials by their losses on the way, and those that always go on.

    losses: by number; None for trials that have diverged, which never go on.
    """
    ranked = sorted((loss, number) for number, loss in losses.items() if loss is not None)
    kept = ranked[: math.ceil(len(losses) / 2)]
    return {number for _, number in kept} | {number for number in always if losses.get(number) is not None}


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest loss among those that took all their steps.

    If all have diverged, the one that took the most steps.
    """
    whole = [trial for trial in trials if trial.stopped_at is None and trial.loss is not None]
    if whole:
        return min(whole, key=lambda trial: (trial.loss, trial.number))
    return max(trials, key=lambda trial: (trial.steps, -trial.number))


def edges(ranges: Mapping[str, Range], best: Setting, tried: Sequence[Setting]) -> dict[str, str]:
    """The hyper-parameters whose best value is in the outer tenth and has none beyond it that was tried."""
    found: dict[str, str] = {}
    for name, where in ranges.items():
        at, places = _place(where, best[name]), [_place(where, setting[name]) for setting in tried]
        if at <= EDGE and at <= min(places):
            found[name] = "low"
        elif at >= 1 - EDGE and at >= max(places):
            found[name] = "high"
    return found


def within(trials: Sequence[Trial], name: str, share: float) -> tuple[float, float]:
    """The smallest and the largest value whose losses are at most this share above the lowest one.

    Only trials that took all their steps count. If nothing else was tuned, the range ends before a worse one.
    """
    whole = [(t.setting[name], t.loss) for t in trials if t.stopped_at is None and t.loss is not None]
    lowest = min(loss for _, loss in whole)
    limit = lowest + share * abs(lowest)
    good = [value for value, loss in whole if loss <= limit]
    if len(trials[0].setting) > 1:
        return min(good), max(good)
    best = next(value for value, loss in whole if loss == lowest)
    worse = [value for value, loss in whole if loss > limit]
    between = [
        value for value in good if not any(min(value, best) < other < max(value, best) for other in worse)
    ]
    return min(between), max(between)
