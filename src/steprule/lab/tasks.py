"""What is trained: a model, its data, its loss; built in, or from a function of the user's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from steprule.lab.data import Data
from steprule.lab.errors import LabError, did_you_mean, told

__all__ = ["BUILT_IN", "Score", "Task", "accuracy", "load_task", "made_by", "shown"]

BUILT_IN = ("digits", "text", "photo")


@dataclass(frozen=True)
class Score:
    """How good a model is, in a unit that people read, beside the loss.

    `of_batch(output, target)` gives a batch's mean as a scalar tensor; `of_mean` turns the mean over
    all batches into the number to show.
    """

    name: str
    unit: str
    of_batch: Callable[[Tensor, Tensor], Tensor]
    of_mean: Callable[[float], float] = float

    @property
    def label(self) -> str:
        """Name and unit, as on an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def _percent_right(output: Tensor, target: Tensor) -> Tensor:
    return 100 * (output.argmax(-1) == target).float().mean()


accuracy = Score("accuracy", "%", _percent_right)
"""How often the last dimension's largest output is the target's class, in percent."""


@dataclass(frozen=True)
class Task:
    """A model, the data it learns from and is judged by, and the loss to make small.

    `train`, `validation` and `test` are each two arrays (X, y) or a map-style data set whose items
    are (input, target) or dicts such as `{"image": …, "label": …}`. `validation` is measured after
    every epoch, `test` once at the end. `loss(output, target)` returns the batch's mean as a scalar.
    `epochs` and `batch_size` hold unless the command line gives others. `threads` is how many of the
    processor's cores torch may use: one is fastest for small models. `finish(model, folder)` may
    leave something of the trained model in the run's folder. `facts` are written into the run's
    configuration, to recognise the data by.
    """

    model: nn.Module
    train: Data
    validation: Data
    loss: Callable[[Tensor, Tensor], Tensor]
    test: Data | None = None
    score: Score | None = None
    epochs: int = 10
    batch_size: int = 32
    threads: int | None = None
    loss_label: str = "loss"
    finish: Callable[[nn.Module, Path], None] | None = None
    facts: Mapping[str, str] = field(default_factory=dict[str, str])


def shown(line: Mapping[str, Any], score: Score | None) -> str:
    """The result in a line of the metrics: the score if the task has one, else the loss."""
    if score is None:
        return f"loss {line['loss']:.4f}"
    return f"{score.name} {line[score.name]:.2f} {score.unit}".rstrip()


def load_task(name: str) -> Task:
    """The task called `name`, or the one that FILE.py:function returns.

    Raises `LabError` if there is no such task, or the file or what it returns is not one.
    """
    if name in BUILT_IN:
        return importlib.import_module(f"steprule.lab.{name}").task()
    file, colon, function = name.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            raise LabError(f"--task {name} does not say which function: give {name}:FUNCTION.")
        raise LabError(
            f"no task '{name}'. {did_you_mean(name, BUILT_IN)} A task of your own is given as FILE.py:FUNCTION."
        )
    return _load_own(Path(file), function)


def _load_own(file: Path, function: str) -> Task:
    task = made_by(file, function, "a task")
    if not isinstance(task, Task):
        raise LabError(
            f"{file.name}:{function}() returned a {type(task).__name__}; it must return a "
            "steprule.lab.Task(model=…, train=…, validation=…, loss=…)."
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return replace(task, facts={**task.facts, f"{file.name} sha256": digest})


def made_by(file: Path, function: str, what: str) -> Any:
    """What a function of a user's file returns.

    what: what it should be, for the messages.

    Raises `LabError` if there is no such file or function, or it fails.
    """
    if not file.is_file():
        raise LabError(f"no file '{file}' with {what} in it.")
    if file.suffix != ".py":
        raise LabError(f"'{file}' is not a Python file (.py) with {what} in it.")
    try:
        module = _import_file(file.resolve())
    except Exception as error:  # a user's file may fail in any way
        raise LabError(f"{file.name} cannot be loaded: {told(error)}.") from error
    make = getattr(module, function, None)
    if not callable(make):
        functions = [name for name in dir(module) if inspect.isfunction(getattr(module, name))]
        raise LabError(f"{file.name} has no function '{function}'. {did_you_mean(function, functions)}")
    try:
        return make()
    except Exception as error:  # as above
        raise LabError(f"{file.name}:{function}() failed: {told(error)}.") from error


def _import_file(file: Path) -> Any:
    """Import a file by its path, with the files beside it importable, as `python FILE.py` would."""
    name = "steprule_own_task"
    spec = cast(ModuleSpec, importlib.util.spec_from_file_location(name, file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    cast(Loader, spec.loader).exec_module(module)
    return module
