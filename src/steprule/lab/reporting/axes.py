"""Axes of charts: which range they show, where a value lies, and round numbers to write beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "SMALLEST",
    "Axis",
    "Scale",
    "can_be_drawn",
    "log_ticks",
    "plain_ticks",
    "scale_of",
    "setting_text",
    "tick_texts",
    "value_text",
]

PLAIN = (1e-4, 1e6)
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MOST_TICKS = 7
SMALLEST, LARGEST = 1e-250, 1e250


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    label: the quantity with its unit. log: logarithmic, if all values allow it. zero: 0 is always shown. whole:
    only whole numbers are written beside it.
    """

    label: str
    log: bool = False
    zero: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Scale:
    """A range of values, laid over a range of places."""

    low: float
    high: float
    log: bool
    first: float
    last: float
    whole: bool = False

    def place(self, value: float) -> float:
        """Where a value lies; beyond the ends of the range, at the end."""
        if self.log:
            value, low, high = (math.log10(max(x, SMALLEST)) for x in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round numbers within the range."""
        ticks = log_ticks(self.low, self.high) if self.log else []
        if len(ticks) < 2:
            ticks = plain_ticks(self.low, self.high)
        return [tick for tick in ticks if tick == round(tick)] if self.whole else ticks


def can_be_drawn(value: float) -> bool:
    """Whether a number has a place on an axis: it is finite, and so is its distance to others."""
    return abs(value) < LARGEST


def scale_of(values: Iterable[float], axis: Axis, first: float, last: float, room: float = 0.04) -> Scale:
    """The scale that shows all finite values, with a little room at both ends.

    It is logarithmic if the axis is and all values are above 0. room: as a share of the whole length.
    """
    finite = [value for value in values if can_be_drawn(value)]
    log = axis.log and bool(finite) and min(finite) > SMALLEST
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if axis.zero and not log:
        low, high = min(low, 0.0), max(high, 0.0)
    if log:
        decades = math.log10(high) - math.log10(low)
        # A single value is in the middle of something that can be seen.
        spread = 10 ** (max(decades, 0.01) * room) if decades > 0.002 else 1.2
        return Scale(low / spread, high * spread, True, first, last, axis.whole)
    spread = (high - low) * room or abs(high) * 0.1 or 1.0
    from_zero = axis.zero and low == 0
    return Scale(low if from_zero else low - spread, high + spread, False, first, last, axis.whole)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two limits: 1, 2 and 5 in each decade, or powers of ten if there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high) - math.log10(low)
    steps = (1, 2, 5) if decades < 2.5 else (1,)
    every = max(1, math.ceil(decades / MOST_TICKS))
    # Counted from 10⁰, so that 1 is among them.
    exponents = [exponent for exponent in range(first, last + 1) if exponent % every == 0]
    ticks = [float(f"{step}e{exponent}") for exponent in exponents for step in steps]
    return [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]


def plain_ticks(low: float, high: float) -> list[float]:
    """About six round numbers between two limits, at equal distances."""
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [float(f"{(first + index) * step:.12g}") for index in range(count)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The numbers as text, all in one form: as they are, or with a power of ten."""
    sizes = [abs(tick) for tick in ticks if tick]
    if not sizes or (min(sizes) >= PLAIN[0] * (1 - 1e-9) and max(sizes) < PLAIN[1]):
        return [f"{tick:,.10g}" if abs(tick) >= 1e4 else f"{tick:.10g}" for tick in ticks]
    return [_with_power(tick) for tick in ticks]


def _with_power(value: float) -> str:
    if value == 0:
        return "0"
    digits, exponent = f"{value:.9e}".split("e")
    factor, power = f"{float(digits):g}", "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return power if factor == "1" else f"-{power}" if factor == "-1" else f"{factor}·{power}"


def setting_text(value: float | None) -> str:
    """A hyper-parameter, as short as three digits allow: 0.001, 3.2e-05."""
    return "–" if value is None else f"{value:.3g}"


def value_text(value: float | None, digits: int = 3) -> str:
    """A number for tables and notes: three digits, as many as a measurement is worth, and a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size and not PLAIN[0] <= size < 1e9:
        return _with_power(float(f"{value:.{digits - 1}e}"))
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"
