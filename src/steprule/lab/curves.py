"""The picture of a run: loss, score and learning rate over the epochs."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import IO, Any

from steprule.lab.optimizer_classes import optimizer_label
from steprule.lab.report import Line, hyperparameter_text
from steprule.lab.tasks import loss_text, score_text
from steprule.lab.train import Training

__all__ = ["draw_curves"]

Points = Sequence[tuple[float, float]]

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
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.hashsalt": "steprule",
}
PANEL_WIDTH, HEIGHT = 4.9, 4.2
BINS = 60
LOG_FROM_RATIO = 8


def draw_curves(stream: IO[bytes], training: Training, lines: Sequence[Line]) -> None:
    """Draw training, validation and test into one SVG file."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")

    task, config = training.task, training.config
    panels = {"loss": task.loss_label}
    if task.score is not None:
        panels[task.score.name] = task.score.label
    if training.schedule is not None:
        panels["lr"] = "learning rate"
    details = (
        f"{hyperparameter_text(config)}, schedule {config.schedule}, "
        f"batch size {config.batch_size}, seed {config.seed}"
    )
    with pyplot.rc_context(STYLE):
        size = (PANEL_WIDTH * len(panels), HEIGHT)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
            _draw_panel(axis, key, training.steps_per_epoch, lines)
            axis.set_ylabel(label)
        first = axes[0][0]
        title = f"{config.task_label} with {optimizer_label(config.optimizer)}"
        first.set_title(title, loc="left", weight="bold", pad=24)
        under_title = {"xycoords": "axes fraction", "textcoords": "offset points"}
        below = first.annotate(details, (0, 1), (0, 9), color=QUIET, fontsize=9, **under_title)
        below.set_in_layout(False)
        figure.savefig(stream, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _draw_panel(axis: Any, key: str, steps_per_epoch: int, lines: Sequence[Line]) -> None:
    """One quantity: the steps as a smoothed line, validation as dots, the test as one diamond."""
    points: dict[str, Points] = {
        split: [
            (line["step"] / steps_per_epoch, float(line[key]))
            for line in lines
            if line["split"] == split and line.get(key) is not None
        ]
        for split in ("train", "validation", "test")
    }
    if key == "lr":
        axis.plot(*zip(*points["train"], strict=True), color=TRAIN)
        axis.set_ylim(bottom=0)
    else:
        _draw_splits(axis, points, logarithmic=key == "loss")
    axis.set_xlim(left=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(f"epoch ({steps_per_epoch:,} steps each)")


def _draw_splits(axis: Any, points: dict[str, Points], logarithmic: bool) -> None:
    if not points["train"]:  # a score that is undefined on every batch
        return
    places, lows, means, highs = zip(*_binned(points["train"]), strict=True)
    axis.plot(places, means, color=TRAIN, label="train, while learning")
    if points["validation"]:  # none if the first epoch was not completed
        validation = zip(*points["validation"], strict=True)
        axis.plot(*validation, color=VALIDATION, marker="o", label="validation, after each epoch")
    for place, value in points["test"]:
        label = f"test, at the end: {loss_text(value) if logarithmic else score_text(value)}"
        axis.plot(place, value, color=TEST, marker="D", markersize=7, linestyle="", label=label)
    levels = [*means, *(value for _, value in points["validation"])]
    if logarithmic and min(levels) > 0 and max(levels) > LOG_FROM_RATIO * min(levels):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    # The spread of single batches is wide and of little interest: it must not set the scale.
    limits = axis.get_ylim()
    axis.fill_between(places, lows, highs, color=TRAIN, alpha=0.15, linewidth=0)
    axis.set_ylim(limits)
    axis.legend()


def _binned(points: Points) -> list[tuple[float, float, float, float]]:
    """Middle, 10th percentile, mean and 90th percentile of equal runs of points, `BINS` at most."""
    count = min(BINS, len(points))
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    bins: list[tuple[float, float, float, float]] = []
    for first, after in itertools.pairwise(edges):
        places, values = zip(*points[first:after], strict=True)
        ordered, last = sorted(values), after - first - 1
        low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        bins.append((sum(places) / len(places), low, sum(values) / len(values), high))
    return bins
