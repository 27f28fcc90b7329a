"""The plot of a run: loss, score and learning rate over the epochs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import IO, Any

from steprule.lab.optimizer_classes import optimizer_label
from steprule.lab.picture import STYLE, import_pyplot, plain_ticks, set_log_scale, write_heading
from steprule.lab.report import Line, extras_text, hyperparameter_text
from steprule.lab.tasks import loss_text, score_text
from steprule.lab.train import Training

__all__ = ["draw_curves"]

Points = Sequence[tuple[float, float]]

TRAIN, VALIDATION, TEST = "#3182ce", "#dd6b20", "#2f855a"
PANEL_WIDTH, ALONE_WIDTH, HEIGHT = 4.9, 6.4, 3.9
MOST_MARKERS = 50
BINS = 60
LOG_FROM_RATIO = 8
BAND = "the middle 80 % of the training steps"


def draw_curves(stream: IO[bytes], training: Training, lines: Sequence[Line], kind: str = "svg") -> None:
    """Draw training, validation and test into one file.

    kind: "svg" or "png".
    """
    pyplot = import_pyplot()
    task, config = training.task, training.config
    panels = {"loss": task.loss_label}
    if task.score is not None:
        panels[task.score.name] = task.score.label
    if training.schedule is not None:
        panels["lr"] = "learning rate"
    details = (
        f"{hyperparameter_text(config)}, schedule {config.schedule}, "
        f"batch size {config.batch_size}, seed {config.seed}{extras_text(config)}"
    )
    with pyplot.rc_context(STYLE):
        size = (PANEL_WIDTH * len(panels) if len(panels) > 1 else ALONE_WIDTH, HEIGHT)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
            _draw_panel(axis, key, training.steps_per_epoch, lines)
            axis.set_ylabel(label)
        _draw_legend(figure, axes[0])
        write_heading(figure, f"{config.task_label} with {optimizer_label(config.optimizer)}", details)
        figure.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        pyplot.close(figure)


def _draw_panel(axis: Any, key: str, steps_per_epoch: int, lines: Sequence[Line]) -> None:
    """One quantity: the steps as a smoothed line, validation as dots, the test as one diamond."""
    points: dict[str, Points] = {
        split: [
            (line["step"] / steps_per_epoch, float(line[key]))
            for line in lines
            if line["split"] == split and line.get(key) is not None and math.isfinite(line[key])
        ]
        for split in ("train", "validation", "test")
    }
    if key == "lr":
        axis.plot(*zip(*points["train"], strict=True), color=TRAIN)
        axis.set_ylim(0, 1.08 * max(lr for _, lr in points["train"]) or 1)
        plain_ticks(axis, "y")
    else:
        _draw_splits(axis, points, is_loss=key == "loss")
    axis.set_xlim(0, max((place for split in points.values() for place, _ in split), default=1) * 1.03)
    if axis.get_xlim()[1] >= 1:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(f"epoch ({steps_per_epoch:,} step{'s' if steps_per_epoch > 1 else ''} each)")


def _draw_splits(axis: Any, points: dict[str, Points], is_loss: bool) -> None:
    if not points["train"]:  # a score that is undefined on every batch
        return
    places, lows, means, highs = zip(*_binned(points["train"]), strict=True)
    # A line through one point cannot be seen.
    axis.plot(places, means, color=TRAIN, marker="o" if len(places) == 1 else "", label="train, while learning")
    if points["validation"]:  # empty if the first epoch was not completed
        marker = "o" if len(points["validation"]) <= MOST_MARKERS else ""
        validation = zip(*points["validation"], strict=True)
        axis.plot(*validation, color=VALIDATION, marker=marker, label="validation, after each epoch")
    for place, value in points["test"]:
        text = loss_text(value) if is_loss else score_text(value)
        axis.plot(place, value, color=TEST, marker="D", markersize=7, linestyle="", label="test, at the end")
        axis.set_title(f"test: {text}", loc="right", fontsize=9, color=TEST)
    _set_limits(axis, [*means, *(y for split in ("validation", "test") for _, y in points[split])], is_loss)
    if highs != lows:
        # The spread of single batches is wide and less important: it must not set the scale.
        limits = axis.get_ylim()
        axis.fill_between(places, lows, highs, color=TRAIN, alpha=0.15, linewidth=0, label=BAND)
        axis.set_ylim(limits)


def _set_limits(axis: Any, levels: Sequence[float], is_loss: bool) -> None:
    """Let the lines fill the panel, with a little room above and below."""
    low, high = min(levels), max(levels)
    if is_loss and low > 0 and high > LOG_FROM_RATIO * low:
        room = (high / low) ** 0.06
        axis.set_ylim(low / room, high * room)
        set_log_scale(axis, "y")
        return
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axis.set_ylim(low - room, high + room)
    plain_ticks(axis, "y")


def _draw_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend below all panels, so that it does not cover them."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found
    if found:
        columns = min(len(found), 2 * len(axes))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


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
