"""What a user's own code or data do wrong, at any moment, ends in one line that says where; runs can go on."""

from __future__ import annotations

import json
import os
import resource
import textwrap
from pathlib import Path

import pytest
import torch
from lab import assert_refused, metrics_in, results_in, run

from steprule.lab.cli import main

# Every part of it can be told to fail; without FAULT it works.
TASK = """
import json, os, sys
import numpy, torch
from torch import nn
from steprule.lab import Score, Task

FAULT, LATE = os.environ.get("FAULT", ""), int(os.environ.get("LATE", "0"))
calls = {}

def fails(place):
    if os.environ.get("ONCE_BEGUN") and not os.path.exists("one/checkpoint.pt"):
        return
    calls[place] = calls.get(place, 0) + 1
    if FAULT == place and calls[place] > LATE:
        exec(os.environ["RAISES"])

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
    def forward(self, x):
        fails("forward")
        return Slope.apply(self.layer(x))
    def train(self, mode=True):
        fails("mode")
        return super().train(mode)
    def state_dict(self, *given, **options):
        fails("state_dict")
        return super().state_dict(*given, **options)

class Slope(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()
    @staticmethod
    def backward(context, slope):
        fails("backward")
        return slope

class Items:
    def __init__(self, count, name):
        self.count, self.name = count, name
    def __len__(self):
        fails("len")
        return self.count
    def __getitem__(self, i):
        fails(self.name)
        return numpy.full(3, i / 10, dtype="float32"), i % 2

def loss(output, target):
    fails("loss")
    return nn.functional.cross_entropy(output, target)

def score(output, target):
    fails("score")
    return (output.argmax(-1) == target).float().mean()

def mean(value):
    fails("of_mean")
    return value

def finish(model, folder):
    fails("finish")

def task():
    fails("task")
    return Task(Model(), Items(20, "train"), Items(6, "validation"), loss, Items(6, "test"),
                Score("right", "", score, mean), finish=finish, epochs=2, batch_size=5, threads=1)
"""
OWN = ("train", "--task", "own.py:task", "--out", "one")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(TASK)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in which nothing fails, made once."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "own.py").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            main([*OWN[:-1], "whole"])
    assert not ended.value.code
    return folder / "whole"


@pytest.mark.parametrize("raises", ["1 / 0", "sys.exit(3)", "raise StopIteration", "raise GeneratorExit"])
@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("task", "own.py:task() failed"),
        ("forward", "the model failed"),
        ("mode", "model."),
        ("backward", "backward() failed"),
        ("len", "len() of train failed"),
        ("train", "item 0 of train cannot be read"),
        ("validation", "item 0 of validation cannot be read"),
        ("test", "item 0 of test cannot be read"),
        ("loss", "the loss failed"),
        ("score", "the score failed"),
    ],
)
def test_a_fault_from_the_start_is_told_before_there_is_a_folder(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    told: str,
    raises: str,
) -> None:
    monkeypatch.setenv("FAULT", place)
    monkeypatch.setenv("RAISES", raises)
    kind = {"1 / 0": "ZeroDivisionError: division by zero", "sys.exit(3)": "SystemExit: 3"}
    assert_refused(run(capsys, *OWN), told, kind.get(raises, raises.removeprefix("raise ")), "(own.py, line ")
    assert not (folder / "one").exists()


