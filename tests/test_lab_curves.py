"""The picture of a run: nothing covers the data, and every axis has ticks of one form."""

from __future__ import annotations

import io
import itertools
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import OWN_TASK

from steprule.lab import curves, picture
from steprule.lab.curves import draw_curves
from steprule.lab.picture import log_ticks
from steprule.lab.run_folder import RunConfig
from steprule.lab.tasks import load_task
from steprule.lab.train import Training

STEPS = 60


def lines_of(epochs: int, first: float, last: float, steps: int = STEPS, **more: Any) -> list[dict[str, Any]]:
    """The metrics of a run whose loss goes from `first` to `last`, with noise."""
    noise = random.Random(0)
    lines: list[dict[str, Any]] = []
    for step in range(1, epochs * steps + 1):
        loss = first * (last / first) ** (step / (epochs * steps)) * noise.uniform(0.5, 2)
        epoch = math.ceil(step / steps)
        common = {"step": step, "epoch": epoch, "accuracy": noise.uniform(20, 100)}
        lines.append({"split": "train", **common, "loss": loss, "lr": 1e-3 * min(1, step / 40)})
        if step % steps == 0:
            lines.append({"split": "validation", **common, "loss": loss})
    test = {"split": "test", "step": epochs * steps, "epoch": epochs, "accuracy": 90.0, "loss": last}
    return [*lines, test | more]


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN_TASK)
    settings = {"lr": 0.001, "betas": (0.85, 0.995), "eps": 1e-9, "weight_decay": 0.125, "amsgrad": True}
    config = RunConfig(f"{tmp_path}/own.py:task", "AdamW", settings, "warmup", 3, 4, seed=0, threads=1)
    return Training(load_task(config.task), config)


def drawn(training: Training, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure, as it was saved."""
    kept: list[Any] = []
    monkeypatch.setattr(picture.import_pyplot(), "close", kept.append)
    stream = io.BytesIO()
    draw_curves(stream, training, lines, "png")
    assert stream.getvalue().startswith(b"\x89PNG")
    monkeypatch.undo()
    (figure,) = kept
    return figure


def shown_ticks(axis: Any) -> list[str]:
    low, high = axis.get_view_interval()
    return [
        label.get_text()
        for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        if low <= place <= high and label.get_text()
    ] + [label.get_text() for label in axis.get_minorticklabels() if label.get_text()]


RUNS = {
    "one epoch": lines_of(1, 2.3, 2.2, steps=STEPS),
    "usual": lines_of(20, 2.3, 0.01),
    "long": lines_of(200, 5, 1e-5),
    "tiny": lines_of(3, 1e-9, 1e-13),
    "diverged": lines_of(3, 1.0, 1e25),
    "two decades": lines_of(5, 300, 3),
    "constant": lines_of(2, 1.0, 1.0, accuracy=90.0),
    "stopped at once": lines_of(1, 2.3, 2.2)[:1],
    "stopped in the first epoch": lines_of(1, 2.3, 2.2)[:30],
    "score undefined": [{**line, "accuracy": None} for line in lines_of(2, 2, 1)],
    "infinite": [{**line, "accuracy": math.inf} for line in lines_of(2, 2, 1)],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lines", RUNS.values(), ids=RUNS)
def test_nothing_overlaps_and_ticks_are_of_one_form(
    training: Training, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = drawn(training, lines, monkeypatch)
    renderer = figure.canvas.get_renderer()
    whole = figure.get_window_extent(renderer)
    panels = [axis.get_tightbbox(renderer) for axis in figure.axes]
    below = [legend.get_window_extent(renderer) for legend in figure.legends]
    above = [text.get_window_extent(renderer) for text in figure.texts]
    assert all(axis.get_legend() is None for axis in figure.axes)
    for one, other in itertools.combinations([*panels, *below, *above], 2):
        assert not one.overlaps(other)
    for part in [*panels, *below, *above]:
        assert whole.x0 <= part.x0
        assert part.x1 <= whole.x1
        assert whole.y0 <= part.y0
        assert part.y1 <= whole.y1
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            texts = shown_ticks(axis)
            assert len({"10^" in text for text in texts}) <= 1, texts
            assert not any(re.search(r"\de-?\d", text) for text in texts), texts
    assert tuple(figure.get_facecolor()) == (1, 1, 1, 1)


def test_the_legend_explains_the_band_where_there_is_one(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lines, there in ((RUNS["usual"], True), (RUNS["stopped in the first epoch"], False)):
        (legend,) = drawn(training, lines, monkeypatch).legends
        assert (curves.BAND in [text.get_text() for text in legend.texts]) == there


def test_the_curves_of_one_panel_have_room_for_the_legend(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN_TASK.replace("score=accuracy, ", ""))
    config = RunConfig(f"{tmp_path}/own.py:task", "torch:AdamW", {}, "none", 3, 4, seed=0, threads=1)
    figure = drawn(Training(load_task(config.task), config), RUNS["long"], monkeypatch)
    assert len(figure.axes) == 1
    assert figure.texts[0].get_text() == "own-task with torch.optim.AdamW"
    (legend,) = figure.legends
    renderer = figure.canvas.get_renderer()
    whole, part = figure.get_window_extent(renderer), legend.get_window_extent(renderer)
    assert whole.x0 <= part.x0
    assert part.x1 <= whole.x1


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.04, 2.5, [0.05, 0.1, 0.2, 0.5, 1, 2]),
        (0.9, 9, [1, 2, 5]),
        (1, 1e3, [1, 10, 100, 1000]),
        (1e-8, 3, [1e-8, 1e-6, 1e-4, 1e-2, 1]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks, rel=1e-9)
    assert torch.tensor(log_ticks(low, high)).diff().gt(0).all()
