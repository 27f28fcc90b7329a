"""The picture of a measurement: how far every rule's step is from the floor."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steprule.lab.bench_report import number
from steprule.lab.curves import INK, QUIET, STYLE

__all__ = ["draw_chart"]

SHOWN = {
    "steprule": ("steprule, default", "#2b6cb0"),
    "torch fused": ("torch, fused", "#dd6b20"),
    "torch foreach": ("torch, foreach", "#f6ad55"),
    "torch for-loop": ("torch, for-loop", "#fbd38d"),
}
BAR, GAP, WIDTH, MARGIN = 0.2, 0.17, 9.0, 1.5
LOG_FROM_RATIO = 25


def draw_chart(file: Path, result: Mapping[str, Any]) -> None:
    """Draw one bar per rule and way to step it into an SVG or PNG file."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    rows = [[name for name in SHOWN if name in rule["step"]] for rule in result["rules"]]
    height = sum(BAR * len(row) + GAP for row in rows)
    with pyplot.rc_context({**STYLE, "axes.grid.axis": "x", "axes.spines.left": False}):
        figure, axis = pyplot.subplots(figsize=(WIDTH, height + MARGIN), layout="constrained")
        _draw_bars(axis, result["rules"], rows)
        axis.set_ylim(height - GAP / 2, -GAP / 2)
        scale = ", logarithmic" if axis.get_xscale() == "log" else ""
        axis.set_xlabel(f"time of a step ÷ floor, the time that moving its bytes takes{scale}")
        _label(axis, result)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


def _draw_bars(axis: Any, rules: list[Any], rows: list[list[str]]) -> None:
    longest = max(
        rule["step"][name]["times_floor"] for rule, row in zip(rules, rows, strict=True) for name in row
    )
    if longest > LOG_FROM_RATIO:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(0.5, 4 * longest)
    else:
        axis.set_xlim(0, 1.2 * max(longest, 2))
    top, middles = 0.0, list[float]()
    for rule, row in zip(rules, rows, strict=True):
        middles.append(top + BAR * len(row) / 2)
        for name in row:
            step = rule["step"][name]
            axis.barh(top + BAR / 2, step["times_floor"], 0.9 * BAR, color=SHOWN[name][1])
            text = f"{number(step['times_floor'])} ×   {number(step['ms']['median'])} ms"
            weight = "bold" if name == "steprule" else "normal"
            axis.annotate(
                text,
                (step["times_floor"], top + BAR / 2),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
                weight=weight,
            )
            top += BAR
        top += GAP
    axis.set_yticks(middles, [rule["rule"] for rule in rules], color=INK)
    axis.tick_params(axis="y", length=0)
    axis.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))


def _label(axis: Any, result: Mapping[str, Any]) -> None:
    handles = [
        axis.barh(0, 0, color=color, label=label)
        for name, (label, color) in SHOWN.items()
        if any(name in rule["step"] for rule in result["rules"])
    ]
    axis.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    axis.set_title(
        f"One step of {result['model']}: {result['numbers']:,} numbers in {result['tensors']} tensors, "
        f"{result['dtype']}",
        loc="left",
        weight="bold",
        pad=24,
    )
    where = result["processor"] if result["device"] == "cpu" else result["device"]
    details = (
        f"{where}, {result['threads']} threads, torch {result['torch']}, median of {result['repeats']}; "
        "dashed: the floor"
    )
    axis.annotate(
        details, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=QUIET, fontsize=9
    )
