"""What is tried before a run begins, so that it does not fail an hour later."""

from __future__ import annotations

import copy
import math
import time
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from steprule.lab.data import Batches, not_finite
from steprule.lab.errors import Diverged, LabError, at, cannot_be_copied
from steprule.lab.optimizer_classes import OWN_MODULE
from steprule.lab.optimizers import check_can_be_saved
from steprule.lab.randomness import random_state, set_random_state
from steprule.lab.run_folder import RunConfig
from steprule.lab.step import estimate_curvature, gradients_on, step_on
from steprule.lab.tasks import Task
from steprule.lab.train import Training, named

__all__ = ["rehearse"]

LOOK_SECONDS = 1.0


def rehearse(task: Task, config: RunConfig) -> Training:
    """Build the training, after trying evaluations and one step on a copy of the model.

    Raises `LabError` for what does not fit: the task, its data, the optimizer or a hyper-parameter.
    """
    training = Training(task, config)
    for name, parameter in training.model.named_parameters():
        if not parameter.isfinite().all():
            raise LabError(f"parameter {name} of the model is NaN or infinite before the first step.")
    if not any(parameter.requires_grad for parameter in training.model.parameters()):
        raise LabError("no parameter of the model requires a gradient, so there is nothing to train.")
    kept = random_state()
    try:
        copied = copy.deepcopy(task.model)
    except Exception as error:  # a user's own class may fail in any way
        raise cannot_be_copied(error) from error
    trial = Training(replace(task, model=copied), config)
    for split, data in trial.splits().items():
        with trial.modes.evaluating(trial.optimizer):
            for index in _worth_trying(data, config.batch_size):
                # On data without NaN, the loss of an untrained model in eval mode need not be finite.
                with suppress(Diverged):
                    trial.judge(split, data, index)
    _try_to_train(trial)
    set_random_state(kept)
    return training


def _worth_trying(data: Batches, batch_size: int) -> list[Tensor]:
    """The first batch, the last one if it is smaller, and before them the items that look out of place."""
    items = list(dict.fromkeys([*_suspects(data, batch_size), *range(min(batch_size, len(data)))]))
    # Only full batches, since a model or a loss may rely on their size.
    batches = list(torch.split(torch.tensor(items), batch_size))
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    rest = len(data) % batch_size
    return [*batches, torch.arange(len(data))[-rest:]] if rest else batches


def _suspects(data: Batches, batch_size: int) -> list[int]:
    """The first item with NaN in its input, in its target, and those with the smallest and largest class.

    Data that are slow to read are searched for about a second.
    """
    wrong: dict[str, int] = {}
    classes: list[tuple[int, int]] = []
    until = time.monotonic() + LOOK_SECONDS
    for index in torch.split(torch.arange(len(data)), batch_size):
        batch = data.fetch(index)
        found = not_finite(batch)
        if found is not None:
            wrong.setdefault(found[1], int(index[found[0]]))
        target = batch[1]
        if target.dtype == torch.int64 and target.numel():
            rows = target.reshape(len(target), -1)
            for values in (rows.amin(1), rows.amax(1)):
                for row in (int(values.argmin()), int(values.argmax())):
                    classes.append((int(values[row]), int(index[row])))
        if time.monotonic() > until:
            break
    extremes = (min(classes), max(classes)) if classes else ()
    return [*wrong.values(), *(item for _, item in extremes)]


def _try_to_train(trial: Training) -> None:
    """Gradients on the smaller last batch of an epoch, then one step on a whole batch."""
    task, model, optimizer, size = trial.task, trial.model, trial.optimizer, trial.config.batch_size
    count = len(trial.train)
    first = torch.arange(min(size, count))
    with at(lambda: f"{named(first)} of train"):
        gradients_on(task, model, trial.train.fetch(first))
    rest = count % size
    if rest and count > size:
        last = f"the last batch of an epoch has {rest} of the {count} items of train"
        with at(lambda: f"{last}; try --batch-size {_other_size(count, size)}"):
            gradients_on(task, model, trial.train.fetch(torch.arange(count)[-rest:]))
    batch = trial.train.fetch(first)
    estimate_curvature(task, model, optimizer, batch)
    loss, _ = step_on(task, model, optimizer, batch, trial.config.clip_norm)
    if type(optimizer).__module__ == OWN_MODULE:
        check_can_be_saved(optimizer)
    if not math.isfinite(loss):
        trial.check_labels("train", loss, batch, first)
        raise LabError(
            f"the loss is {loss} before the first step, on a batch without NaN. Check the model and the loss."
        )


def _other_size(count: int, size: int) -> int:
    return next(other for other in range(size + 1, count + 1) if count % other != 1)
