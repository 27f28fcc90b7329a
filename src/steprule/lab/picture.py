"""What the plots have in common: colours, a heading, and uniform ticks."""

from __future__ import annotations

import importlib
import math
import textwrap
from typing import Any

__all__ = [
    "INK",
    "QUIET",
    "STYLE",
    "import_pyplot",
    "log_ticks",
    "plain_ticks",
    "set_log_scale",
    "write_heading",
]

INK, QUIET, GRID = "#1a202c", "#718096", "#e2e8f0"
STYLE = {
    "font.size": 10,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.hashsalt": "steprule",
}
# Size in points, and the width of a letter as a share of it.
TITLE, DETAILS = (12, 0.66), (9, 0.58)
POINTS_PER_INCH = 72
PLAIN_DECADES = (-3, 4)
FORMULA = r"$\mathdefault{"
MOST_TICKS = 7


def import_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files only."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    return importlib.import_module("matplotlib.pyplot")


def write_heading(figure: Any, title: str, details: str) -> None:
    """A title and a line of details at the figure's top left, wrapped to its width; the figure grows by it."""
    width, height = figure.get_size_inches()
    top, parts = 0.1, list[tuple[str, float, dict[str, Any]]]()
    for text, (size, letter), look in (
        (title, TITLE, {"weight": "bold"}),
        (details, DETAILS, {"color": QUIET}),
    ):
        letters = int((width - 0.2) * POINTS_PER_INCH / (letter * size))
        for line in textwrap.wrap(text, letters, break_on_hyphens=False):
            parts.append((line, top, {"fontsize": size, **look}))
            top += 1.5 * size / POINTS_PER_INCH
    total = height + top
    figure.set_size_inches(width, total)
    for line, place, look in parts:
        figure.text(0.1 / width, 1 - place / total, line, va="top", **look)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / total))


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two limits: 1, 2 and 5 in each decade, or powers of ten if there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.5 else (1,)
    every = max(1, math.ceil(decades / MOST_TICKS))
    # Counted from 10⁰, so that 1 is among them.
    exponents = [exponent for exponent in range(first, last + 1) if exponent % every == 0]
    ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
    return [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]


def set_log_scale(axis: Any, name: str) -> None:
    """Make the axis `x` or `y` logarithmic within its current limits; call it when those are final."""
    low, high = getattr(axis, f"get_{name}lim")()
    getattr(axis, f"set_{name}scale")("log")
    getattr(axis, f"set_{name}lim")(low, high)
    ticks = log_ticks(low, high)
    getattr(axis, f"set_{name}ticks")(ticks, [_text_of(tick, ticks) for tick in ticks])
    getattr(axis, f"set_{name}ticks")([], minor=True)


def _text_of(tick: float, ticks: list[float]) -> str:
    """A number, or a power of ten if any of the ticks would be too long as a number."""
    low, high = PLAIN_DECADES
    if all(10.0**low <= other <= 10.0**high for other in ticks):
        return f"{tick:g}"
    exponent = math.floor(math.log10(tick) + 1e-9)
    digit = round(tick / 10.0**exponent)
    return f"$10^{{{exponent}}}$" if digit == 1 else f"${digit}\\cdot 10^{{{exponent}}}$"


def plain_ticks(axis: Any, name: str) -> None:
    """Let all ticks of a linear axis share one power of ten at its end, if they need one."""
    axis.ticklabel_format(axis=name, style="sci", scilimits=PLAIN_DECADES, useMathText=True, useOffset=False)
    # matplotlib makes a formula of each tick then, which takes a quarter of the time of a plot.
    formatter = getattr(axis, f"{name}axis").get_major_formatter()
    with_formulas = formatter.format_ticks

    def format_ticks(values: Any) -> list[str]:
        return [text.removeprefix(FORMULA).removesuffix("}$") for text in with_formulas(values)]

    formatter.format_ticks = format_ticks
