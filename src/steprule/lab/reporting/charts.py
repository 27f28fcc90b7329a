"""Charts of lines and points: training curves, learning rates, what tuning buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from steprule.lab.reporting.axes import Axis, Scale, can_be_drawn, scale_of, tick_texts
from steprule.lab.reporting.svg import DASHES, STYLES, Drawing, element, mark, place_text, series, text_width

__all__ = ["Point", "Series", "line_chart"]

WIDTH, HEIGHT = 560.0, 340.0
TOP, BOTTOM, RIGHT = 34.0, 46.0, 14.0
# The room above the plot for points without a value that could be drawn.
DIVERGED = 22.0
LETTER = 8.0
# As far apart as the larger letters of phones and paper need.
LINE, LARGER = 17.0, 15.0
LONGEST_NAME = 20


@dataclass(frozen=True)
class Point:
    """One measurement: where it lies, and what it says in words.

    y: NaN or infinite for one that diverged. kind: classes of the style sheet ("full", "ring"), "faint" for one
    that the line leaves out, or "bare" for one that is there for the pointer and the keyboard only.
    """

    x: float
    y: float
    says: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Series:
    """One optimizer, run or quantity: points in a line, with what surrounds them.

    style: number of its colour, dashes and mark. band: (x, low, high). wide: what the band holds is less
    important than the points; the chart may cut it. seeds: single runs, as lines of (x, y), which pages show
    when asked.
    """

    name: str
    style: int
    points: Sequence[Point]
    line: bool = True
    band: Sequence[tuple[float, float, float]] = ()
    wide: bool = False
    seeds: Sequence[Sequence[tuple[float, float]]] = field(default=())


def line_chart(
    all_series: Sequence[Series],
    x: Axis,
    y: Axis,
    says: str,
    diverged: str = "",
    size: tuple[float, float] = (WIDTH, HEIGHT),
    named: bool = True,
) -> Drawing:
    """Draw series of points over two axes.

    diverged: what is written beside the row of points without a finite value, if there are any. named: whether
    the names of several lines stand at their ends.
    """
    width, height = size
    lost = diverged if any(not can_be_drawn(p.y) for s in all_series for p in s.points) else ""
    named = named and len(all_series) > 1 and any(one.line for one in all_series)
    across, up = _scales(all_series, x, y, size, bool(lost), named)
    parts = [*_grid(across, up, x, y)]
    if lost:
        parts += _row_of_diverged(across, up, lost)
    for one in all_series:
        parts.append(series(one.style, _of_series(one, across, up)))
    if named:
        parts += _names(all_series, across, up)
    return Drawing("".join(parts), width, height, says)


def _scales(
    all_series: Sequence[Series], x: Axis, y: Axis, size: tuple[float, float], lost: bool, named: bool
) -> tuple[Scale, Scale]:
    points = [point for one in all_series for point in one.points]
    ys = [point.y for point in points]
    ys += [value for one in all_series if not one.wide for _, *ends in one.band for value in ends]
    up = scale_of(ys, y, size[1] - BOTTOM, TOP + (DIVERGED if lost else 0))
    left = 10 + LETTER * max([len(text) for text in tick_texts(up.ticks())], default=1)
    right = RIGHT + (max(text_width(_short(one.name), LARGER) for one in all_series) + 8 if named else 0)
    return scale_of([point.x for point in points], x, left, size[0] - right, room=0.02), up


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _grid(across: Scale, up: Scale, x: Axis, y: Axis) -> list[str]:
    """Ticks with their lines, and what the axes show: the vertical one above, where nothing cuts it off."""
    parts: list[str] = []
    first, last = across.first, across.last
    for tick, text in zip(up.ticks(), tick_texts(up.ticks()), strict=True):
        at = up.place(tick)
        parts.append(
            element("path", class_="grid", d=f"M{place_text(first)} {place_text(at)}H{place_text(last)}")
        )
        parts.append(element("text", text, x=first - 7, y=at + 4, text_anchor="end"))
    for tick, text in _apart(across):
        at = across.place(tick)
        line = f"M{place_text(at)} {place_text(up.last)}V{place_text(up.first)}"
        parts.append(element("path", class_="grid", d=line))
        parts.append(element("text", text, x=at, y=up.first + 18, text_anchor="middle"))
    parts.append(element("text", escape(y.label), class_="label", x=4.0, y=16.0))
    below = {"class_": "label", "x": (first + last) / 2, "y": up.first + 38, "text_anchor": "middle"}
    return [*parts, element("text", escape(x.label), **below)]


def _apart(across: Scale) -> list[tuple[float, str]]:
    """The ticks of the horizontal axis, as many as have room for their texts."""
    ticks = across.ticks()
    texts = tick_texts(ticks)
    need = max((LETTER * len(text) + 18 for text in texts), default=0)
    every = 1
    places = [across.place(tick) for tick in ticks]
    while (
        len(places[::every]) > 1
        and min(abs(b - a) for a, b in zip(places, places[every:], strict=False)) < need
    ):
        every += 1
    return [*zip(ticks, texts, strict=True)][::every]


def _row_of_diverged(across: Scale, up: Scale, text: str) -> list[str]:
    at = up.last - DIVERGED / 2
    line = f"M{place_text(across.first)} {place_text(up.last - 2)}H{place_text(across.last)}"
    note = element("text", escape(text), x=across.first + 2, y=at + 3)
    return [element("path", class_="limit", d=line, opacity="0.4"), note]


def _of_series(one: Series, across: Scale, up: Scale) -> list[str]:
    parts: list[str] = []
    style = one.style % STYLES
    finite = [point for point in one.points if can_be_drawn(point.y)]
    if one.band:
        upper = [(x, high) for x, _, high in one.band]
        lower = [(x, low) for x, low, _ in reversed(one.band)]
        parts.append(element("path", class_="band", d=_path([*upper, *lower], across, up) + "z"))
    parts += [element("path", class_="seed", d=_path(seed, across, up)) for seed in one.seeds if seed]
    # A faint point is not of the same kind as the others.
    joined = [(point.x, point.y) for point in finite if "faint" not in point.kind]
    if one.line and len(joined) > 1:
        where = _path(joined, across, up)
        parts.append(element("path", class_="line", d=where, stroke_dasharray=DASHES[style] or None))
    for point in one.points:
        x = across.place(point.x)
        inside = can_be_drawn(point.y)
        y = up.place(point.y) if inside else up.last - DIVERGED / 2
        if "ring" in point.kind.split():
            parts.append(element("circle", class_="ring", cx=x, cy=y, r=8))
        kind = " ".join(word for word in point.kind.split() if word != "ring")
        parts.append(mark(x, y, style, point.says, kind if inside else f"{kind} cross".strip()))
    return parts


def _path(points: Sequence[tuple[float, float]], across: Scale, up: Scale) -> str:
    places = [
        f"{place_text(across.place(x))} {place_text(up.place(y))}"
        for x, y in points
        if can_be_drawn(x) and can_be_drawn(y)
    ]
    return "M" + "L".join(places) if places else ""


def _names(all_series: Sequence[Series], across: Scale, up: Scale) -> list[str]:
    """The name of every line at its end, moved apart where lines end close together."""
    ends = [(one, [point for point in one.points if can_be_drawn(point.y)]) for one in all_series]
    wanted = sorted((up.place(points[-1].y), index) for index, (_, points) in enumerate(ends) if points)
    places: list[float] = []
    for at, _ in wanted:
        places.append(max(at, places[-1] + LINE if places else up.last))
    # Those pushed below the plot move up again, and the ones above them with them.
    lowest = up.first
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], lowest)
        lowest = places[index] - LINE
    return [
        series(
            ends[index][0].style,
            [element("text", escape(_short(ends[index][0].name)), class_="end", x=across.last + 9, y=y + 4)],
        )
        for y, (_, index) in zip(places, wanted, strict=True)
    ]
