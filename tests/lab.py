"""How the tests of the command line run it: in this process for its messages, in another to be killed."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, started

import steprule
from steprule.lab.cli import main

SOURCE = Path(steprule.__file__).parents[1]

# Draws from every global generator, in the data and in the model, and can be told to stop the process.
OWN_TASK = """
import os, random
import numpy, torch
from torch import nn
from steprule.lab import Task, accuracy

class Noisy:
    def __init__(self, first, last):
        self.first, self.last, self.given = first, last, 0
    def __len__(self):
        return self.last - self.first
    def __getitem__(self, i):
        self.given += 1
        if self.first == 0 and self.given == int(os.environ.get("STOP_AT", "0")):
            os.kill(os.getpid(), int(os.environ["STOP_BY"]))
        label = (self.first + i) % 3
        noise = numpy.random.randn() + random.random() + torch.randn(4)
        return label + 0.3 * noise, label

def task():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 3))
    return Task(model=model, train=Noisy(0, 240), validation=Noisy(240, 270), test=Noisy(270, 300),
                loss=nn.functional.cross_entropy, score=accuracy, epochs=3, batch_size=4, threads=1)
"""


@dataclass
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Answer:
    """Run a command in this process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    return Answer(int(ended.value.code or 0), captured.out, captured.err)


def assert_refused(answer: Answer, *parts: str) -> None:
    """One line on stderr, exit code 2, and every part in the line."""
    assert answer.code == 2, answer
    assert answer.err.count("\n") == 1, answer.err
    assert answer.err.startswith("steprule: "), answer.err
    for part in parts:
        assert part in answer.err, answer.err


# Checkpoints come after steps, not after seconds: a busy machine changes nothing.
COMMAND = """
import signal
from steprule.lab import train
from steprule.lab.cli import main

def save(self, folder, real=train.Training.save):
    if self.step % 7 == 0 or self.step == self.steps:
        real(self, folder)

train.CHECKPOINT_SECONDS, train.CHECKPOINT_SHARE = -1.0, 0
train.Training.save = save
# A shell that runs something in the background has it ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def run_apart(
    folder: Path, *arguments: str, stop: signal.Signals | None = None, at: int = 0
) -> tuple[int, str, str]:
    """Run a command in a process of its own: its exit code, what it printed, and its errors.

    stop: the signal that the process gets when it asks for training item number `at` of an `OWN_TASK`.
    """
    environment = {"PYTHONPATH": str(SOURCE)}
    if stop is not None:
        environment |= {"STOP_BY": str(int(stop)), "STOP_AT": str(at)}
    with started("-c", COMMAND, *arguments, cwd=folder, env=environment) as process:
        out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def metrics_in(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results_in(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without the times, which are never the same."""
    return [{key: line[key] for key in line if key != "seconds"} for line in metrics_in(folder)]


def everything_in(folder: Path) -> dict[str, bytes]:
    """All files beneath a folder."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
