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
from typing import Any, Literal

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

    by: Literal["ratio", "difference"]
    lowest: int
    compared: Sequence[Compared]
    smallest: float | None
    seeds_needed: int | None


def compare(losses: Sequence[Sequence[float]], as_ratios: bool | None = None) -> Comparison:
    """Games and Howell's test: Tukey's range, with a spread of each optimizer's own.

    Its 95 % intervals hold for all pairs together. With one pooled spread, four equal optimizers of which one
    has ten times the spread of the others are distinguished in 12 % of races of 5 seeds; this way, in 5 %.

    losses: of each optimizer, one a seed, all finite and at least one. as_ratios: None to decide by their
    signs.

    Source: Games and Howell 1976, "Pairwise Multiple Comparison Procedures with Unequal N's and/or Variances",
    https://doi.org/10.3102/10769986001002113
    """
    ratios = all(loss > 0 for some in losses for loss in some) if as_ratios is None else as_ratios
    values = [[math.log(loss) if ratios else loss for loss in some] for some in losses]
    back = math.exp if ratios else float
    means = [statistics.fmean(some) for some in values]
    lowest = min(range(len(means)), key=lambda i: means[i])
    halves = [_half(len(values), some, values[lowest]) for some in values]
    compared: list[Compared] = []
    for i, (mean, half) in enumerate(zip(means, halves, strict=True)):
        gap, own = mean - means[lowest], interval_of_mean(values[i])
        against = None if half is None or i == lowest else (back(gap - half), back(gap + half))
        compared.append(
            Compared(
                mean=back(mean),
                interval=None if own is None else (back(own[0]), back(own[1])),
                against=back(gap),
                against_interval=against,
                tied=i == lowest or half is None or gap <= half,
            )
        )
    seen = [half for i, half in enumerate(halves) if half is not None and i != lowest]
    tied = [i for i, one in enumerate(compared) if one.tied and i != lowest and halves[i] is not None]
    last = max(tied, key=lambda i: means[i], default=None)
    needed = None if last is None else _seeds_needed(len(values), values[last], values[lowest])
    return Comparison(
        by="ratio" if ratios else "difference",
        lowest=lowest,
        compared=compared,
        smallest=back(min(seen)) if seen else None,
        seeds_needed=needed,
    )


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval for the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    middle, free = statistics.fmean(values), len(values) - 1
    half = _student(free) * math.sqrt(_variance(values) / len(values))
    return middle - half, middle + half


def _half(count: int, some: Sequence[float], others: Sequence[float]) -> float | None:
    """Half the width of the interval of the difference between two of the means; None for a single seed."""
    if count < 2 or min(len(some), len(others)) < 2:
        return None
    one, other = _variance(some) / len(some), _variance(others) / len(others)
    if one + other == 0:
        return 0.0
    # Welch and Satterthwaite's degrees of freedom.
    free = (one + other) ** 2 / (one**2 / (len(some) - 1) + other**2 / (len(others) - 1))
    return _tukey(count, _two_digits(free)) * math.sqrt((one + other) / 2)


def _seeds_needed(count: int, some: Sequence[float], others: Sequence[float]) -> int | None:
    """About how many seeds each would show the gap between two means four times out of five."""
    gap = statistics.fmean(some) - statistics.fmean(others)
    luck = float(_stats.norm.ppf(POWER)) * math.sqrt(2)
    variance = (_variance(some) + _variance(others)) / 2
    needed = math.inf if gap <= 0 else (_tukey(count, math.inf) + luck) ** 2 * variance / gap**2
    return max(len(some) + 1, math.ceil(needed)) if needed <= MOST_SEEDS else None


def _variance(values: Sequence[float]) -> float:
    middle = statistics.fmean(values)
    return sum((value - middle) ** 2 for value in values) / (len(values) - 1)


def _two_digits(value: float) -> float:
    """Rounded down to two significant digits, which makes an interval a little wider."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.floor(value / scale) * scale


@functools.cache
def _student(free: int) -> float:
    return float(_stats.t.ppf((1 + CONFIDENCE) / 2, free))


@functools.cache
def _tukey(count: int, free: float) -> float:
    return float(_stats.studentized_range.ppf(CONFIDENCE, count, free))