@pytest.mark.parametrize(
    ("place", "late", "told"),
    [
        ("forward", 0, "step 1, items "),
        ("forward", 5, "item 5 of validation: the model failed"),
        ("forward", 11, "item 5 of validation: the model failed"),
        ("backward", 6, "step 7, items "),
        ("train", 27, " of train cannot be read"),
        ("validation", 3, "item 3 of validation cannot be read"),
        ("loss", 8, "step 7, items "),
        ("score", 4, "items 0, 1, 2, 3 and 1 more of validation: the score failed"),
        ("of_mean", 5, "the score's of_mean failed"),
        ("state_dict", 3, "the model's state_dict() failed"),
        ("test", 2, "the run is complete, but item 2 of test cannot be read"),
        ("finish", 0, "the run is complete, but finish() failed"),
    ],
)
def test_a_fault_in_the_middle_keeps_what_was_done_and_the_run_goes_on(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    late: int,
    told: str,
    whole: Path,
) -> None:
    monkeypatch.setattr("steprule.lab.train.CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr("steprule.lab.train.CHECKPOINT_SHARE", 0)
    monkeypatch.setenv("RAISES", "sys.exit('enough')")
    monkeypatch.setenv("LATE", str(late))
    monkeypatch.setenv("FAULT", place)
    monkeypatch.setenv("ONCE_BEGUN", "1")
    answer = run(capsys, *OWN)
    assert_refused(answer, told, "SystemExit: enough (own.py, line ")
    assert (
        "complete" in answer.err or "Continue from there with: steprule train --resume --out one" in answer.err
    )
    assert (folder / "one/curves.svg").exists() == bool(metrics_in(folder / "one"))
    monkeypatch.setenv("FAULT", "")
    assert run(capsys, "train", "--resume", "--out", "one").code == 0
    assert results_in(folder / "one") == results_in(whole)


def test_an_epoch_whose_validation_fails_need_not_be_trained_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAISES", "1 / 0")
    monkeypatch.setenv("FAULT", "validation")
    monkeypatch.setenv("ONCE_BEGUN", "1")
    refused = run(capsys, *OWN, "--epochs", "1")
    assert_refused(refused, "item 0 of validation cannot be read", "Continue from there with")
    assert torch.load(folder / "one/checkpoint.pt", weights_only=True)["step"] == 4
    monkeypatch.setenv("FAULT", "train")
    assert run(capsys, "train", "--resume", "--out", "one").code == 0
    monkeypatch.setenv("FAULT", "")
    assert run(capsys, *OWN[:-1], "whole", "--epochs", "1").code == 0
    assert results_in(folder / "one") == results_in(folder / "whole")


def test_an_interrupt_stays_an_interrupt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAISES", "raise KeyboardInterrupt")
    for place, begun in (("task", ""), ("train", ""), ("loss", ""), ("loss", "1")):
        monkeypatch.setenv("FAULT", place)
        monkeypatch.setenv("ONCE_BEGUN", begun)
        assert run(capsys, *OWN).code == 130


def test_a_traceback_comes_when_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAISES", "1 / 0")
    monkeypatch.setenv("FAULT", "loss")
    monkeypatch.setenv("STEPRULE_TRACEBACK", "1")
    answer = run(capsys, *OWN)
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert "in loss\n    fails(" in answer.err


PARTS = {
    "model": "nn.Linear(2, 3)",
    "train": "(x, y)",
    "validation": "(x, y)",
    "loss": "nn.functional.cross_entropy",
    "batch_size": "4",
}
HEAD = """
import numpy, torch
from torch import nn
from steprule.lab import Score, Task
x, y = numpy.random.default_rng(0).normal(size=(12, 2)).astype("float32"), numpy.arange(12) % 3
def but(array, place, value):
    array = array.astype("float64") if value != value or abs(value) == float("inf") else array.copy()
    array[place] = value
    return array
nan, inf = float("nan"), float("inf")
"""


def own_task(before: str = "", **parts: str) -> None:
    given = ", ".join(f"{name}={code}" for name, code in {**PARTS, **parts}.items())
    code = f"{HEAD}{textwrap.dedent(before)}\ndef task():\n    return Task({given})\n"
    Path("own.py").write_text(code)


@pytest.mark.parametrize(
    ("part", "code", "told"),
    [
        (
            "train",
            "(but(x, (7, 1), nan), y)",
            "item 7 of train has NaN in its input, and the loss on it is nan",
        ),
        ("train", "(but(x, (11, 0), inf), y)", "item 11 of train has infinity in its input"),
        ("validation", "(but(x, (7, 1), -inf), y)", "item 7 of validation has infinity in its input"),
        ("test", "[*zip(but(x, (9, 1), nan), y)]", "item 9 of test has NaN in its input"),
        ("train", "(x, but(y, 5, nan))", "of train (item 5 has NaN in its target): the loss failed"),
        (
            "train",
            "(x, but(y, 6, 3))",
            "item 6 of train: the loss failed: IndexError: Target 3 is out of bounds",
        ),
        (
            "test",
            "(x, but(y, 8, -5))",
            "item 8 of test: the loss failed: IndexError: Target -5 is out of bounds",
        ),
        (
            "model",
            "nn.Linear(2, 3).double()",
            "the model failed: RuntimeError: mat1 and mat2 must have the same dtype",
        ),
        (
            "train",
            "((x * 9).astype(int), y)",
            "whole numbers (int64); if the model takes floats, convert them",
        ),
    ],
)
def test_data_that_cannot_be_learnt_from_are_named_before_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], part: str, code: str, told: str
) -> None:
    own_task(**{part: code})
    assert_refused(run(capsys, *OWN), told)
    assert not (folder / "one").exists()


