"""Every part of a model is in the mode its user left it in, at the first step and after every evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lab import results_in, run
from torch import nn

import steprule
from steprule.lab.modes import Modes, parts_in_eval_mode

TASK = """
import numpy
from torch import nn
from steprule.lab import Task
def layers():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
def task():
    x = numpy.random.default_rng(0).normal(size=(24, 4)).astype("float32"); y = (x[:, 0] > 0).astype("int64")
    model = layers()
    MODE
    return Task(model, (x, y), (x, y), nn.functional.cross_entropy, epochs=3, batch_size=8, test=(x, y))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("mode", "moves", "told"),
    [
        ("pass", True, ""),
        ("model.eval()", True, ""),
        ("model[1].eval()", False, "eval mode  stays on: 1"),
        ("model[1].eval(); model[2].eval()", False, "eval mode  stays on: 1, 2"),
        ("model.eval(); model[3].train()", False, ""),
    ],
)
def test_a_run_in_every_mode_goes_on_bit_for_bit(
    folder: Path, capsys: pytest.CaptureFixture[str], mode: str, moves: bool, told: str
) -> None:
    (folder / "own.py").write_text(TASK.replace("MODE", mode))
    own = ("train", "--task", "own.py:task", "--optimizer", "sgd", "--lr", "0.1")
    whole = run(capsys, *own, "--out", "whole")
    assert whole.code == 0, whole.err
    assert told in whole.out
    assert run(capsys, *own, "--out", "parts", "--epochs", "1").code == 0
    assert run(capsys, "train", "--resume", "--out", "parts", "--epochs", "3").code == 0
    assert results_in(folder / "whole") == results_in(folder / "parts")
    states = [steprule.load_checkpoint(folder / name / "checkpoint.pt")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert bool(states[0]["1.running_mean"].any()) == moves


class Merging(nn.Module):
    """A layer whose train() does more than set a flag, as LoRA's does."""

    def __init__(self) -> None:
        super().__init__()
        self.merged = False

    def train(self, mode: bool = True) -> Any:
        self.merged = not mode
        return super().train(mode)


def optimizer_of(model: nn.Module) -> Any:
    return steprule.SGD([nn.Parameter(torch.ones(1))])


def test_modes_are_put_back_by_train_and_part_by_part() -> None:
    model = nn.Sequential(Merging(), nn.Sequential(Merging(), nn.Dropout()), nn.BatchNorm1d(2))
    model[1].eval()
    model[1][1].train()
    given = [part.training for part in model.modules()]
    modes = Modes(model)
    for _ in range(2):
        with modes.evaluating(optimizer_of(model)):
            assert not any(part.training for part in model.modules())
            assert not torch.is_grad_enabled()
        assert [part.training for part in model.modules()] == given
        assert [model[0].merged, model[1][0].merged] == [False, True]
    assert parts_in_eval_mode(model) == ["1"]


def test_modes_are_put_back_after_a_fault() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    modes = Modes(model)
    with pytest.raises(ZeroDivisionError), modes.evaluating(optimizer_of(model)):
        raise ZeroDivisionError
    assert [part.training for part in model.modules()] == [True, True, False]
