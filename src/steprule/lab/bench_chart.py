"""The picture of a measurement, in a file of its own: how far every rule's step is from the floor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steprule.lab.reporting.bench_page import LEGEND, SHOWN, bench_chart, where_measured
from steprule.lab.reporting.svg import Drawing, beneath, element, heading_of, series
from steprule.lab.reporting.words import words_of

__all__ = ["draw_chart"]

WIDTH, LEGEND_HEIGHT = 860.0, 26.0


def draw_chart(file: Path, result: Mapping[str, Any]) -> None:
    """Draw one bar for each rule and each way to step it, into an SVG file."""
    chart = bench_chart(result, words_of("en"), WIDTH)
    details = f"{where_measured(result)}; median of {result['repeats']}"
    if any(rule.get("unsteady") for rule in result["rules"]):
        details += "; * the machine was busy"
    heading, top = heading_of(chart.says, details, WIDTH)
    there = {name for rule in result["rules"] for name in rule["step"]}
    bar = element("rect", class_="bar", x=14, y=-10, width=16, height=11, rx=1.5)
    entries = [(series(style, [bar]), LEGEND[way]) for way, style in SHOWN.items() if way in there]
    legend, height = beneath(entries, chart.width, top + chart.height, LEGEND_HEIGHT)
    drawing = Drawing("".join([*heading, chart.at(0, top), *legend]), chart.width, height, chart.says)
    file.write_text(drawing.alone(), encoding="utf-8")
