"""Races that are really run, on a task of a second: whole, killed, resumed, with trainings that diverge."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import SOURCE, assert_refused, metrics_in, run
from processes import PATIENCE, started

from steprule.lab.racing.folder import RaceFolder
from steprule.lab.tasks import load_task

TASK = """
import torch
from torch import nn
from steprule.lab import Task, accuracy

def task():
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(700, 6, generator=draw)
    y = (x[:, :3].sum(1) > x[:, 3:].prod(1)).long()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))
    return Task(model=model, train=(x[:96], y[:96]), validation=(x[96:], y[96:]), threads=1,
                loss=nn.functional.cross_entropy, score=accuracy, epochs=2, batch_size=16)

def line():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(3))
    y = x.sum(1, keepdim=True)
    return Task(model=nn.Linear(3, 1), train=(x, y), validation=(x[:40], y[:40]), threads=1,
                loss=nn.functional.mse_loss, epochs=8, batch_size=8)
"""
MINE = """
from steprule import Elementwise, hyper
from steprule.words import sign

class SignStep(Elementwise):
    lr: float = hyper(default=1e-3, at_least=0, search=(1e-3, 1.0))

    @staticmethod
    def update(h, p, g, s, t):
        return -h.lr * sign(g)
"""
RACE = ("--task", "own.py:task", "--optimizers", "adamw,torch:AdamW,mine.py:SignStep,sgd", "--minutes", "2")
# What differs between two runs of one race: times, and how it was called.
VARIES = ("seconds", "ms_per_step", "command", "evaluated_at")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    (tmp_path / "own.py").write_text(TASK)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: cleaned(x) for key, x in value.items() if key not in VARIES}
    return [cleaned(x) for x in value] if isinstance(value, list) else value


def results_in(folder: Path) -> dict[str, Any]:
    """All files of a race, without what varies."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        lines = file.read_text().splitlines() if file.is_file() else []
        if file.suffix == ".jsonl" and "curves" in file.parts:
            found[file.name] = json.loads(lines[-1])["loss"]
        elif file.suffix == ".jsonl":
            found[file.name] = [cleaned(json.loads(line)) for line in lines]
        elif file.is_file() and file.suffix != ".html":  # the page has the times
            found[file.name] = cleaned(json.loads("\n".join(lines))) if file.suffix == ".json" else lines
    return found


