"""Wrong input is answered by one line that helps, exit code 2, and an untouched disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lab import OWN_TASK, SOURCE, assert_refused, everything_in, metrics_in, run

GOOD = "from steprule.lab import Task\nfrom torch import nn\nimport torch\n"
TRAIN = ("train", "--task", "own.py:task")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN_TASK)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--optimizer adabelif", "no optimizer 'adabelif'. Did you mean 'AdaBelief'?"),
        ("--optimizer x", "Known: AdaBelief, Adadelta"),
        ("--set weigth_decay=0.1", "no hyper-parameter 'weigth_decay'. Did you mean 'weight_decay'?"),
        ("--lr -1", "AdaBelief: lr = -1.0, must be at least 0"),
        ("--lr nan", "AdaBelief: lr = nan"),
        ("--set betas=2,0.9", "betas[0] = 2, must be at least 0 and below 1"),
        ("--set betas=0.9", "AdaBelief: betas = 0.9"),
        ("--set lr=word", "AdaBelief: lr = 'word'"),
        ("--set betas", "--set betas must be NAME=VALUE"),
        ("--set =1", "--set =1 must be NAME=VALUE"),
        ("--set params=1", "gets its params from the task"),
        ("--lr 1 --set lr=2", "'lr' is given twice"),
        ("--schedule cosin", "no schedule 'cosin'. Did you mean 'cosine'?"),
        ("--epochs 0", "'--epochs'"),
        ("--epochs many", "'--epochs'"),
        ("--batch-size 0", "'--batch-size'"),
        ("--seed -1", "'--seed'"),
        ("--out=", "'--out': it is empty"),
        ("--optimiser adam", "--optimizer"),
        ("--task digit", "no task 'digit'. Did you mean 'digits'?"),
        ("--task own.py", "does not say which function: give own.py:FUNCTION"),
        ("--task absent.py:task", "no such file: absent.py"),
        ("--task own.py:tusk", "own.py has no function 'tusk'. Did you mean 'task'?"),
        ("--optimizer sparseadam", "SparseAdam needs sparse gradients"),
        ("--resume", "no run in 'runs/' fits these options"),
        ("--resume --out absent", "'absent' is not the folder of a run"),
    ],
)
def test_wrong_options(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, told: str) -> None:
    before = everything_in(folder)
    task = () if "--task" in arguments else ("--task", "own.py:task")
    assert_refused(run(capsys, "train", *task, *arguments.split()), told)
    assert {k: v for k, v in everything_in(folder).items() if "__pycache__" not in k} == before
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("def task(:", "own.py cannot be loaded: SyntaxError"),
        ("\x89PNG\x00", "own.py cannot be loaded: SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module' (own.py, line 1)"),
        ("def task():\n    return 1 / 0", "ZeroDivisionError: division by zero (own.py, line 2)"),
        ("def task():\n    return {}", "returned a dict; it must return a steprule.lab.Task("),
        ("def task():\n    return open('absent.csv')", "FileNotFoundError"),
        ("task = 3", "'task' in own.py is of type int; it must be a function that returns a task"),
        ("def tusk():\n    pass", "own.py has no function 'task'. Did you mean 'tusk'?"),
    ],
)
def test_a_file_that_holds_no_task(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str, told: str
) -> None:
    (folder / "own.py").write_text(content)
    assert_refused(run(capsys, *TRAIN), told)
    assert not (folder / "runs").exists()


def test_a_file_that_is_no_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photo.png").write_bytes(b"\x89PNG")
    assert_refused(run(capsys, "train", "--task", "photo.png:task"), "is not a Python file")


PARTS = {
    "model": "nn.Linear(2, 2)",
    "train": "(torch.ones(4, 2), torch.zeros(4).long())",
    "validation": "(torch.ones(4, 2), torch.zeros(4).long())",
    "loss": "nn.functional.cross_entropy",
}


@pytest.mark.parametrize(
    ("part", "code", "told"),
    [
        ("model", "nn.Linear(3, 2)", "mat1 and mat2 shapes cannot be multiplied"),
        ("model", "nn.ReLU()", "empty parameter list"),
        ("model", "nn.Linear(2, 2).requires_grad_(False)", "no parameter of the model requires a gradient"),
        ("train", "(torch.ones(4, 2), torch.zeros(3))", "4 inputs but 3 targets"),
        ("train", "[]", "train is empty"),
        ("train", "iter([])", "train is a list_iterator; it must be two arrays (X, y) or a data set"),
        ("train", "[1, 2, 3]", "item 0 of train: it is of type int"),
        ("train", "[(1, 2, 3)]", "item 0 of train: it has 3 parts"),
        ("validation", "[{'a': 1, 'y': 2}]", "item 0 of validation: it has the keys a, y; it needs one of"),
        ("validation", "[({}, 1)]", "item 0 of validation: '{}' of type dict cannot be converted to a tensor"),
        (
            "train",
            "[(torch.ones(2), 0), (torch.ones(3), 0)]",
            "the inputs of train have different shapes, (2,) (item 0) and (3,) (item 1)",
        ),
        (
            "loss",
            "lambda output, target: output",
            "must return a tensor with one number, not one of shape (4, 2)",
        ),
        ("loss", "lambda output, target: 1.0", "must return a tensor with one number, not one float"),
    ],
)
def test_a_task_whose_parts_do_not_fit(
    folder: Path, capsys: pytest.CaptureFixture[str], part: str, code: str, told: str
) -> None:
    arguments = ", ".join(f"{k}={v}" for k, v in {**PARTS, part: code}.items())
    (folder / "own.py").write_text(f"{GOOD}def task():\n    return Task({arguments})\n")
    assert_refused(run(capsys, *TRAIN), told)
    assert not (folder / "runs").exists()


def test_the_parts_of_that_task_do_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ", ".join(f"{k}={v}" for k, v in PARTS.items())
    (folder / "own.py").write_text(f"{GOOD}def task():\n    return Task({arguments})\n")
    assert run(capsys, *TRAIN).code == 0


def test_an_item_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = OWN_TASK.replace(
        "        label =", "        if self.first + i == 7: open('image-7.png')\n        label ="
    )
    (folder / "own.py").write_text(broken)
    told = (
        "item 7 of train cannot be read: FileNotFoundError: [Errno 2] No such file or directory: 'image-7.png'"
    )
    (line,) = (number for number, text in enumerate(broken.splitlines(), 1) if "open(" in text)
    assert_refused(run(capsys, *TRAIN), told, f"(own.py, line {line})")


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("own.py", "cannot make the folder 'own.py': File exists"),
        ("own.py/run", "cannot make the folder 'own.py/run': Not a directory"),
        ("/proc/run", "cannot make the folder '/proc/run'"),
        (".", "'.' is not empty (it holds own.py)"),
    ],
)
def test_a_folder_that_cannot_be_used(
    folder: Path, capsys: pytest.CaptureFixture[str], out: str, told: str
) -> None:
    assert_refused(run(capsys, *TRAIN, "--out", out), told)
    assert (folder / "own.py").read_text() == OWN_TASK


def test_a_folder_that_holds_another_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *TRAIN, "--epochs", "1", "--out", "one").code == 0
    before = everything_in(folder / "one")
    assert_refused(run(capsys, *TRAIN, "--out", "one"), "'one' already holds a run", "--resume")
    assert everything_in(folder / "one") == before


IGNORED = "torch.full((8,), -100)"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_that_a_loss_ignores_are_not_called_divergence(
    folder: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    x, y = "torch.ones(8, 2)", "torch.zeros(8, dtype=torch.int64)"
    parts = ", ".join(f"{name}=({x}, {IGNORED if name == split else y})" for name in ("train", "validation"))
    task = f"Task(model=nn.Linear(2, 2), {parts}, loss=nn.CrossEntropyLoss(), batch_size=4)"
    (folder / "own.py").write_text(f"{GOOD}def task():\n    return {task}\n")
    answer = run(capsys, *TRAIN)
    assert_refused(answer, f"of {split}: every label", "-100", "leave them out")
    assert "--lr" not in answer.err


def test_a_model_that_cannot_be_copied(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = OWN_TASK.replace("return Task", "model.held = __import__('threading').Lock()\n    return Task")
    (folder / "own.py").write_text(task)
    assert_refused(run(capsys, *TRAIN), "the model cannot be copied", "lock", "give its class a __deepcopy__")


@pytest.mark.parametrize(("lr", "grows"), [("100", True), ("0.01", False)])
def test_a_run_whose_loss_has_grown_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], lr: str, grows: bool
) -> None:
    x = "torch.ones(8, 1)"
    task = f"Task(nn.Linear(1, 1), ({x}, {x}), ({x}, {x}), nn.functional.mse_loss, batch_size=4)"
    (folder / "own.py").write_text(f"{GOOD}def task():\n    return {task}\n")
    answer = run(capsys, *TRAIN, "--optimizer", "sgd", "--epochs", "2", "--lr", lr)
    assert answer.code == 0
    assert ("the loss grew from" in answer.out) == grows
    assert ("Try a smaller --lr" in answer.out) == grows


def test_a_loss_that_is_no_longer_a_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.py").write_text(
        f"{GOOD}def task():\n"
        "    x = torch.ones(8, 1)\n"
        "    return Task(nn.Linear(1, 1), (x, x), (x, x), nn.functional.mse_loss, batch_size=1)\n"
    )
    answer = run(capsys, *TRAIN, "--optimizer", "sgd", "--lr", "1e15", "--out", "one")
    assert_refused(answer, "the loss became", "(lr = 1e+15)", "Try a smaller --lr")
    step = len(metrics_in(folder / "one"))
    assert 0 < step < 8
    kept = torch.load(folder / "one/checkpoint.pt", weights_only=True)
    assert kept["step"] <= step
    assert all(weight.isfinite().all() for weight in kept["model"].values())


def test_parameters_that_are_no_numbers_do_not_replace_a_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.py").write_text(
        f"{GOOD}def loss(output, target):\n"
        "    return (output - target).abs().sqrt().mean()  # its slope at 0 is no number\n"
        "def task():\n"
        "    model = nn.Linear(1, 1, bias=False)\n"
        "    nn.init.ones_(model.weight)\n"
        "    x = torch.ones(1, 1)\n"
        "    return Task(model, (x, x), (2 * x, x), loss, epochs=1)\n"
    )
    answer = run(capsys, *TRAIN, "--optimizer", "sgd", "--out", "one")
    assert answer.code == 2
    assert torch.load(folder / "one/checkpoint.pt", weights_only=True)["step"] == 0


def test_sophia_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(run(capsys, "train", "--task", "photo", "--optimizer", "sophia"), "class labels")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("list", "zzz"), "no rule, preset or modifier matches 'zzz'"),
        (("train", "--optimizer", "adamw+emma"), "there is no modifier 'emma'. Did you mean 'ema'?"),
        (("train", "--optimizer", "adamw+"), "a + has nothing after it."),
        (("train", "--optimizer", "ema"), "no optimizer 'ema'."),
        (("train", "--optimizer", "torch:AdamW+ema"), "torch.optim.AdamW takes no modifiers."),
        (("train", "--optimizer", "lbfgs+ema"), "LBFGS takes no modifiers."),
        (
            ("train", "--optimizer", "adamw", "--set", "ema.decay=0.9"),
            "'ema.decay' belongs to the modifier ema, which 'adamw' does not have. Write 'adamw+ema'",
        ),
        (("train", "--optimizer", "adamw+ema", "--set", "ema.decay=2"), "EMA: decay = 2, must be"),
        (("train", "--optimizer", "adamw+ema", "--set", "ema.decy=0.9"), "Did you mean 'decay'?"),
        (("train", "--optimizer", "adamw", "--set", "modifiers=ema"), "as in --optimizer adamw+ema."),
        (("show", "rangr"), "Did you mean 'ranger'?"),
        (("show", "adm"), "no optimizer 'adm'. Did you mean 'Adam'?"),
        (("show",), "Missing argument 'rule'"),
        (("tran",), "No such command 'tran'"),
    ],
)
def test_wrong_commands(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str) -> None:
    assert_refused(run(capsys, *arguments), told)


WITHOUT_EXTRA = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        missing = name.partition(".")[0] in ("typer", "rich", "sklearn", "numpy")
        return None if missing else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from steprule.lab.cli import main
main(["list"])
"""


def test_without_the_extra_one_line_says_what_to_install() -> None:
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_EXTRA],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2, answer
    assert answer.stderr == (
        'steprule: the command line needs typer, rich, sklearn: pip install ".[lab]" in the folder of '
        "steprule\n"
    )
