"""The plot of a run: loss, score and learning rate over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steprule.lab.optimizer_classes import optimizer_label
from steprule.lab.report import Line, extras_text, hyperparameter_text
from steprule.lab.reporting.axes import Axis
from steprule.lab.reporting.binning import binned
from steprule.lab.reporting.charts import Point, Series, line_chart
from steprule.lab.reporting.logs import Number
from steprule.lab.reporting.svg import DASHES, Drawing, beneath, element, heading_of, mark, series
from steprule.lab.tasks import loss_text, score_text
from steprule.lab.train import Training

__all__ = ["curves_of"]

STYLES = {"train": 0, "validation": 1, "test": 3}
LEGEND = {
    "train": "train, while learning",
    "validation": "validation, after each epoch",
    "test": "test, at the end",
}
BAND = "the middle 80 % of the training steps"
PANEL = (420.0, 310.0)
ALONE = (560.0, 340.0)
MOST_MARKS = 50
LOG_FROM_RATIO = 8
LEGEND_HEIGHT = 26.0


def curves_of(training: Training, lines: Sequence[Line]) -> Drawing:
    """Training, validation and test of a run in one drawing: a panel each for loss, score and learning rate."""
    task, config = training.task, training.config
    panels = {"loss": task.loss_label}
    if task.score is not None:
        panels[task.score.name] = task.score.label
    if training.schedule is not None:
        panels["lr"] = "learning rate"
    size = PANEL if len(panels) > 1 else ALONE
    width = size[0] * len(panels)
    details = (
        f"{hyperparameter_text(config)}, schedule {config.schedule}, "
        f"batch size {config.batch_size}, seed {config.seed}{extras_text(config)}"
    )
    title = f"{config.task_label} with {optimizer_label(config.optimizer)}"
    heading, top = heading_of(title, details, width)
    drawn = [_panel(key, label, training.steps_per_epoch, lines, size) for key, label in panels.items()]
    beside = [drawing.at(size[0] * number, top) for number, drawing in enumerate(drawn)]
    legend, height = _legend("".join(beside), width, top + size[1])
    return Drawing("".join([*heading, *beside, *legend]), width, height, title)


def _panel(
    key: str, label: str, steps_per_epoch: int, lines: Sequence[Line], size: tuple[float, float]
) -> Drawing:
    """One quantity: the steps as a smoothed line with a band, validation as a line, the test as one point."""
    curves = {
        split: [
            Number(line["step"] / steps_per_epoch, math.nan, float(line[key]))
            for line in lines
            if line["split"] == split and line.get(key) is not None and math.isfinite(line[key])
        ]
        for split in STYLES
    }
    if key == "lr":
        drawn = [_line("train", curves["train"], marked=False)]
    else:
        drawn = [_smoothed(curves["train"])]
        drawn += [
            _line(split, curves[split], len(curves[split]) <= MOST_MARKS) for split in ("validation", "test")
        ]
    drawn = [one for one in drawn if one.points]
    levels = [point.y for one in drawn for point in one.points]
    log = key == "loss" and bool(levels) and min(levels) > 0 and max(levels) > LOG_FROM_RATIO * min(levels)
    text = loss_text if key == "loss" else score_text
    test = f"   test: {text(curves['test'][-1].value)}" if curves["test"] and key != "lr" else ""
    each = f"epoch ({steps_per_epoch:,} step{'s' if steps_per_epoch > 1 else ''} each)"
    y = Axis(f"{label}{', logarithmic' if log else ''}{test}", log, zero=key == "lr")
    return line_chart(drawn, Axis(each, zero=True), y, label, size=size, named=False)


def _smoothed(numbers: Sequence[Number]) -> Series:
    bins = binned([numbers])
    kind = "" if len(bins) == 1 else "bare"  # a line through one point cannot be seen
    points = [Point(one.step, one.middle, kind=kind) for one in bins]
    spread = any(one.low < one.high for one in bins)
    band = [(one.step, one.low, one.high) for one in bins] if spread else []
    return Series("train", STYLES["train"], points, band=band, wide=True)


def _line(split: str, numbers: Sequence[Number], marked: bool) -> Series:
    kind = "full" if split == "test" else "" if marked else "bare"
    return Series(split, STYLES[split], [Point(one.step, one.value, kind=kind) for one in numbers])


def _legend(drawn: str, width: float, top: float) -> tuple[list[str], float]:
    """What the lines are, below all panels, in as many rows as are needed; and where it ends."""
    entries = [
        (series(style, [_sample(split)]), LEGEND[split])
        for split, style in STYLES.items()
        if f'class="s s{style} ' in drawn
    ]
    if 'class="band"' in drawn:
        band = element("rect", class_="band", x=0, y=-10, width=30, height=12)
        entries.append((series(STYLES["train"], [band]), BAND))
    return beneath(entries, width, top, LEGEND_HEIGHT)


def _sample(split: str) -> str:
    style = STYLES[split]
    if split == "test":
        return mark(15, -4, style, "", "full")
    line = element("path", class_="line", d="M0-4h30", stroke_dasharray=DASHES[style] or None)
    return line if split == "train" else line + mark(15, -4, style, "")
