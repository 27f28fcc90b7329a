"""Charts of rows: a name on the left, and beside it intervals with single points, or bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from steprule.lab.reporting.axes import SMALLEST, Axis, Scale, can_be_drawn, scale_of, tick_texts
from steprule.lab.reporting.svg import Drawing, element, mark, place_text, series, text_width

__all__ = ["Bar", "Interval", "Row", "bar_chart", "interval_chart"]

WIDTH = 560.0
TOP, BOTTOM, RIGHT = 30.0, 28.0, 14.0
LINE, TALL, BAR, GAP = 14.0, 52.0, 19.0, 14.0
LETTER = 8.0
LONGEST_NAME = 26
# The size of letters on phones and paper.
LARGER = 15.0
# From this ratio of the longest to the shortest bar, the axis is logarithmic.
LOG_FROM_RATIO = 25


@dataclass(frozen=True)
class Interval:
    """A middle with its interval, and the single measurements that it comes from.

    says: what readers and screen readers are told about it; notes: the same of each single measurement.
    """

    middle: float
    low: float
    high: float
    says: str
    singles: Sequence[float] = ()
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Bar:
    """One bar: its length, the text at its end, what it says in words, and its colour's number."""

    value: float
    text: str
    says: str
    style: int = 0
    strong: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a chart of intervals."""

    name: str
    style: int
    interval: Interval


def interval_chart(rows: Sequence[Row], axis: Axis, says: str, width: float = WIDTH) -> Drawing:
    """Draw one row for each name: its interval, its middle filled, and single measurements around it."""
    values = [x for row in rows for x in (row.interval.low, row.interval.high, *row.interval.singles)]
    left = _left([row.name for row in rows])
    across = scale_of([*values, *(row.interval.middle for row in rows)], axis, left, width - RIGHT)
    bottom = TOP + TALL * len(rows)
    parts = _frame(across, axis, TOP, bottom)
    for index, row in enumerate(rows):
        y = TOP + TALL * (index + 0.5)
        parts.append(_name(row.name, left, y))
        parts.append(series(row.style, _interval(row, across, y)))
    return Drawing("".join(parts), width, bottom + BOTTOM, says)


def _interval(row: Row, across: Scale, y: float) -> list[str]:
    one, parts = row.interval, list[str]()
    if can_be_drawn(one.low) and can_be_drawn(one.high):
        low, high = place_text(across.place(one.low)), place_text(across.place(one.high))
        parts.append(element("path", class_="range", d=f"M{low} {place_text(y)}H{high}"))
        for end in (low, high):
            parts.append(element("path", class_="range", d=f"M{end} {place_text(y - 5)}v10"))
    notes = [*one.notes, *[""] * len(one.singles)]
    for value, note in zip(one.singles, notes, strict=False):
        x = across.place(value) if can_be_drawn(value) else across.last
        kind = "faint" if can_be_drawn(value) else "cross"
        parts.append(mark(x, y + 13, row.style, note, kind))
    if can_be_drawn(one.middle):
        parts.append(mark(across.place(one.middle), y, row.style, one.says, "full"))
    return parts


def bar_chart(
    rows: Sequence[tuple[str, Sequence[Bar]]],
    axis: Axis,
    says: str,
    limit: tuple[float, str] | None = None,
    width: float = WIDTH,
) -> Drawing:
    """Draw the bars of each name below each other, with a text at the end of each.

    limit: a value with a line through all rows, and what it means.
    """
    bars = [bar for _, row in rows for bar in row]
    left = _left([name for name, _ in rows])
    across = _scale_of_bars(bars, axis, left, width, limit)
    height = sum(BAR * len(row) + GAP for _, row in rows)
    begin = TOP + (LINE if limit else 0)
    parts = _frame(across, axis, begin, begin + height)
    top = begin + GAP / 2
    # A line that crosses the texts at the ends of bars could not be told from a letter.
    clear = across.place(limit[0]) if limit else across.first
    for name, row in rows:
        parts.append(_name(name, left, top + BAR * len(row) / 2))
        for bar in row:
            parts += _bar(bar, across, top, clear)
            top += BAR
        top += GAP
    if limit:
        at = place_text(across.place(limit[0]))
        parts.append(
            element("path", class_="limit", d=f"M{at} {place_text(begin)}V{place_text(begin + height)}")
        )
        shown = {"x": across.place(limit[0]), "y": begin - 4, "text_anchor": "middle"}
        parts.append(element("text", escape(limit[1]), **shown))
    return Drawing("".join(parts), width, begin + height + BOTTOM, says)


def _scale_of_bars(
    bars: Sequence[Bar], axis: Axis, left: float, width: float, limit: tuple[float, str] | None
) -> Scale:
    values = [bar.value for bar in bars] + ([limit[0]] if limit else [])
    text = max((text_width(bar.text, LARGER) for bar in bars), default=0) + 10
    positive = [value for value in values if value > 0]
    log = axis.log and bool(positive) and max(positive) > LOG_FROM_RATIO * min(positive)
    if log:
        # Bars need a beginning, and the shortest must be seen.
        return Scale(min(positive) / 1.6, max(positive), True, left, width - RIGHT - text)
    return Scale(0.0, max([*values, SMALLEST]), False, left, width - RIGHT - text)


def _bar(bar: Bar, across: Scale, top: float, clear: float) -> list[str]:
    start, end = across.first, across.place(bar.value)
    note = element("title", escape(bar.says)) if bar.says else ""
    shape = element(
        "rect", note, class_="bar", x=start, y=top + 1, width=max(end - start, 1.0), height=BAR - 2, rx=1.5
    )
    text = element(
        "text",
        escape(bar.text),
        class_="name strong" if bar.strong else "name",
        x=max(end, clear if end > across.first else end) + 6,
        y=top + BAR - 5,
    )
    return [series(bar.style, [shape]), text]


def _left(names: Sequence[str]) -> float:
    return 14 + max((text_width(_short(name), LARGER) for name in names), default=0)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _name(name: str, left: float, middle: float) -> str:
    return element("text", escape(_short(name)), class_="name", x=left - 9, y=middle + 4, text_anchor="end")


def _frame(across: Scale, axis: Axis, top: float, bottom: float) -> list[str]:
    """The ticks with their lines, and above them what the axis shows."""
    parts = [element("text", escape(axis.label), class_="label", x=4.0, y=14.0)]
    ticks = across.ticks()
    texts = tick_texts(ticks)
    last = -math.inf
    for tick, text in zip(ticks, texts, strict=True):
        at = across.place(tick)
        parts.append(
            element("path", class_="grid", d=f"M{place_text(at)} {place_text(top)}V{place_text(bottom)}")
        )
        if at - last >= LETTER * len(text) + 10:
            parts.append(element("text", text, x=at, y=bottom + 18, text_anchor="middle"))
            last = at
    return parts
