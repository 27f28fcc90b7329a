"""The charts of trainings: their curves, and where they ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from steprule.lab.reporting.axes import Axis, value_text
from steprule.lab.reporting.binning import BINS_OF_SEVERAL, Bin, binned
from steprule.lab.reporting.charts import Point, Series, line_chart
from steprule.lab.reporting.log_groups import LR, Group, Quantities
from steprule.lab.reporting.logs import falls
from steprule.lab.reporting.page import Figure, Table, View
from steprule.lab.reporting.rows import Interval, Row, interval_chart
from steprule.lab.reporting.words import Words

__all__ = ["figure_of_ends", "figure_of_groups", "figure_of_parts"]

# Above this, a line has points for the pointer and the keyboard, but no marks.
MOST_MARKS = 30
SCALES = ((True, "log"), (False, "linear"))

Drawn = Sequence[tuple[str, int, Sequence[Bin]]]
"""Name, number of the colour, and what is drawn."""


def figure_of_parts(
    group: Group, name: str, found: Quantities, styles: Mapping[str, int], say: Words
) -> Figure | None:
    """A quantity of one training, on all parts of the data."""
    drawn = [
        (found.part(key) or found.quantity(name), styles.get(key[0], 0), binned(group.curves(key)))
        for key in found.of(name)
    ]
    return _figure(found.quantity(name), name, drawn, len(group.logs) > 1, found, say)


def figure_of_groups(
    groups: Sequence[Group], key: tuple[str, str], found: Quantities, styles: Mapping[str, int], say: Words
) -> Figure | None:
    """A quantity on one part of the data, of several trainings."""
    drawn = [(group.label, styles[group.label], binned(group.curves(key), BINS_OF_SEVERAL)) for group in groups]
    return _figure(found.full(key), key[1], drawn, any(len(x.logs) > 1 for x in groups), found, say)


def figure_of_ends(
    groups: Sequence[Group], key: tuple[str, str], found: Quantities, styles: Mapping[str, int], say: Words
) -> Figure | None:
    """Where each training ended, and the median of those that differ in the seed only."""
    rows: list[Row] = []
    cells: list[list[str]] = []
    for group in groups:
        logs = [log for log in group.logs if log.curves.get(key)]
        values, middle = group.last(key), group.middle(key)
        if not values:
            continue
        says = say(
            "{label}: {value}, the median of {count}",
            label=group.label,
            value=value_text(middle),
            count=len(values),
        )
        ends = [*zip(logs, values, strict=True)]
        notes = [f"{log.name}: {value_text(value)}" for log, value in ends]
        interval = Interval(middle, math.nan, math.nan, says, values, notes)
        rows.append(Row(group.label, styles[group.label], interval))
        cells += [[group.label, log.name, value_text(value)] for log, value in ends]
    if not rows:
        return None
    name = found.full(key)
    title = say("Last {name}", name=name)
    axis = found.axis(key[1])
    views = [View(interval_chart(rows, Axis(axis, log), title), scale=scale) for log, scale in SCALES]
    note = say("Filled: the median; below it, every training.")
    return Figure(title, note, views, Table([say("training"), say("folder"), name], cells))


def _figure(title: str, name: str, drawn: Drawn, seeds: bool, found: Quantities, say: Words) -> Figure | None:
    """A chart over steps and, where they are known, over seconds."""
    there = [(label, style, bins) for label, style, bins in drawn if bins]
    # A single point of each is in the main table.
    if not there or max(len(bins) for _, _, bins in there) < 2:
        return None
    timed = all(math.isfinite(one.seconds) for _, _, bins in there for one in bins)
    values = [one.middle for _, _, bins in there for one in bins if math.isfinite(one.middle)]
    scales = SCALES if falls(name) and values and min(values) > 0 else ((False, ""),)
    spread = name != LR and any(one.low < one.high for _, _, bins in there for one in bins)
    views: list[View] = []
    for over in ("steps", "seconds") if timed else ("",):
        series = [_series(label, style, bins, over == "seconds", spread) for label, style, bins in there]
        x = Axis(say("seconds") if over == "seconds" else say("step"))
        views += [
            View(
                line_chart(series, x, Axis(found.axis(name), log, zero=name == LR), title, say("not a number")),
                over,
                scale,
            )
            for log, scale in scales
        ]
    note = say("The band holds 80 % of the single steps.")
    if seeds:
        note = say("The line is the median, the band the range over seeds.")
    return Figure(title, note if spread else "", views, _numbers(there, timed, say))


def _numbers(there: Drawn, timed: bool, say: Words) -> Table:
    rows = [
        [
            label,
            f"{one.step:,.0f}",
            *([value_text(one.seconds)] if timed else []),
            *(value_text(x, 4) for x in (one.middle, one.low, one.high)),
        ]
        for label, _, bins in there
        for one in bins
    ]
    times = [say("seconds")] if timed else []
    return Table([say("series"), say("step"), *times, say("middle"), say("low"), say("high")], rows)


def _series(label: str, style: int, bins: Sequence[Bin], over_time: bool, spread: bool) -> Series:
    def x(one: Bin) -> float:
        return one.seconds if over_time else one.step

    kind = "" if len(bins) <= MOST_MARKS else "bare"
    points = [
        Point(x(one), one.middle, f"{label}, {one.step:,.0f}: {value_text(one.middle)}", kind) for one in bins
    ]
    band = [(x(one), one.low, one.high) for one in bins if math.isfinite(one.low + one.high)]
    count = len(bins[0].singles)
    seeds = [
        [(x(one), one.singles[number]) for one in bins if math.isfinite(one.singles[number])]
        for number in range(count if count > 1 else 0)
    ]
    return Series(label, style, points, band=band if spread else (), wide=count == 1, seeds=seeds)
