"""The picture of a run: nothing covers anything else, and all of it is inside."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from lab import OWN_TASK
from pictures import assert_inside, assert_readable, texts_in

from steprule.lab import curves
from steprule.lab.curves import curves_of
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


@pytest.mark.parametrize("lines", RUNS.values(), ids=RUNS)
def test_nothing_overlaps_and_all_of_it_is_inside(training: Training, lines: list[dict[str, Any]]) -> None:
    svg = curves_of(training, lines).alone()
    assert_readable(svg)
    assert_inside(svg)


def test_the_legend_explains_the_band_where_there_is_one(training: Training) -> None:
    for lines, there in ((RUNS["usual"], True), (RUNS["stopped in the first epoch"], False)):
        assert (curves.BAND in curves_of(training, lines).content) == there


def test_a_loss_that_fell_far_has_a_logarithmic_axis(training: Training) -> None:
    for lines, there in ((RUNS["usual"], True), (RUNS["one epoch"], False)):
        assert ("logarithmic" in curves_of(training, lines).content) == there


def test_the_curves_of_one_panel_have_room_for_the_legend(tmp_path: Path, training: Training) -> None:
    (tmp_path / "own.py").write_text(OWN_TASK.replace("score=accuracy, ", ""))
    config = RunConfig(f"{tmp_path}/own.py:task", "torch:AdamW", {}, "none", 3, 4, seed=0, threads=1)
    drawn = curves_of(Training(load_task(config.task), config), RUNS["long"])
    assert drawn.says == "own-task with torch.optim.AdamW"
    assert_readable(drawn.alone())
    assert next(text.text for text in texts_in(drawn.alone())) == drawn.says