def test_a_race_that_is_killed_ends_as_the_one_that_was_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One in this process without a stop, one in two workers that is killed and goes on in this process."""
    answer = run(capsys, "race", *RACE, "--workers", "1", "--out", "whole")
    assert answer.code == 0, answer
    whole = RaceFolder(folder / "whole")
    plan, trials, verdict = whole.read_plan(), whole.read_trials(), whole.read_verdict()
    assert [one.name for one in plan.contestants] == ["adamw", "torch-adamw", "signstep", "sgd"]
    assert len(trials) == len(plan.trials) == 4 * (8 + 3)
    assert verdict is not None
    assert all(sentence in answer.out.replace("\n", " ") for sentence in verdict.sentences)
    assert [line for line in answer.out.splitlines() if line.startswith("steprule train")] == whole.read_best()
    # Two classes with the same arithmetic.
    ours, theirs = ([t.loss for t in trials if t.optimizer == name] for name in ("adamw", "torch-adamw"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    # A step count for each of the four tensors, of 4 bytes.
    assert {t.state_bytes_per_element for t in trials if t.optimizer == "signstep"} == {round(16 / 74, 4)}

    killed = folder / "killed"
    with started(
        "-m", "steprule", "race", *RACE, "--out", "killed", cwd=folder, env={"PYTHONPATH": str(SOURCE)}
    ) as process:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and len(RaceFolder(killed).read_trials()) < 7 and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(RaceFolder(killed).read_trials()) < len(trials)
    with (killed / "trials.jsonl").open("a") as stream:
        stream.write('{"optimizer": "ada')
    answer = run(capsys, "race", "--resume", "--workers", "1", "--out", "killed")
    assert answer.code == 0, answer
    assert results_in(killed) == results_in(folder / "whole")
    assert not (killed / "paused").exists()
    answer = run(capsys, "race", "--resume")
    assert_refused(answer, "no race in 'runs/' is unfinished")


def test_a_trial_is_what_train_does_with_the_printed_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = run(
        capsys, "tune", "--task", "own.py:task", "--optimizer", "mine.py:SignStep", "--minutes", "2",
        "--workers", "1", "--out", "tuned",
    )  # fmt: skip
    assert answer.code == 0, answer
    tuned = RaceFolder(folder / "tuned")
    (command,) = tuned.read_best()
    last = next(trial for trial in tuned.read_trials() if trial.stage == "seeds" and not trial.default)
    words = command.split()[1:]
    assert run(capsys, *words, "--seed", str(last.seed), "--out", "again").code == 0
    validation = [line for line in metrics_in(folder / "again") if line["split"] == "validation"][-1]
    assert validation["loss"] == last.loss
    assert validation["accuracy"] == last.score
    assert re.search(r"SignStep with lr [\d.e-]+ ended at loss .* on 3 fresh seeds\.", answer.out)
    assert "With its default lr 0.001 it ended at loss" in answer.out

    (folder / "mine.py").write_text(f"{MINE}\n# other")
    answer = run(capsys, "tune", "--resume", "--out", "tuned")
    assert_refused(answer, "optimizer mine.py sha256 changed since it began")


def test_trainings_that_diverge_are_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(
        capsys, "race", "--task", "own.py:line", "--optimizers", "sgd,adamw+ema", "--minutes", "2",
        "--search", "sgd.lr=0.03..30000", "--workers", "1", "--out", "race",
    )  # fmt: skip
    assert answer.code == 0, answer
    assert "the validation data have only 40 items" in answer.err
    trials = RaceFolder(folder / "race").read_trials()
    lost = [trial for trial in trials if trial.diverged]
    assert lost
    for trial in lost:
        assert trial.loss is None
        assert trial.stopped_at == trial.steps < 64
        assert RaceFolder(folder / "race").read_curve(trial.optimizer, trial.number)[-1].loss is None
    assert f"{len(lost)} of {len(trials)} trainings diverged" in " ".join(answer.out.split())


def test_an_optimizer_that_always_diverges_loses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text(MINE.replace("sign(g)", "g * 1e30"))
    answer = run(
        capsys, "race", "--task", "own.py:line", "--optimizers", "mine.py:SignStep,adamw", "--minutes", "2",
        "--workers", "1", "--out", "race",
    )  # fmt: skip
    assert answer.code == 0, answer
    verdict = RaceFolder(folder / "race").read_verdict()
    assert verdict is not None
    assert "SignStep diverged in 3 of its 3 final trainings." in verdict.sentences
    assert [one.loss is None for one in verdict.standings] == [False, True]


def test_what_takes_too_long_is_refused_or_shortened(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = (
        "race",
        *RACE[:2],
        "--optimizers",
        "sgd,lion",
        "--epochs",
        "3000",
        "--workers",
        "1",
        "--out",
        "race",
    )
    answer = run(capsys, *long, "--minutes", "0.2")
    assert_refused(answer, "less than a tenth of its 18,000 steps", "--fit")
    answer = run(capsys, *long, "--minutes", "1")
    assert_refused(answer, "more than the 1 minutes" if "more than" in answer.err else "less than a tenth")
    assert not (folder / "race").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trials", "5"), "5 trials and 3 seeds show too little; at least 8 trials and 3 seeds"),
        (("--seeds", "2"), "at least 8 trials and 3 seeds"),
        (("--optimizers", "adamw,lionn"), "no optimizer 'lionn'. Did you mean 'Lion'?"),
        (("--optimizers", "adamw,,lion"), "no optimizer ''"),
        (("--budget", "money"), "no budget 'money'. Give steps or time."),
        (("--schedule", "cos"), "no schedule 'cos'. Did you mean 'cosine'?"),
        (("--search", "lr=3"), "--search lr=3 must be NAME=LOW..HIGH"),
        (("--tune", "momentun"), "number 'momentun' to tune. Did you mean 'momentum'?"),
        (("--optimizers", "adamw,sophia", "--task", "own.py:line"), "Sophia draws class labels"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    task = () if "--task" in arguments else ("--task", "own.py:task")
    names = () if "--optimizers" in arguments else ("--optimizers", "adamw,sgd")
    answer = run(capsys, "race", *task, *names, "--minutes", "2", *arguments)
    assert_refused(answer, message)
    assert not (folder / "runs").exists()


def test_a_folder_that_holds_something_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "race", *RACE, "--out", ".")
    assert_refused(answer, "'.' is not empty")
    assert_refused(run(capsys, "race", "--resume", "--out", "."), "is not the folder of a race")


def test_mnist_is_split_the_same_way_for_every_seed() -> None:
    parts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        task = load_task("mnist")
        assert task.test is not None
        parts.append([task.train, task.validation, task.test])
    sizes = [len(part[0]) for part in parts[0]]  # type: ignore[index, arg-type]
    assert sizes == [3500, 1000, 500]
    for left, right in zip(*parts, strict=True):
        assert torch.equal(left[0], right[0])  # type: ignore[index]
    images = torch.cat([part[0] for part in parts[0]]).flatten(1)  # type: ignore[index]
    labels = torch.cat([part[1] for part in parts[0]])  # type: ignore[index]
    assert images.min() == 0
    assert images.max() == 1
    assert torch.bincount(labels).tolist() == [500] * 10
    ones = images[labels == 1].mean(0).view(28, 28)
    assert ones[14, 13:16].max() > 0.5 > ones[14, :9].max()


def test_code_is_learnt_from_pythons_own_sources() -> None:
    task = load_task("code")
    inputs, targets = task.train  # type: ignore[misc]
    assert torch.equal(inputs[0, 1:], targets[0, :-1])  # type: ignore[index, call-overload]
    assert "600,000 characters" in task.facts["data"]
