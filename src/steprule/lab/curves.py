"""The picture of a run: loss, score and learning rate over the epochs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steprule.lab.report import Line, hyperparameter_text
from steprule.lab.train import Training

__all__ = ["draw_curves"]

INK, QUIET, GRID = "#1a202c", "#718096", "#e2e8f0"
TRAIN, VALIDATION, TEST = "#3182ce", "#dd6b20", "#2f855a"
STYLE = {
    "font.size": 10,
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
    "svg.fonttype": "none",
    "svg.hashsalt": "steprule",
}
BINS = 150
LOG_FROM_RATIO = 8


def draw_curves(file: Path, training: Training, lines: Sequence[Line]) -> None:
    """Draw training, validation and test into one SVG or PNG file."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")

    score, config = training.task.score, training.config
    panels = {"loss": training.task.loss_label}
    if score is not None:
        panels[score.name] = f"{score.name} ({score.unit})" if score.unit else score.name
    if training.schedule is not None:
        panels["lr"] = "learning rate"
    with pyplot.rc_context(STYLE):
        size = (4.8 * len(panels) + 0.4, 4.2)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
            _draw_panel(axis, key, label, training.steps_per_epoch, lines)
        if len(panels) == 1:
            figure.set_size_inches(7, 4.2)
        title = f"{config.task_label} with {config.optimizer}"
        axes[0][0].set_title(title, loc="left", weight="bold", pad=26)
        axes[0][0].annotate(
            f"{hyperparameter_text(config)}; batch size {config.batch_size}, seed {config.seed}",
            (0, 1),
            xytext=(0, 10),
            xycoords="axes fraction",
            textcoords="offset points",
            color=QUIET,
            fontsize=9,
            annotation_clip=False,
        ).set_in_layout(False)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


def _draw_panel(axis: Any, key: str, label: str, steps_per_epoch: int, lines: Sequence[Line]) -> None:
    """One quantity: steps in the colour of training, validation as dots, test as a level."""
    points = {
        split: [(x["step"] / steps_per_epoch, float(x[key])) for x in lines if x["split"] == split and key in x]
        for split in ("train", "validation", "test")
    }
    bins = _binned(points["train"])
    where = [at for at, _, _, _ in bins]
    if key == "lr":
        axis.plot(*zip(*points["train"], strict=True), color=TRAIN)
    else:
        low, mean, high = ([entry[i] for entry in bins] for i in (1, 2, 3))
        axis.fill_between(where, low, high, color=TRAIN, alpha=0.18, linewidth=0)
        axis.plot(where, mean, color=TRAIN, linewidth=1.6, label="train, batches as they come")
        axis.plot(
            *zip(*points["validation"], strict=True),
            color=VALIDATION,
            linewidth=1.2,
            marker="o",
            markersize=4,
            label="validation, after each epoch",
        )
        for at, value in points["test"]:
            axis.plot(
                at,
                value,
                color=TEST,
                marker="D",
                markersize=6,
                linestyle="",
                label=f"test, at the end: {value:.4g}",
            )
        axis.legend(loc="best", fontsize=9)
    _scale(axis, [value for series in points.values() for _, value in series], key)
    axis.set_xlabel(f"epoch ({steps_per_epoch:,} steps each)")
    axis.set_ylabel(label)


def _binned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Place, 10th percentile, mean and 90th percentile of at most `BINS` runs of points."""
    length = max(1, math.ceil(len(points) / BINS))
    bins: list[tuple[float, float, float, float]] = []
    for first in range(0, len(points), length):
        part = points[first : first + length]
        values = sorted(value for _, value in part)
        last = len(values) - 1
        mean = sum(values) / len(values)
        bins.append((part[len(part) // 2][0], values[round(0.1 * last)], mean, values[round(0.9 * last)]))
    return bins


def _scale(axis: Any, values: Sequence[float], key: str) -> None:
    """A logarithmic axis where a loss falls by much, so that its end is seen too."""
    if key == "loss" and min(values) > 0 and max(values) > LOG_FROM_RATIO * min(values):
        axis.set_yscale("log")
