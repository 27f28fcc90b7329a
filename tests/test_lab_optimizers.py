"""`steprule train` with rules of the user's own, with torch's classes, on a device, with clipped gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import OWN_TASK, assert_refused, everything_in, metrics_in, run

import steprule
from steprule.lab import devices
from steprule.lab.devices import find_device

OWN_RULE = """
import torch
from steprule import Elementwise, hyper, slot, AdamW, Cautious
from torch.optim import SGD

class Slow(Elementwise):
    \"\"\"Momentum that never ends.\"\"\"
    lr: float = hyper(default=0.01, at_least=0)
    pull: float = hyper(default=0.5, at_least=0, below=1)
    m = slot("momentum_buffer")
    @staticmethod
    def update(h, p, g, s, t):
        s.m = h.pull * s.m + g
        return -h.lr * s.m

class Plain(torch.optim.Optimizer):
    def __init__(self, params, lr=0.01, power=(1, 2.0)):
        super().__init__(params, dict(lr=lr, power=power))
    def step(self, closure=None):
        closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    count = self.state[p].setdefault("count", torch.zeros(()))
                    count += 1
                    p -= group["lr"] / count * p.grad

class Deaf(Plain):
    def step(self, closure=None): pass

class Fails(Plain):
    def step(self, closure=None): raise KeyError("nothing there")

class Adam(Plain): pass
class Thing: pass
class Needs(torch.optim.Optimizer):
    def __init__(self, params, lr=1.0): raise ZeroDivisionError("why not")
class Keeps(Plain):
    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["made"] = Thing()
