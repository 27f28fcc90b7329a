"""A run that is stopped, by whatever means, and resumed is the run that was never stopped."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import OWN_TASK, assert_refused, everything_in, metrics_in, results_in, run, run_apart
from rules import RULES, matrices_only
from torch import nn

import steprule
from steprule.lab import Task
from steprule.lab.cli import main
from steprule.lab.errors import LabError
from steprule.lab.randomness import seed_everything
from steprule.lab.run_folder import RunConfig, RunFolder
from steprule.lab.train import Training

TRAIN = ("train", "--task", "own.py:task", "--schedule", "cosine", "--seed", "5")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN_TASK)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run, made once, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "own.py").write_text(OWN_TASK)
    arguments = (*TRAIN[:2], f"{folder}/own.py:task", *TRAIN[3:], "--epochs", "1")
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", f"{folder}/one"])
    assert not ended.value.code
    return folder / "one"


@pytest.fixture
def one(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "one"))


def checkpoint_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_equal(left: Any, right: Any, place: str = "") -> None:
    assert type(left) is type(right), place
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, place
        assert torch.equal(left, right), place
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_equal(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), place
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{place}/{i}")
    else:
        assert left == right, place


def assert_same_run(one: Path, other: Path) -> None:
    assert results_in(one) == results_in(other)
    left, right = checkpoint_of(one), checkpoint_of(other)
    assert left.pop("seconds") > 0
    assert right.pop("seconds") > 0
    # Where the times are in the lines, their length differs.
    for folder, state in ((one, left), (other, right)):
        assert 0 < state.pop("metrics_bytes") <= (folder / "metrics.jsonl").stat().st_size
    assert_equal(left, right)


def test_a_killed_and_an_interrupted_process_go_on_as_if_nothing_had_happened(folder: Path) -> None:
    """Each stops in the middle of an epoch, with more metrics written than its last checkpoint counts."""
    parts = folder / "parts"

    # 252 of the items are read by what is tried before the first step.
    code, _, err = run_apart(folder, *TRAIN, "--out", "parts", stop=signal.SIGKILL, at=560)
    assert code == -signal.SIGKILL, err
    step = checkpoint_of(parts)["step"]
    assert 60 < step < metrics_in(parts)[-1]["step"] < 120, metrics_in(parts)[-1]

    resume = ("train", "--resume", "--out", "parts")
    code, _, err = run_apart(folder, *resume, stop=signal.SIGINT, at=46)
    assert code == 130, err
    last, kept = metrics_in(parts)[-1]["step"], checkpoint_of(parts)["step"]
    # It may have been stopped between the metrics and the count of a step.
    assert re.fullmatch(
        rf"steprule: stopped at step ({last - 1}|{last}) of 180; the checkpoint has step {kept}. "
        r"Continue from there with: steprule train --resume --out parts\n",
        err,
    ), err
    assert step < checkpoint_of(parts)["step"] < metrics_in(parts)[-1]["step"] < 120

    step = checkpoint_of(parts)["step"]
    code, out, err = run_apart(folder, *resume)
    assert code == 0, err
    assert f"after step {step}" in out
    code, _, err = run_apart(folder, *TRAIN, "--out", "whole")
    assert code == 0, err
    assert_same_run(folder / "whole", parts)
    assert [line["step"] for line in metrics_in(parts) if line["split"] == "train"] == [*range(1, 181)]


class Silent:
    def step(self, step: int, epoch: int, loss: float) -> None:
        pass

    def validated(self, result: str) -> None:
        pass


def small_task(rule: str) -> Task:
    """A classification with dropout that the rule can train: matrices or rows, if it takes only those."""
    words = torch.randint(0, 20, (24, 3), generator=torch.Generator().manual_seed(1))
    labels = words.sum(1) % 4
    embedding = nn.Embedding(20, 8, sparse=rule == "SparseAdam")
    layers: list[nn.Module] = [embedding, nn.Flatten()]
    if rule == "SparseAdam":
        layers += [nn.Dropout(0.2), nn.Linear(24, 4).requires_grad_(False)]
    else:
        layers += [nn.Dropout(0.2), nn.Linear(24, 4, bias=not matrices_only(RULES[rule]))]
    return Task(
        model=nn.Sequential(*layers),
        train=(words, labels),
        validation=(words, labels),
        loss=nn.functional.cross_entropy,
    )


def training_of(rule: str, schedule: str = "cosine") -> Training:
    seed_everything(3)
    config = RunConfig(
        task="small",
        optimizer=rule,
        hyperparameters={},
        schedule=schedule,
        epochs=2,
        batch_size=5,
        seed=3,
        threads=1,
    )
    return Training(small_task(rule), config)


class StopsAt(Silent):
    def __init__(self, last: int) -> None:
        self.last = last

    def step(self, step: int, epoch: int, loss: float) -> None:
        if step > self.last:
            raise KeyboardInterrupt


def run_in(folder: Path, training: Training, screen: Silent) -> None:
    folder.mkdir(exist_ok=True)
    run_folder = RunFolder(folder)
    with run_folder.opened():
        if (folder / "checkpoint.pt").exists():
            state = run_folder.load_checkpoint()
            training.load(state)
            run_folder.cut_metrics(state)
        training.run(run_folder, screen)


@pytest.mark.parametrize("rule", steprule.catalogue())
def test_every_rule_goes_on_bit_for_bit_from_the_middle_of_an_epoch(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steprule.lab.train.CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr("steprule.lab.train.CHECKPOINT_SHARE", 0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    training = training_of(rule)
    assert training.steps_per_epoch == 5
    run_in(whole, training, Silent())
    with pytest.raises(KeyboardInterrupt):
        run_in(parts, training_of(rule), StopsAt(7))
    assert checkpoint_of(parts)["step"] == 7
    run_in(parts, training_of(rule), Silent())
    assert_same_run(whole, parts)


def test_a_run_that_began_short_may_become_longer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ("train", "--task", "own.py:task")
    assert run(capsys, *own, "--epochs", "2", "--out", "whole").code == 0
    assert run(capsys, *own, "--epochs", "1", "--out", "parts").code == 0
    assert run(capsys, "train", "--resume", "--epochs", "2", "--out", "parts").code == 0
    assert_same_run(folder / "whole", folder / "parts")
    whole, parts = (RunFolder(folder / name).load_config() for name in ("whole", "parts"))
    assert whole == parts


def test_a_finished_run_is_shown_again_and_stays_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(capsys, "train", "--task", "own.py:task", "--epochs", "1")
    before = metrics_in(folder / "runs/own-task-adabelief-1")
    again = run(capsys, "train", "--resume")
    assert again.code == 0
    assert metrics_in(folder / "runs/own-task-adabelief-1") == before
    for line in ("validation", "test"):
        shown = [text for text in first.out.splitlines() if text.startswith(line)]
        assert shown
        assert shown == [text for text in again.out.splitlines() if text.startswith(line)]


def test_without_a_folder_the_newest_run_is_resumed_or_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("train", "--task", "own.py:task", "--epochs", "1")
    for seed in ("1", "2", "2"):
        assert run(capsys, *own, "--seed", seed).code == 0
    runs = folder / "runs"
    assert sorted(run.name[-1] for run in runs.iterdir()) == ["1", "2", "3"]
    assert "own-task-adabelief-3/" in run(capsys, "train", "--resume").out
    # Another seed is another run: it must not be an older one that is made longer instead.
    refused = run(capsys, "train", "--resume", "--seed", "1", "--epochs", "2")
    assert_refused(refused, "'runs/own-task-adabelief-3' cannot continue with --seed 1 (the run has 2)")
    assert run(capsys, "train", "--task", "own.py:task", "--optimizer", "sgd", "--epochs", "1").code == 0
    assert "own-task-sgd-1/" in run(capsys, "train", "--resume").out
    assert "own-task-adabelief-3/" in run(capsys, "train", "--resume", "--optimizer", "adabelief").out
    refused = run(capsys, "train", "--resume", "--optimizer", "lion")
    assert_refused(refused, "no run in 'runs/' fits these options")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--lr", "0.5", "--lr 0.5 (the run has 0.001)"),
        ("--set", "betas=0.8,0.9", "--set betas (0.8, 0.9) (the run has (0.9, 0.999))"),
        ("--optimizer", "adam", "--optimizer Adam (the run has AdaBelief)"),
        ("--batch-size", "5", "--batch-size 5 (the run has 4)"),
        ("--epochs", "2", "--epochs 2 (the run has 1)"),
        ("--schedule", "none", "--schedule none (the run has cosine)"),
        ("--task", "digits", "--task digits (the run has "),
    ],
)
def test_a_run_goes_on_as_what_it_is(
    one: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, told: str
) -> None:
    before = everything_in(one)
    refused = run(capsys, "train", "--resume", "--out", str(one), option, value)
    assert_refused(refused, told)
    assert everything_in(one) == before


def test_what_changed_since_the_run_began_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *TRAIN, "--epochs", "1", "--out", "one").code == 0
    (folder / "own.py").write_text(OWN_TASK + "# changed\n")
    resumed = run(capsys, "train", "--resume", "--out", "one")
    assert resumed.code == 0
    assert "changed since the run began: own.py sha256." in resumed.err


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    weights = bytes(torch.load(file, weights_only=True)["model"]["3.weight"].numpy())
    content[bytes(content).index(weights) + 5] ^= 1
    file.write_bytes(content)


def replace_by_text(file: Path) -> None:
    file.write_text("a checkpoint")


def replace_by_code(file: Path) -> None:
    torch.save({"step": Silent()}, file)


def replace_by_other(file: Path) -> None:
    torch.save({"model": {}}, file)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "has no checkpoint.pt to resume from"),
        (truncate, "is damaged or not a checkpoint"),
        (flip_one_bit, "is damaged or not a checkpoint"),
        (replace_by_text, "is damaged or not a checkpoint"),
        (replace_by_code, "is damaged or not a checkpoint"),
        (replace_by_other, "is damaged or not a checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_touched(
    one: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    told: str,
) -> None:
    damage(one / "checkpoint.pt")
    before = everything_in(one)
    assert_refused(run(capsys, "train", "--resume", "--out", str(one)), told)
    assert everything_in(one) == before


def test_a_checkpoint_of_another_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *TRAIN, "--epochs", "1", "--out", "one").code == 0
    (folder / "own.py").write_text(OWN_TASK.replace("16", "17"))
    before = everything_in(folder / "one")
    answer = run(capsys, "train", "--resume", "--out", "one")
    assert answer.code == 2
    assert "the checkpoint does not fit this task" in answer.err
    assert everything_in(folder / "one") == before


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl"])
def test_damaged_companions_of_the_checkpoint_are_refused(
    one: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    (one / file).write_text("{")
    before = everything_in(one)
    assert_refused(run(capsys, "train", "--resume", "--out", str(one)), file)
    assert everything_in(one) == before


def test_a_failed_write_leaves_the_checkpoint_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    with folder.opened():
        folder.save_checkpoint({"step": 1})
        before = everything_in(tmp_path)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.replace", full)
        with pytest.raises(LabError, match=r"No space left on device.*What was there before is kept"):
            folder.save_checkpoint({"step": 2})
    assert everything_in(tmp_path) == before


def test_two_processes_do_not_train_in_one_folder(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(one).opened():
        refused = run(capsys, "train", "--resume", "--out", str(one))
    assert_refused(refused, "another process is training")
    assert run(capsys, "train", "--resume", "--out", str(one)).code == 0