def test_a_model_may_make_something_of_nan(capsys: pytest.CaptureFixture[str]) -> None:
    own_task(
        """
        class Fill(nn.Module):
            def forward(self, x):
                return x.nan_to_num()
        """,
        model="nn.Sequential(Fill(), nn.Linear(2, 3))",
        train="(but(x, (7, 1), nan), y)",
    )
    assert run(capsys, *OWN).code == 0


def test_nan_that_was_not_looked_at_before_is_named_when_it_comes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steprule.lab.rehearsal.LOOK_SECONDS", -1.0)
    for part in ("train", "validation", "test"):
        own_task(**{part: "(but(x, (7, 1), nan), y)"})
        answer = run(capsys, *OWN[:-1], part)
        assert_refused(answer, f"item 7 of {part} has NaN in its input")
        assert "smaller" not in answer.err
        assert (folder / part / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"model": "nn.Linear"}, "Task: model is of type type, must be a torch.nn.Module"),
        ({"loss": "'mse'"}, "Task: loss is mse, must be a function of (output, target)"),
        ({"epochs": "0"}, "Task: epochs is 0, must be a whole number of at least 1"),
        ({"batch_size": "2.5"}, "Task: batch_size is 2.5, must be a whole number"),
        ({"threads": "0"}, "Task: threads is 0, must be"),
        ({"score": "len"}, "Task: score is of type builtin_function_or_method, must be a steprule.lab.Score"),
        ({"finish": "3"}, "Task: finish is 3, must be a function of (model, folder)"),
        ({"facts": "[1]"}, "Task: facts is of type list, must be"),
        (
            {"score": "Score('loss', '', nn.functional.cross_entropy)"},
            "Score: name is 'loss'; the metrics have columns",
        ),
        ({"score": "Score('seconds', '', nn.functional.cross_entropy)"}, "Score: name is 'seconds'"),
        ({"score": "Score('', '', nn.functional.cross_entropy)"}, "Score: name is ''"),
        ({"score": "Score('s', '', 3)"}, "Score: name must be a string, and of_batch a function"),
        ({"score": "Score('s', '', lambda o, t: o)"}, "the score failed: "),
        ({"loss": "lambda o, t: nn.functional.cross_entropy(o, t) * 1j"}, "not one of type torch.complex64"),
        (
            {"loss": "lambda o, t: nn.functional.cross_entropy(o, t) * nan"},
            "the loss is nan before the first step",
        ),
        (
            {"loss": "lambda o, t: nn.functional.cross_entropy(o.detach(), t)"},
            "backward() failed: RuntimeError",
        ),
        ({"model": "nn.LazyLinear(3, device='meta')"}, "own.py"),
    ],
)
def test_parts_of_the_wrong_kind(
    folder: Path, capsys: pytest.CaptureFixture[str], parts: dict[str, str], told: str
) -> None:
    own_task(**parts)
    answer = run(capsys, *OWN)
    if "LazyLinear" not in str(parts):
        assert_refused(answer, told)
    assert answer.code == 2
    assert not (folder / "one").exists()


def test_a_parameter_that_is_nan_from_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    own_task("model = nn.Linear(2, 3)\nnn.init.constant_(model.bias, nan)", model="model")
    assert_refused(run(capsys, *OWN), "parameter bias of the model is NaN or infinite before the first step")


