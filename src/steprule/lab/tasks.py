"""What is trained: a model, its data and its loss; built in, or from a user's own function."""

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
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from steprule.lab.errors import LabError, did_you_mean, failing, told
from steprule.rule_errors import a_kind

if TYPE_CHECKING:  # numpy comes only with the extra, and the message about a missing extra must come first
    from steprule.lab.data import Data

__all__ = [
    "BUILT_IN",
    "Score",
    "Task",
    "accuracy",
    "import_file",
    "is_data",
    "load_task",
    "loss_text",
    "made_by",
    "score_text",
    "shown",
    "task_options",
]

BUILT_IN = ("digits", "mnist", "text", "code", "photo")
COLUMNS = ("split", "step", "epoch", "loss", "lr", "seconds")


@dataclass(frozen=True)
class Score:
    """How good a model is, in a unit that is easier to read than the loss.

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
    """A model, the data for training and evaluation, and the loss to minimize.

    `train`, `validation` and `test` are each two arrays (X, y) or a map-style data set whose items are (input,
    target) or dicts with `image`, `img`, `pixel_values` or `x`, and `label`, `labels` or `y`. Images may be PIL
    images, arrays or tensors; bytes become floats from 0 to 1, and channels come first. `validation` is
    measured after every epoch, `test` once at the end. `loss(output, target)` returns the batch's mean as a
    scalar. `epochs` and `batch_size` apply unless the command line gives others. `threads` is how many CPU
    cores torch may use: one is fastest for small models. `finish(model, folder)` may write results of the
    trained model to the run's folder. `facts` are written into the run's configuration, to recognize the data.
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
    """The result in a line of the metrics: the loss, and the score if the task has one."""
    loss = f"loss {loss_text(line['loss'])}"
    if score is None:
        return loss
    return f"{loss}, {score.name} {score_text(line[score.name])} {score.unit}".rstrip()


def loss_text(value: float) -> str:
    """Three significant digits: 0.0421, 1.50, 123."""
    return f"{value:#.3g}".rstrip(".")


def score_text(value: float | None) -> str:
    """Two decimal places, or three significant digits if that is more; a dash for an undefined score."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) >= 10 else loss_text(value)


def task_options(name: str) -> list[str]:
    """The options of `steprule train` that mean a task."""
    if is_data(name):
        return _source(name).options
    return ["--task", name]


def is_data(name: str) -> bool:
    """Whether a task's name means a user's own file or folder."""
    return name.startswith("file:")


def _source(name: str) -> Any:
    return importlib.import_module("steprule.lab.own_data.source").Source.named(name)


def load_task(name: str) -> Task:
    """The task called `name`, or the one that FILE.py:function returns.

    Raises `LabError` if there is no such task or file, or if the function does not return a task.
    """
    if name in BUILT_IN:
        return importlib.import_module(f"steprule.lab.{name}").task()
    if is_data(name):
        return importlib.import_module("steprule.lab.own_data.task").task(_source(name))
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
            f"{file.name}:{function}() returned {a_kind(task)}; it must return a "
            "steprule.lab.Task(model=…, train=…, validation=…, loss=…)."
        )
    _check(task)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    facts = {str(name): str(fact) for name, fact in task.facts.items()}
    return replace(
        task,
        epochs=int(task.epochs),
        batch_size=int(task.batch_size),
        threads=None if task.threads is None else int(task.threads),
        facts={**facts, f"{file.name} sha256": digest},
    )


def _check(task: Any) -> None:
    """Raise `LabError` if a part of a user's task has the wrong type."""
    allowed: dict[str, tuple[bool, str]] = {
        "model": (isinstance(task.model, nn.Module), "a torch.nn.Module"),
        "loss": (callable(task.loss), "a function of (output, target)"),
        "score": (task.score is None or isinstance(task.score, Score), "a steprule.lab.Score or None"),
        "epochs": (_is_count(task.epochs), "a whole number of at least 1"),
        "batch_size": (_is_count(task.batch_size), "a whole number of at least 1"),
        "threads": (task.threads is None or _is_count(task.threads), "a whole number of at least 1 or None"),
        "finish": (task.finish is None or callable(task.finish), "a function of (model, folder) or None"),
        "loss_label": (isinstance(task.loss_label, str), "a string"),
        "facts": (isinstance(task.facts, Mapping), "a dict of names and strings"),
    }
    for name, (right, what) in allowed.items():
        if not right:
            value: Any = getattr(task, name)
            given = value if isinstance(value, (int, float, str)) else f"of type {type(value).__name__}"
            raise LabError(f"Task: {name} is {given}, must be {what}.")
    if task.score is not None and not (isinstance(task.score.name, str) and callable(task.score.of_batch)):
        raise LabError("Score: name must be a string, and of_batch a function of (output, target).")
    if task.score is not None and task.score.name in ("", *COLUMNS):
        raise LabError(
            f"Score: name is '{task.score.name}'; the metrics have columns {', '.join(COLUMNS)} of their own. "
            "Give another name."
        )


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and value is not True and int(value) >= 1


def made_by(file: Path, function: str, what: str) -> Any:
    """What a function of a user's file returns.

    what: what it should be, for the messages.

    Raises `LabError` if there is no such file or function, or it fails.
    """
    module = import_file(file, what, "steprule_own_task")
    make = getattr(module, function, None)
    if make is not None and not callable(make):
        raise LabError(
            f"'{function}' in {file.name} is of type {type(make).__name__}; it must be a function that "
            f"returns {what}."
        )
    if make is None:
        functions = [name for name in dir(module) if inspect.isfunction(getattr(module, name))]
        raise LabError(f"{file.name} has no function '{function}'. {did_you_mean(function, functions)}")
    with failing(f"{file.name}:{function}()"):
        return make()


def import_file(file: Path, what: str, name: str) -> Any:
    """Import a user's file under this module name; it can import the files next to it.

    what: what should be in it, for the messages.

    Raises `LabError` if there is no such file or it fails.
    """
    if not file.is_file():
        raise LabError(f"no such file: {file}")
    if file.suffix != ".py":
        raise LabError(f"'{file}' is not a Python file (.py) with {what} in it.")
    try:
        return _run_file(file.resolve(), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's file may fail in any way
        raise LabError(f"{file.name} cannot be loaded: {told(error)}.") from error


def _run_file(file: Path, name: str) -> Any:
    spec = cast(ModuleSpec, importlib.util.spec_from_file_location(name, file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    # A user's folder stays as it is, and a disk that is full leaves no half of a compiled file behind.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        cast(Loader, spec.loader).exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module
