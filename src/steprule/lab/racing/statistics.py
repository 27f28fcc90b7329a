"""What the final losses of several optimizers show, on a few seeds each.

The losses are compared on a log scale, where they are about normal: as ratios. If one of them is not positive,
as they are: as differences.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

__all__ = ["Compared", "Comparison", "compare", "interval_of_mean"]

CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 999

_stats: Any = stats


@dataclass(frozen=True)
class Compared:
    """One optimizer's mean, and how it compares with the lowest; ratios, or differences.

    interval: None with fewer than two seeds. against_interval: None for the lowest one, and where it cannot be
    said.
    """

    mean: float
    interval: tuple[float, float] | None
    against: float
    against_interval: tuple[float, float] | None
    tied: bool


@dataclass(frozen=True)
class Comparison:
    """All optimizers, in the order given.

    smallest: the smallest ratio (difference) that can be shown; None where nothing can. seeds_needed: as in
    `Verdict`.
    """

    by: str
    lowest: int
    compared: Sequence[Compared]
    smallest: float | None
    seeds_needed: int | None


def compare(losses: Sequence[Sequence[float]], as_ratios: bool | None = None) -> Comparison:
    """Tukey's range test: 95 % intervals that hold for all pairs together.

    losses: of each optimizer, one a seed, all finite and at least one. as_ratios: None to decide by their
    signs.

    Source: Kramer 1956, "Extension of Multiple Range Tests to Group Means with Unequal Numbers of
    Replications", https://doi.org/10.2307/3001469
    """
    ratios = all(loss > 0 for some in losses for loss in some) if as_ratios is None else as_ratios
    values = [[math.log(loss) if ratios else loss for loss in some] for some in losses]
    back = math.exp if ratios else float
    means = [statistics.fmean(some) for some in values]
    lowest = min(range(len(means)), key=lambda i: means[i])
    free = sum(len(some) - 1 for some in values)
    squares = sum((x - mean) ** 2 for some, mean in zip(values, means, strict=True) for x in some)
    spread = math.sqrt(squares / free) if free else math.nan
    compared: list[Compared] = []
    for i, some in enumerate(values):
        gap, half = means[i] - means[lowest], _half(len(values), free, spread, len(some), len(values[lowest]))
        own = interval_of_mean(some)
        known = i != lowest and half is not None
        compared.append(
            Compared(
                mean=back(means[i]),
                interval=None if own is None else (back(own[0]), back(own[1])),
                against=back(gap),
                against_interval=(back(gap - half), back(gap + half)) if known and half is not None else None,
                tied=i == lowest or half is None or gap <= half,
            )
        )
    seeds = min(map(len, values))
    half = _half(len(values), free, spread, seeds, seeds)
    tied = [mean - means[lowest] for mean, one in zip(means, compared, strict=True) if one.tied]
    needed = (
        _seeds_needed(len(values), max(tied), spread, seeds) if len(tied) > 1 and half is not None else None
    )
    return Comparison(
        "ratio" if ratios else "difference", lowest, compared, None if half is None else back(half), needed
    )


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval for the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    middle, free = statistics.fmean(values), len(values) - 1
    spread = math.sqrt(sum((value - middle) ** 2 for value in values) / free)
    half = _student(free) * spread / math.sqrt(len(values))
    return middle - half, middle + half


def _half(count: int, free: int, spread: float, seeds: int, other: int) -> float | None:
    """Half the width of the interval of a difference between two of the means."""
    if count < 2 or free < 1:
        return None
    return _tukey(count, free) * spread * math.sqrt((1 / seeds + 1 / other) / 2)


def _seeds_needed(count: int, gap: float, spread: float, seeds: int) -> int | None:
    """About how many seeds each would show a gap of this size four times out of five."""
    luck = float(_stats.norm.ppf(POWER)) * math.sqrt(2)
    needed = math.inf if gap <= 0 else ((_tukey(count, math.inf) + luck) * spread / gap) ** 2
    return max(seeds + 1, math.ceil(needed)) if needed <= MOST_SEEDS else None


@functools.cache
def _student(free: int) -> float:
    return float(_stats.t.ppf((1 + CONFIDENCE) / 2, free))


@functools.cache
def _tukey(count: int, free: float) -> float:
    return float(_stats.studentized_range.ppf(CONFIDENCE, count, free))
