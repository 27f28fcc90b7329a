"""The picture of a measurement: how far every rule's step is from the floor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steprule.lab.bench_report import number
from steprule.lab.picture import INK, STYLE, import_pyplot, set_log_scale, write_heading

__all__ = ["draw_chart"]

SHOWN = {
    "steprule": ("steprule, default", "#2b6cb0"),
    "torch fused": ("torch, fused", "#dd6b20"),
    "torch foreach": ("torch, foreach", "#f6ad55"),
    "torch for-loop": ("torch, for-loop", "#fbd38d"),
}
BAR, GAP, WIDTH, MARGIN = 0.2, 0.17, 9.0, 1.1
LOG_FROM_RATIO = 25
# The share of the axis that is kept for the labels next to the bars.
ROOM = 0.3


def draw_chart(file: Path, result: Mapping[str, Any]) -> None:
    """Draw one bar for each rule and each way to step it, into an SVG or PNG file."""
    pyplot = import_pyplot()
    rows = [[name for name in SHOWN if name in rule["step"]] for rule in result["rules"]]
    height = sum(BAR * len(row) + GAP for row in rows)
    with pyplot.rc_context({**STYLE, "axes.grid.axis": "x", "axes.spines.left": False}):
        figure, axis = pyplot.subplots(figsize=(WIDTH, height + MARGIN), layout="constrained")
        _draw_bars(axis, result["rules"], rows)
        axis.set_ylim(height - GAP / 2, -GAP / 2)
        scale = ", logarithmic" if axis.get_xscale() == "log" else ""
        axis.set_xlabel(f"time of a step ÷ floor, the time that moving its bytes takes{scale}")
        _draw_legend(figure, axis, rows)
        write_heading(figure, *_heading(result))
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


def _draw_bars(axis: Any, rules: list[Any], rows: list[list[str]]) -> None:
    lengths = [rule["step"][name]["times_floor"] for rule, row in zip(rules, rows, strict=True) for name in row]
    longest = max(lengths)
    if longest > LOG_FROM_RATIO:
        shortest = 0.7 * min(0.7, *lengths)
        axis.set_xlim(shortest, shortest * (longest / shortest) ** (1 / (1 - ROOM)))
        set_log_scale(axis, "x")
    else:
        axis.set_xlim(0, max(longest, 2) / (1 - ROOM))
    top, middles = 0.0, list[float]()
    for rule, row in zip(rules, rows, strict=True):
        middles.append(top + BAR * len(row) / 2)
        for name in row:
            _draw_bar(axis, top + BAR / 2, name, rule["step"][name])
            top += BAR
        top += GAP
    names = [f"{rule['rule']} *" if rule.get("unsteady") else rule["rule"] for rule in rules]
    axis.set_yticks(middles, names, color=INK)
    axis.tick_params(axis="y", length=0)
    axis.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="floor")


def _draw_bar(axis: Any, middle: float, name: str, step: Mapping[str, Any]) -> None:
    axis.barh(middle, step["times_floor"], 0.9 * BAR, color=SHOWN[name][1])
    axis.annotate(
        f"{number(step['times_floor'])} ×   {number(step['ms']['median'])} ms",
        # Right of the floor's line, too, which would otherwise cross it.
        (max(step["times_floor"], 1.0), middle),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
        weight="bold" if name == "steprule" else "normal",
    )


def _draw_legend(figure: Any, axis: Any, rows: list[list[str]]) -> None:
    (floor,), _ = axis.get_legend_handles_labels()
    there = {name for row in rows for name in row}
    handles = [
        axis.barh(0, 0, color=color, label=label) for name, (label, color) in SHOWN.items() if name in there
    ]
    figure.legend(handles=[*handles, floor], loc="outside lower center", ncols=len(handles) + 1)


def _heading(result: Mapping[str, Any]) -> tuple[str, str]:
    title = (
        f"One step of {result['model']}: {result['numbers']:,} elements in {result['tensors']} tensors, "
        f"{result['dtype']}"
    )
    where = result["processor"] if result["device"] == "cpu" else result["device"]
    details = f"{where}, {result['threads']} threads, torch {result['torch']}, median of {result['repeats']}"
    if any(rule.get("unsteady") for rule in result["rules"]):
        details += "; * the machine was busy"
    return title, details
