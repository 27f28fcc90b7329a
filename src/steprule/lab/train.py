"""The training loop: one path for every task, every optimizer, the first start and every resume."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steprule.lab.data import Batch, Batches, Data, as_batches, not_finite
from steprule.lab.devices import device_random_state, find_device, set_device_random_state
from steprule.lab.errors import Diverged, LabError, at, every_label_ignored, failing
from steprule.lab.logger import measured_by
from steprule.lab.modes import Modes, give_shapes
from steprule.lab.optimizers import (
    build_optimizer,
    build_schedule,
    hyperparameters_of,
)
from steprule.lab.randomness import order_of_epoch, random_state, set_random_state
from steprule.lab.run_folder import RunConfig, RunFolder
from steprule.lab.step import curvature_is_due, estimate_curvature, judge, step_on
from steprule.lab.tasks import Task, shown

__all__ = ["Screen", "Training", "named"]

CHECKPOINT_SECONDS = 2.0
CHECKPOINT_SHARE = 20
ITEMS_NAMED = 4


class Screen(Protocol):
    """Shows the progress of a training."""

    def step(self, step: int, epoch: int, loss: float) -> None:
        """One step was taken."""
        ...

    def validated(self, result: str) -> None:
        """An epoch is complete; the validation data were measured, with this loss and score."""
        ...


class Training:
    """A task, its optimizer and schedule, and the progress so far.

    steps: how many there are; those of the configuration's epochs if it is None.
    """

    def __init__(self, task: Task, config: RunConfig, steps: int | None = None) -> None:
        self.task = task
        self.device = find_device(config.device)
        self.model = task.model.to(self.device)
        if isinstance(task.loss, nn.Module):
            task.loss.to(self.device)
        self.train = self._batches("train", task.train)
        self.validation = self._batches("validation", task.validation)
        self.test = None if task.test is None else self._batches("test", task.test)
        give_shapes(self.model, self.train)
        self.modes = Modes(self.model)
        self.steps_per_epoch = math.ceil(len(self.train) / config.batch_size)
        self.steps = steps or config.epochs * self.steps_per_epoch
        self.optimizer = build_optimizer(config.optimizer, self.model, config.hyperparameters)
        self.config = replace(config, hyperparameters=hyperparameters_of(self.optimizer))
        self.schedule = build_schedule(config.schedule, self.optimizer, self.steps)
        self.step = self.saved_step = 0
        self.validated_epochs = 0
        self.seconds = 0.0

    def _batches(self, name: str, data: Data) -> Batches:
        batches = as_batches(name, data)

        def fetch(index: Tensor) -> Batch:
            given, target = batches.fetch(index)
            return given.to(self.device), target.to(self.device)

        return replace(batches, fetch=fetch)

    def splits(self) -> dict[str, Batches]:
        """The parts of the data by name."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: data for name, data in parts.items() if data is not None}

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as `torch.load(weights_only=True)` accepts it."""
        with failing("the model's state_dict()"):
            model = self.model.state_dict()
        return {
            "step": self.step,
            "validated_epochs": self.validated_epochs,
            "seconds": self.seconds,
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "random": random_state(),
            "device_random": device_random_state(self.device),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`. Raises `LabError` if it belongs to another model or optimizer."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
            self.step = self.saved_step = int(state["step"])
            self.seconds = float(state["seconds"])
            self.validated_epochs = int(state.get("validated_epochs", self.step // self.steps_per_epoch))
            set_random_state(state["random"])
            set_device_random_state(self.device, state.get("device_random"))
        except Exception as error:  # a user's own load_state_dict may fail in any way
            raise LabError(f"the checkpoint does not fit this task: {error}") from error

    def run(self, folder: RunFolder, screen: Screen) -> None:
        """Train to the last step, writing metrics and checkpoints into the folder."""
        started = time.perf_counter() - self.seconds
        saved_at, pause = time.perf_counter(), CHECKPOINT_SECONDS
        if self.validated_epochs < self.step // self.steps_per_epoch:  # it failed when the run was stopped
            self._validate(folder, screen)
        for line in self.lines(self.steps):
            self.seconds = time.perf_counter() - started
            # Only here, because the seconds differ each time and all other results do not.
            folder.add_metrics({**line, "seconds": round(self.seconds, 3)})
            screen.step(self.step, line["epoch"], line["loss"])
            if self.step % self.steps_per_epoch == 0:
                self._validate(folder, screen)
            now = time.perf_counter()
            self.seconds = now - started
            if now - saved_at > pause or self.step == self.steps:
                self.save(folder)
                saved_at = time.perf_counter()
                pause = max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (saved_at - now))

    def lines(self, until: int) -> Iterator[dict[str, Any]]:
        """Train to this step; gives the metrics of each step after it."""
        while self.step < until:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            order = order_of_epoch(len(self.train), self.config.seed, epoch)
            for index in torch.split(order, self.config.batch_size)[first:]:
                yield self._train_on(index)
                if self.step == until:
                    return

    def _validate(self, folder: RunFolder, screen: Screen) -> None:
        """Measure the validation data. If that fails, save the epoch that was trained to the checkpoint."""
        random, device_random = random_state(), device_random_state(self.device)
        try:
            line = self.measure("validation", self.validation)
        except Diverged:
            raise
        except LabError:
            set_random_state(random)
            set_device_random_state(self.device, device_random)
            self.save(folder)
            raise
        folder.add_metrics(line)
        self.validated_epochs += 1
        screen.validated(shown(line, self.task.score))

    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint, unless a parameter is NaN or infinite: then the last one is kept."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise self._diverged(f"parameter {name}", math.nan)
        folder.save_checkpoint(self.state())
        self.saved_step = self.step

    def measure(self, split: str, data: Batches) -> dict[str, Any]:
        """Loss and score over all of the data, without dropout, as a line of the metrics."""
        loss = score = 0.0
        with self.modes.evaluating(self.optimizer):
            for index in torch.split(torch.arange(len(data)), self.config.batch_size):
                batch_loss, batch_score = self.judge(split, data, index)
                loss += batch_loss * len(index)
                score += batch_score * len(index)
        return self._line(split, loss / len(data), score / len(data))

    def judge(self, split: str, data: Batches, index: Tensor) -> tuple[float, float]:
        """Loss and score on some items. Raises `LabError` if the loss is NaN or infinite."""
        batch = data.fetch(index)
        with at(lambda: self._place(split, batch, index)):
            loss, score = judge(self.task, self.model, batch)
        self._check_loss(split, loss, batch, index)
        return loss, score

    def _train_on(self, index: Tensor) -> dict[str, Any]:
        batch = self.train.fetch(index)
        lr = float(self.optimizer.param_groups[0]["lr"])
        with at(lambda: f"step {self.step + 1}, {self._place('train', batch, index)}"):
            if curvature_is_due(self.optimizer, self.step):
                estimate_curvature(self.task, self.model, self.optimizer, batch)
            loss, score = step_on(self.task, self.model, self.optimizer, batch, self.config.clip_norm)
        self._check_loss("train", loss, batch, index)
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1
        return {**self._line("train", loss, score), **measured_by(self.optimizer), "lr": lr}

    def _line(self, split: str, loss: float, score: float) -> dict[str, Any]:
        epoch = math.ceil(self.step / self.steps_per_epoch)
        line: dict[str, Any] = {"split": split, "step": self.step, "epoch": epoch, "loss": loss}
        if self.task.score is not None:
            with failing("the score's of_mean"):
                mean = float(self.task.score.of_mean(score))
            # JSON has no NaN.
            line[self.task.score.name] = mean if math.isfinite(mean) else None
        return line

    def _place(self, split: str, batch: Batch, index: Tensor) -> str:
        """Where something failed: the items that fail alone, or the whole batch if none does."""
        failed: list[int] = []
        with self.modes.evaluating(self.optimizer):
            for row in range(len(index)):
                try:
                    judge(self.task, self.model, (batch[0][row : row + 1], batch[1][row : row + 1]))
                except LabError:
                    failed.append(row)
        place = f"{named(index[failed] if 0 < len(failed) < len(index) else index)} of {split}"
        found = not_finite(batch)
        return place if found is None else f"{place} (item {int(index[found[0]])} has {found[1]})"

    def _check_loss(self, split: str, loss: float, batch: Batch, index: Tensor) -> None:
        if math.isfinite(loss):
            return
        found = not_finite(batch)
        if found is None:
            self.check_labels(split, loss, batch, index)
            raise self._diverged("the loss" if split == "train" else f"the {split} loss", loss)
        row, where = found
        raise LabError(
            f"item {int(index[row])} of {split} has {where}, and the loss on it is {loss}. Drop such items, or "
            "replace their missing values."
        )

    def check_labels(self, split: str, loss: float, batch: Batch, index: Tensor) -> None:
        """Refuse a batch that has class labels, all of which a loss ignores."""
        target = batch[1]
        if target.dtype == torch.int64 and target.numel() and target.max() < 0:
            raise every_label_ignored(loss, int(target.max()), named(index), split)

    def _diverged(self, what: str, value: float) -> Diverged:
        lr = float(self.optimizer.param_groups[0]["lr"])
        return Diverged(
            f"{what} became {value} at step {self.step} of {self.steps} (lr = {lr:g}); training stopped "
            "and the last checkpoint is kept. Try a smaller --lr."
        )


def named(items: Tensor) -> str:
    """`item 7`, or the first few of several: `items 3, 17, 4, 0 and 28 more`."""
    first = ", ".join(str(int(item)) for item in items[:ITEMS_NAMED])
    more = f" and {len(items) - ITEMS_NAMED} more" if len(items) > ITEMS_NAMED else ""
    return f"item{'s' if len(items) > 1 else ''} {first}{more}"
