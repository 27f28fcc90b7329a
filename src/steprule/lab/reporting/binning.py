"""Many numbers over steps as few: what a chart of some hundred pixels can show of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from steprule.lab.reporting.logs import Number

__all__ = ["BINS_OF_SEVERAL", "Bin", "binned"]

BINS, BINS_OF_SEVERAL = 60, 40


@dataclass(frozen=True)
class Bin:
    """The numbers of some steps in a row.

    middle, low, high: of one training the mean and the middle 80 % of its numbers, of several the median and
    the range of their means. singles: the mean of each training, NaN where it has none.
    """

    step: float
    seconds: float
    middle: float
    low: float
    high: float
    singles: Sequence[float]


def binned(curves: Sequence[Sequence[Number]], most: int = BINS) -> list[Bin]:
    """The curves of one training, or of several that differ in the seed alone, in bins, `most` at most."""
    steps = sorted({number.step for curve in curves for number in curve})
    if not steps:
        return []
    count = min(most, len(steps))
    edges = [steps[round(i * len(steps) / count)] for i in range(count)]
    parts: list[list[list[Number]]] = [[[] for _ in curves] for _ in edges]
    for index, curve in enumerate(curves):
        at = 0
        for number in curve:
            while at + 1 < count and number.step >= edges[at + 1]:
                at += 1
            parts[at][index].append(number)
    return [_bin(part) for part in parts]


def _bin(part: Sequence[Sequence[Number]]) -> Bin:
    numbers = [number for curve in part for number in curve]
    times = [number.seconds for number in numbers if math.isfinite(number.seconds)]
    singles = [_mean([number.value for number in curve]) for curve in part]
    known = [value for value in singles if math.isfinite(value)]
    if len(part) == 1:
        values = sorted(number.value for number in numbers if math.isfinite(number.value))
        last = len(values) - 1
        low, high = (values[round(0.1 * last)], values[round(0.9 * last)]) if values else (math.nan, math.nan)
        middle = singles[0]
    else:
        low, high = (min(known), max(known)) if known else (math.nan, math.nan)
        # A training that is NaN ranks above all others.
        ranked = sorted(
            [
                *known,
                *[math.inf]
                * sum(1 for x, curve in zip(singles, part, strict=True) if curve and not math.isfinite(x)),
            ]
        )
        middle = statistics.median(ranked) if ranked else math.nan
    return Bin(
        statistics.fmean(number.step for number in numbers),
        statistics.fmean(times) if times else math.nan,
        middle,
        low,
        high,
        singles,
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