def test_lazy_modules_are_given_their_shapes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_task(model="nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Dropout(0.5), nn.LazyLinear(3))")
    assert run(capsys, *OWN[:-1], "whole", "--epochs", "2").code == 0
    assert run(capsys, *OWN, "--epochs", "1").code == 0
    assert run(capsys, "train", "--resume", "--out", "one", "--epochs", "2").code == 0
    assert results_in(folder / "one") == results_in(folder / "whole")
    state = torch.load(folder / "one/checkpoint.pt", weights_only=True)["model"]
    assert tuple(state["0.weight"].shape) == (8, 2)


def test_a_lazy_module_that_is_never_used_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    own_task(
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.head = nn.LazyLinear(3), nn.LazyLinear(3)
            def forward(self, x):
                return self.used(x)
        """,
        model="Model()",
    )
    assert_refused(run(capsys, *OWN), "head.weight, head.bias of the model has no shape yet")


@pytest.mark.parametrize(
    ("count", "size", "told"), [(65, 32, "try --batch-size 33"), (9, 4, "try --batch-size 5")]
)
def test_a_last_batch_of_one_is_found_before_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], count: int, size: int, told: str
) -> None:
    model = "nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))"
    own_task(
        model=model, train=f"(numpy.resize(x, ({count}, 2)), numpy.resize(y, {count}))", batch_size=str(size)
    )
    refused = run(capsys, *OWN)
    assert_refused(
        refused, f"the last batch of an epoch has 1 of the {count} items of train; {told}: the model failed"
    )
    assert not (folder / "one").exists()
    assert run(capsys, *OWN, *told.split()[1:]).code == 0


def test_a_score_that_is_undefined_is_shown_as_such(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_task(score="Score('auc', '', lambda o, t: o.mean() * nan)", epochs="2")
    answer = run(capsys, *OWN)
    assert answer.code == 0, answer.err
    text = (folder / "one/metrics.jsonl").read_text()
    assert "NaN" not in text
    assert all(json.loads(line)["auc"] is None for line in text.splitlines())
    assert "auc –" in answer.out


def test_a_run_that_diverges_has_its_curves_and_its_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_task(loss="nn.functional.mse_loss", model="nn.Linear(2, 2)", train="(x, x)", validation="(x, x)")
    answer = run(capsys, *OWN, "--optimizer", "sgd", "--lr", "1e6", "--epochs", "9")
    assert_refused(answer, "became", "Try a smaller --lr")
    assert (folder / "one/curves.svg").read_text().rstrip().endswith("</svg>")
    assert "train (while learning, last epoch)" in answer.out


def test_the_folder_is_deleted_while_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    own_task(
        """
        import os, shutil
        def score(output, target):
            if os.path.exists("one/checkpoint.pt"):
                shutil.rmtree("one")
            return output.mean()
        """,
        score="Score('s', '', score)",
        epochs="3",
    )
    assert_refused(run(capsys, *OWN), "one")


@pytest.mark.parametrize("limit", [0, 100, 600, 1200, 2500, 6000, 9000, 12_000])
def test_a_full_disk_at_any_moment(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, limit: int, whole: Path
) -> None:
    monkeypatch.setattr("steprule.lab.train.CHECKPOINT_SECONDS", 0.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        answer = run(capsys, *OWN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_refused(answer, "File too large")
    resumed = run(capsys, "train", "--resume", "--out", "one")
    if resumed.code:
        assert "is not the folder of a run" in resumed.err
        assert run(capsys, *OWN).code == 0
    assert results_in(folder / "one") == results_in(whole)


@pytest.mark.parametrize(
    "left", [[], ["config.json.tmp"], ["config.json"], ["config.json", "metrics.jsonl", "checkpoint.pt.tmp"]]
)
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    folder: Path, capsys: pytest.CaptureFixture[str], left: list[str], whole: Path
) -> None:
    for way in ("again", "resumed"):
        (folder / way).mkdir()
        for name in left:
            text = (whole / "config.json").read_text() if name == "config.json" else ""
            (folder / way / name).write_text(text)
    assert run(capsys, *OWN[:-1], "again").code == 0
    assert results_in(folder / "again") == results_in(whole)
    resumed = run(capsys, "train", "--resume", "--out", "resumed")
    assert resumed.code == (0 if "config.json" in left else 2)
    if not resumed.code:
        assert results_in(folder / "resumed") == results_in(whole)
    assert os.listdir(folder / "again")