def function(): pass
"""
TRAIN = ("train", "--task", "own.py:task", "--epochs", "2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
    (tmp_path / "own.py").write_text(OWN_TASK)
    (tmp_path / "rules.py").write_text(OWN_RULE)
    return tmp_path


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("given", "name", "shown", "runs"),
    [
        ("rules.py:Slow", "{folder}/rules.py:Slow", "Slow, lr 0.01", "own-task-slow-1"),
        ("rules.py:Plain", "{folder}/rules.py:Plain", "Plain, lr 0.01", "own-task-plain-1"),
        ("torch:adamw", "torch:AdamW", "torch.optim.AdamW, lr 0.001", "own-task-torch-adamw-1"),
        (
            "adamw + EMA+cautious",
            "AdamW+ema+cautious",
            "AdamW+ema+cautious, lr 0.001",
            "own-task-adamw+ema+cautious-1",
        ),
        (
            "Ranger+ema",
            "RAdam+lookahead+ema",
            "RAdam+lookahead+ema, lr 0.001, betas (0.95, 0.999), eps 1e-05, decoupled_weight_decay True, "
            "lookahead.every 6",
            "own-task-radam+lookahead+ema-1",
        ),
        ("rules.py:Slow+ema", "{folder}/rules.py:Slow+ema", "Slow+ema, lr 0.01", "own-task-slow+ema-1"),
    ],
)
def test_optimizers_of_every_kind(
    folder: Path, capsys: pytest.CaptureFixture[str], given: str, name: str, shown: str, runs: str
) -> None:
    answer = run(capsys, *TRAIN, "--optimizer", given)
    assert (answer.code, answer.err) == (0, "")
    assert shown in answer.out
    config = config_in(folder / "runs" / runs)
    assert config["optimizer"] == name.format(folder=folder)
    assert ("optimizer rules.py sha256" in config["facts"]) == given.startswith("rules")


def resumed_halfway(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, Any]:
    """The final checkpoints of a run of 3 epochs, and of one that was resumed after the first."""
    train = ("train", "--task", "own.py:task", *arguments)
    assert run(capsys, *train, "--epochs", "3", "--out", "whole").code == 0
    assert run(capsys, *train, "--epochs", "1", "--out", "parts").code == 0
    answer = run(capsys, *train, "--resume", "--epochs", "3", "--out", "parts")
    assert (answer.code, answer.err) == (0, "")
    kept = [torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in ("whole", "parts")]
    return kept[0], kept[1]


@pytest.mark.parametrize(
    "arguments",
    [
        "--optimizer rules.py:Slow --set pull=0.25",
        "--optimizer rules.py:Plain --set power=3,4 --lr 0.1",
        "--optimizer torch:AdamW --set betas=0.8,0.9 --lr 0.01",
        "--optimizer torch:LBFGS --set max_iter=2",
        "--optimizer torch:SGD --set momentum=0.9 --set nesterov=true --clip-norm 0.5",
        "--optimizer adam --clip-norm 0.1",
        "--optimizer ranger --set lookahead.every=2",
        "--optimizer adamw+global_norm_clip+ema --set ema.decay=0.5 --set global_norm_clip.max_norm=0.1",
        "--optimizer rules.py:Slow+lookahead --set lookahead.every=3",
    ],
)
def test_resuming_gives_the_same_bits(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    whole, parts = resumed_halfway(capsys, *arguments.split())
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    assert {**config_in(Path("whole"))} == {**config_in(Path("parts"))}


def test_modifiers_get_their_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--optimizer", "adamw+ema+lookahead", "--set", "ema.decay=0.5", "--set", "lookahead.every=3")
    answer = run(capsys, *TRAIN, *given, "--out", "one")
    assert "AdamW+ema+lookahead, lr 0.001, ema.decay 0.5, lookahead.every 3\n" in answer.out
    saved = torch.load(folder / "one" / "checkpoint.pt", weights_only=True)["optimizer"]
    assert [group["ema.decay"] for group in saved["param_groups"]] == [0.5]
    assert "lookahead.slow" in saved["state"][0]
    assert config_in(folder / "one")["hyperparameters"]["lookahead.every"] == 3


def test_torchs_adamw_learns_as_ours_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torch:AdamW", "adamw"):
        options = ("--set", "foreach=false", "--set", "fused=false")
        assert run(capsys, *TRAIN, "--optimizer", name, *options, "--out", name[:5]).code == 0
    assert [line["loss"] for line in metrics_in(folder / "torch")] == [
        line["loss"] for line in metrics_in(folder / "adamw")
    ]


def test_a_changed_file_is_named_on_resume(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *TRAIN, "--optimizer", "rules.py:Slow", "--out", "one").code == 0
    (folder / "rules.py").write_text(OWN_RULE.replace("-h.lr * s.m", "-2 * h.lr * s.m"))
    answer = run(capsys, "train", "--resume", "--out", "one", "--epochs", "3")
    assert answer.code == 0
    assert "changed since the run began: optimizer rules.py sha256." in answer.err
    (folder / "rules.py").unlink()
    assert_refused(
        run(capsys, "train", "--resume", "--out", "one", "--epochs", "4"), "no such file", "rules.py"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--optimizer absent.py:Slow", "/absent.py"),
        ("--optimizer=", "no optimizer ''. Known: "),
        ("--optimizer rules.py", "does not say which class: give rules.py:CLASS."),
        ("--optimizer rules.py:slow", "rules.py has no class 'slow'. Did you mean 'Slow'?"),
        (
            "--optimizer rules.py:Zzzzzz",
            "rules.py has no class 'Zzzzzz'. Known: Slow, Plain, Deaf, Fails, Adam",
        ),
        (
            "--optimizer rules.py:Thing",
            "rules.py:Thing is a class, not a rule. Write `class Thing(steprule.Elem",
        ),
        (
            "--optimizer rules.py:Cautious",
            "rules.py:Cautious is a modifier, not a rule. The command line takes",
        ),
        ("--optimizer rules.py:function", "rules.py:function is of type function, not a rule."),
        ("--optimizer rules.py:Adam", "rules.py:Adam has the name of a rule of steprule"),
        ("--optimizer rules.py:AdamW", "rules.py:AdamW is steprule's own. Give adamw"),
        (
            "--optimizer rules.py:Elementwise",
            "rules.py:Elementwise is steprule.declare.Elementwise, not a rule",
        ),
        ("--optimizer rules.py:Deaf", "Deaf.step(closure) must call the closure"),
        (
            "--optimizer rules.py:Fails",
            "Fails cannot train this task: KeyError: 'nothing there' (rules.py, line",
        ),
        (
            "--optimizer rules.py:Keeps",
            "Keeps keeps something in its state or groups that a checkpoint cannot hold.",
        ),
        ("--optimizer rules.py:Needs", "Needs cannot be created: ZeroDivisionError: why not (rules.py, line"),
        ("--optimizer rules.py:Slow --set pull=2", "Slow: pull = 2, must be at least 0 and below 1"),
        ("--optimizer rules.py:Slow --set pul=0", "Slow has no hyper-parameter 'pul'. Did you mean 'pull'?"),
        (
            "--optimizer rules.py:Plain --set pwer=1,2",
            "Plain has no hyper-parameter 'pwer'. Did you mean 'power'?",
        ),
        (
            "--optimizer broken.py:Slow",
            "broken.py cannot be loaded: ZeroDivisionError: division by zero (broken.py",
        ),
        ("--optimizer own.txt:Slow", "is not a Python file"),
        ("--optimizer torch:AdamV", "torch.optim has no optimizer 'AdamV'. Did you mean 'Adam"),
        ("--optimizer torch:Optimizer", "torch.optim has no optimizer 'Optimizer'."),
        ("--optimizer torch:", "torch.optim has no optimizer ''."),
        (
            "--optimizer torch:AdamW --set weight_dcay=1",
            "torch.optim.AdamW has no hyper-parameter 'weight_dcay'. Did",
        ),
        ("--optimizer torch:AdamW --set betas=0.9", "torch.optim.AdamW: betas = 0.9, must be 2 numbers, as in"),
        (
            "--optimizer torch:AdamW --set betas=0.9,true",
            "torch.optim.AdamW: betas = (0.9, True), must be 2 numbers",
        ),
        ("--optimizer torch:AdamW --set amsgrad=1", "torch.optim.AdamW: amsgrad = 1, must be True or False."),
        ("--optimizer torch:AdamW --set lr=word", "torch.optim.AdamW: lr = 'word', must be a number."),
        (
            "--optimizer torch:AdamW --lr -1",
            "torch.optim.AdamW cannot be created: ValueError: Invalid learning rate: -1",
        ),
        ("--optimizer torch:AdamW --set params=1", "torch.optim.AdamW gets its params from the task"),
        (
            "--optimizer torch:SparseAdam",
            "SparseAdam cannot train this task: RuntimeError: SparseAdam does not",
        ),
        ("--optimizer yoga2", "A rule of your own is given as FILE.py:CLASS, torch's as torch:CLASS."),
        ("--clip-norm 0", "'--clip-norm': '0' must be a number above 0."),
        ("--clip-norm nan", "'--clip-norm': 'nan' must be a number above 0."),
        ("--clip-norm x", "'--clip-norm': 'x' must be a number above 0."),
        ("--device gpu", "no device 'gpu'. Did you mean 'cuda'?"),
        ("--device meta", "--device meta: torch finds no such device here. Use --device cpu"),
        ("--device mps", "--device mps: torch finds no such device here. Use --device cpu"),
    ],
)
def test_wrong_optimizers(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, told: str) -> None:
    (folder / "broken.py").write_text("1 / 0")
    (folder / "own.txt").write_text("")
    before = everything_in(folder)
    assert_refused(run(capsys, *TRAIN, *arguments.split()), told)
    assert {k: v for k, v in everything_in(folder).items() if "__pycache__" not in k} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], name: str) -> None:
    told = f"--device {name}: torch finds no such device here. Use --device cpu."
    assert_refused(run(capsys, *TRAIN, "--device", name), told)


def test_gradients_are_clipped_to_the_norm_of_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "line.py").write_text(
        "import torch\nfrom steprule.lab import Task\n"
        "def task():\n"
        "    model = torch.nn.Linear(1, 1)\n"
        "    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)\n"
        "    x = torch.full((1, 1), 3.0)\n"
        "    return Task(model, (x, 4 * x), (x, 4 * x), torch.nn.functional.mse_loss, epochs=1)\n"
    )
    for clip, wanted in (("2.0", 2.0), ("1e6", 24 * 10**0.5)):
        options = ("--optimizer", "sgd", "--lr", "1", "--clip-norm", clip, "--out", clip)
        answer = run(capsys, "train", "--task", "line.py:task", *options)
        assert answer.code == 0
        assert f"gradients clipped to norm {float(clip):g}" in answer.out
        model = torch.load(f"{clip}/checkpoint.pt", weights_only=True)["model"]
        moved = (model["weight"].square() + model["bias"].square()).sqrt().item()
        assert moved == pytest.approx(wanted, rel=1e-5)
    assert config_in(folder / "2.0")["clip_norm"] == 2.0
    again = run(capsys, "train", "--resume", "--out", "2.0", "--clip-norm", "3")
    assert_refused(again, "cannot continue with --clip-norm 3.0 (the run has 2.0)")


def test_another_device_on_resume_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, *TRAIN, "--out", "one").code == 0
    assert config_in(folder / "one")["device"] == "cpu"
    monkeypatch.setattr("steprule.lab.runs.device_facts", lambda _: {"device": "cuda NVIDIA H100"})
    answer = run(capsys, "train", "--resume", "--out", "one", "--epochs", "3")
    assert answer.code == 0
    assert "changed since the run began: device." in answer.err


def test_devices_that_are_there_are_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(devices.torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(devices.LabError, match="Use --device cpu or --device cuda:0 or --device cuda:1"):
        find_device("mps" if not torch.backends.mps.is_available() else "xpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_is_trained_on_the_gpu_and_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = resumed_halfway(capsys, "--device", "cuda", "--optimizer", "adamw")
    for name, weight in whole["model"].items():
        torch.testing.assert_close(weight, parts["model"][name], msg=name)


def test_python_dash_m_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "--version")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(f"steprule {steprule.__version__}, torch {torch.__version__}, Python 3.")
    told = subprocess.run(
        [sys.executable, "-m", "steprule", "-h"], capture_output=True, text=True, check=True
    ).stdout
    assert told.startswith("Usage: steprule [OPTIONS] COMMAND")


def test_the_help_names_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    usages = {command: run(capsys, command, "-h").out.splitlines()[0] for command in ("show", "report")}
    assert usages["show"] == "Usage: steprule show [OPTIONS] RULE"
    assert usages["report"] == "Usage: steprule report [OPTIONS] PATHS..."


@pytest.mark.parametrize("command", ["", "train", "list", "show", "bench"])
@pytest.mark.parametrize("width", [60, 80])
def test_help_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    answers = [run(capsys, *command.split(), flag) for flag in ("-h", "--help")]
    assert answers[0] == answers[1]
    assert answers[0].code == 0
    assert max(map(len, answers[0].out.splitlines())) <= width
    assert "..." not in answers[0].out.replace("[ARGS]...", "")
