"""The training loop: one path for every task, every optimizer, the first start and every resume."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch

from steprule.lab.data import Batch, Batches, as_batches
from steprule.lab.errors import LabError, told
from steprule.lab.optimizers import (
    build_optimizer,
    build_schedule,
    find_rule,
    hyperparameters_of,
)
from steprule.lab.randomness import order_of_epoch, random_state, set_random_state
from steprule.lab.run_folder import RunConfig, RunFolder
from steprule.lab.step import CURVATURE_EVERY, estimate_curvature, loss_of, step_on
from steprule.lab.tasks import Task, shown

__all__ = ["Screen", "Training", "rehearse"]

CHECKPOINT_SECONDS = 2.0
CHECKPOINT_SHARE = 20


class Screen(Protocol):
    """What shows a training while it runs."""

    def step(self, step: int, epoch: int, loss: float) -> None:
        """One step was made."""
        ...

    def validated(self, result: str) -> None:
        """The validation data were measured, with this score or loss."""
        ...


class Training:
    """A task, its optimizer and schedule, and how far they have come."""

    def __init__(self, task: Task, config: RunConfig) -> None:
        self.task = task
        self.model = task.model
        self.train = as_batches("train", task.train)
        self.validation = as_batches("validation", task.validation)
        self.test = None if task.test is None else as_batches("test", task.test)
        self.steps_per_epoch = math.ceil(len(self.train) / config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        rule = find_rule(config.optimizer)
        self.optimizer = build_optimizer(rule, self.model, config.hyperparameters)
        self.config = replace(config, hyperparameters=hyperparameters_of(self.optimizer))
        self.schedule = build_schedule(config.schedule, self.optimizer, self.steps)
        self.step = 0
        self.seconds = 0.0

    def splits(self) -> dict[str, Batches]:
        """The parts of the data by name."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: data for name, data in parts.items() if data is not None}

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as `torch.load(weights_only=True)` accepts it."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "random": random_state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`. Raises `LabError` if it belongs to another model or optimizer."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            set_random_state(state["random"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise LabError(f"the checkpoint does not fit this task: {error}") from error

    def run(self, folder: RunFolder, screen: Screen) -> None:
        """Train to the last step, writing metrics and checkpoints into the folder."""
        started, before = time.perf_counter(), self.seconds
        saved_at, pause = started, CHECKPOINT_SECONDS
        while self.step < self.steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            order = order_of_epoch(len(self.train), self.config.seed, epoch)
            for index in torch.split(order, self.config.batch_size)[first:]:
                folder.add_metrics(self._train_on(self.train.fetch(index), epoch, screen))
                if self.step % self.steps_per_epoch == 0:
                    line = self.measure("validation", self.validation)
                    self._check_finite("the validation loss", line["loss"])
                    folder.add_metrics(line)
                    screen.validated(shown(line, self.task.score))
                now = time.perf_counter()
                self.seconds = before + now - started
                if now - saved_at > pause or self.step == self.steps:
                    self.save(folder)
                    saved_at = time.perf_counter()
                    pause = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (saved_at - now))

    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint, unless the parameters are no longer numbers: then keep the last one."""
        for name, parameter in self.model.named_parameters():
            finite = bool(parameter.isfinite().all())
            self._check_finite(f"parameter {name}", 0.0 if finite else math.nan)
        folder.save_checkpoint(self.state())

    def measure(self, split: str, data: Batches) -> dict[str, Any]:
        """Loss and score over all of the data, without dropout, as a line of the metrics."""
        loss = score = 0.0
        self.model.eval()
        self.optimizer.eval()
        with torch.no_grad():
            for index in torch.split(torch.arange(len(data)), self.config.batch_size):
                given, target = data.fetch(index)
                output = self.model(given)
                loss += float(loss_of(self.task, output, target)) * len(index)
                if self.task.score is not None:
                    score += float(self.task.score.of_batch(output, target)) * len(index)
        self.model.train()
        self.optimizer.train()
        return self._line(split, loss / len(data), score / len(data))

    def _train_on(self, batch: Batch, epoch: int, screen: Screen) -> dict[str, Any]:
        lr = float(self.optimizer.param_groups[0]["lr"])
        if self.step % CURVATURE_EVERY == 0:
            estimate_curvature(self.task, self.model, self.optimizer, batch)
        loss, score = step_on(self.task, self.model, self.optimizer, batch)
        self._check_finite("the loss", loss)
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1
        screen.step(self.step, epoch + 1, loss)
        return {**self._line("train", loss, score), "lr": lr}

    def _line(self, split: str, loss: float, score: float) -> dict[str, Any]:
        epoch = math.ceil(self.step / self.steps_per_epoch)
        line = {"split": split, "step": self.step, "epoch": epoch, "loss": loss}
        if self.task.score is not None:
            line[self.task.score.name] = self.task.score.of_mean(score)
        return line

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        lr = float(self.optimizer.param_groups[0]["lr"])
        raise LabError(
            f"{what} became {value} at step {self.step} of {self.steps} (lr = {lr:g}); training stopped "
            "and the last checkpoint is kept. Try a smaller --lr."
        )


def rehearse(task: Task, config: RunConfig) -> Training:
    """Build the training, after one step with a copy of the model has shown that all of it fits.

    Raises `LabError` with what does not: the task, the optimizer or a hyper-parameter.
    """
    training = Training(task, config)
    kept = random_state()
    try:
        copied = replace(task, model=copy.deepcopy(task.model))
        trial = Training(copied, config)
        for name, data in trial.splits().items():
            trial.measure(name, Batches(1, data.fetch))
    except LabError:
        raise
    except Exception as error:  # the task may be a user's own and fail in any way
        raise LabError(f"the task failed when it was tried: {told(error)}.") from error
    batch = trial.train.fetch(torch.arange(min(config.batch_size, len(trial.train))))
    try:
        estimate_curvature(copied, trial.model, trial.optimizer, batch)
        step_on(copied, trial.model, trial.optimizer, batch)
    except (RuntimeError, ValueError, TypeError) as error:
        raise LabError(f"{config.optimizer} cannot train this task: {error}") from error
    set_random_state(kept)
    return training
