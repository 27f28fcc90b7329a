"""One training of a race: the same steps as `steprule train`, with the validation loss measured on the way."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from steprule.engine.checkpoint.file import load_checkpoint, save_checkpoint
from steprule.lab.errors import Diverged, LabError
from steprule.lab.racing.folder import CurvePoint
from steprule.lab.randomness import random_state, seed_everything, set_random_state
from steprule.lab.rehearsal import rehearse
from steprule.lab.run_folder import RunConfig
from steprule.lab.tasks import Task, load_task
from steprule.lab.train import Training

__all__ = ["Job", "Measured", "Outcome", "carry_out", "measure", "read_paused"]

MEASURED_STEPS, WARM_STEPS = 20, 5


@dataclass(frozen=True)
class Job:
    """A training, or the part of one up to a pause.

    steps: of the whole training, over which its schedule is laid. until: where it ends or pauses. evaluated_at:
    after which steps the validation loss is measured. paused: the file to go on from if it exists, and to pause
    into.
    """

    optimizer: str
    number: int
    config: RunConfig
    steps: int
    until: int
    evaluated_at: Sequence[int]
    paused: Path


@dataclass(frozen=True)
class Outcome:
    """What a job has measured from the training's first step on.

    steps: how many were taken. seconds: those of the steps; whole_seconds: with the evaluations.
    """

    points: Sequence[CurvePoint]
    steps: int
    diverged: bool
    seconds: float
    whole_seconds: float
    state_bytes_per_element: float

    def loss_at(self, step: int) -> float | None:
        """The loss measured after this step."""
        return next((point.loss for point in self.points if point.step == step), None)


def carry_out(job: Job) -> Outcome:
    """Train up to the job's end. A loss or parameter that becomes NaN or infinite ends it, too."""
    with _one_thread():
        training = _fresh(job.config, job.steps)
        points: list[CurvePoint] = []
        whole = 0.0
        if job.paused.exists():
            before, state = _read(job.paused)
            training.load(state)
            points, whole = [*before.points], before.whole_seconds
        began = started = time.perf_counter()
        seconds, diverged = training.seconds, False
        try:
            for until in [step for step in job.evaluated_at if training.step < step <= job.until]:
                started = time.perf_counter()
                for _ in training.lines(until):
                    pass
                seconds += time.perf_counter() - started
                points.append(_evaluated(training, seconds))
        except Diverged:
            diverged = True
            seconds += time.perf_counter() - started
            points.append(CurvePoint(training.step, seconds, None, None))
        training.seconds = seconds
        whole += time.perf_counter() - began
        done = Outcome(points, training.step, diverged, seconds, whole, _state_bytes(training))
        if not diverged and training.step < job.steps:
            _pause(job.paused, done, training)
        return done


def _evaluated(training: Training, seconds: float) -> CurvePoint:
    """The validation loss and score. Raises `Diverged` if a parameter or the loss is NaN or infinite."""
    for name, parameter in training.model.named_parameters():
        if not parameter.isfinite().all():
            raise Diverged(f"parameter {name} is NaN or infinite.")
    # Data that draw random numbers give the training the same ones, however often it is evaluated.
    kept = random_state()
    line = training.measure("validation", training.validation)
    set_random_state(kept)
    score = None if training.task.score is None else line[training.task.score.name]
    return CurvePoint(training.step, seconds, line["loss"], score)


def _state_bytes(training: Training) -> float:
    """Bytes of optimizer state for each element of the parameters that it steps."""
    groups = training.optimizer.param_groups
    elements = sum(parameter.numel() for group in groups for parameter in group["params"])
    tensors: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[value.data_ptr() or id(value)] = value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            for one in cast("Mapping[Any, Any]", value).values():
                count(one)
        elif isinstance(value, (list, tuple)):
            for one in cast("Sequence[Any]", value):
                count(one)

    count(training.optimizer.state_dict()["state"])
    return sum(tensors.values()) / max(1, elements)


def _pause(file: Path, done: Outcome, training: Training) -> None:
    try:
        save_checkpoint(file, {"outcome": asdict(done), "training": training.state()})
    except (OSError, TypeError) as error:
        raise LabError(str(error)) from error


def _read(file: Path) -> tuple[Outcome, dict[str, Any]]:
    try:
        held = load_checkpoint(file)
        outcome: dict[str, Any] = held["outcome"]
        points = [CurvePoint(**point) for point in outcome.pop("points")]
        return Outcome(points=points, **outcome), held["training"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabError(f"{file} cannot be read: {error}. Delete it, and resume the race.") from error


def read_paused(file: Path) -> Outcome | None:
    """What a paused training has measured; None if there is none."""
    return _read(file)[0] if file.exists() else None


def _fresh(config: RunConfig, steps: int) -> Training:
    """The training as `steprule train` begins it."""
    task, state = _loaded(config.task, config.seed)
    set_random_state(state)
    loss = copy.deepcopy(task.loss) if isinstance(task.loss, nn.Module) else task.loss
    return Training(replace(task, model=copy.deepcopy(task.model), loss=loss), config, steps)


@functools.lru_cache(maxsize=1)
def _loaded(name: str, seed: int) -> tuple[Task, dict[str, Any]]:
    """The task as its function makes it after this seed, and the random state then: many trials begin there."""
    seed_everything(seed)
    return load_task(name), random_state()


@contextmanager
def _one_thread() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Before the race


@dataclass(frozen=True)
class Measured:
    """What a few steps of an optimizer take.

    gradients_per_step: how often a step computes the loss. training: as it was built, to ask for its task and
    sizes.
    """

    seconds_per_step: float
    seconds_per_evaluation: float
    gradients_per_step: float
    training: Training


def measure(config: RunConfig) -> Measured:
    """Rehearse, then time 20 steps and one evaluation. Raises `LabError` for what does not fit."""
    with _one_thread():
        seed_everything(config.seed)
        training = rehearse(load_task(config.task), config)
        calls = 0
        loss = training.task.loss

        def counting(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return loss(output, target)

        training.task = replace(training.task, loss=counting)
        times = [time.perf_counter()]
        steps = min(MEASURED_STEPS, training.steps)
        # At the default lr, the first steps of some rules diverge; how long they take can be seen all the same.
        with suppress(Diverged):
            for _ in training.lines(steps):
                times.append(time.perf_counter())
        gradients = round(calls / max(1, len(times) - 1), 2)
        each = [after - before for before, after in itertools.pairwise(times)]
        began = time.perf_counter()
        with suppress(Diverged):
            training.measure("validation", training.validation)
        evaluation = time.perf_counter() - began
        training.task = replace(training.task, loss=loss)
        return Measured(statistics.median(each[WARM_STEPS:] or each or [1e-3]), evaluation, gradients, training)
