"""One optimizer step on one batch, whatever the rule needs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import steprule
from steprule.engine.optimizer import CheckedOptimizer
from steprule.lab.data import Batch
from steprule.lab.errors import LabError, told
from steprule.lab.tasks import Task

__all__ = ["CURVATURE_EVERY", "estimate_curvature", "loss_of", "step_on"]

CURVATURE_EVERY = 10


def step_on(task: Task, model: nn.Module, optimizer: CheckedOptimizer, batch: Batch) -> tuple[float, float]:
    """Make one step; the loss and the score on the batch as they were before it.

    A closure serves every rule: one that needs the loss again calls it again, the others once.
    """
    given, target = batch
    score = 0.0
    first = True

    def closure() -> Tensor:
        nonlocal score, first
        optimizer.zero_grad()
        try:
            output = model(given)
            loss = loss_of(task, output, target)
            torch.autograd.backward(loss)
            if first and task.score is not None:
                with torch.no_grad():
                    score = float(task.score.of_batch(output, target))
        except LabError:
            raise
        except Exception as error:  # the task may be a user's own and fail in any way
            raise LabError(f"the task failed on a batch: {told(error)}.") from error
        first = False
        return loss

    loss: Any = optimizer.step(closure)
    return float(loss.detach()), score


def loss_of(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """The task's loss. Raises `LabError` if it is not one number."""
    loss: Any = task.loss(output, target)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    kind = f"of shape {tuple(loss.shape)}" if hasattr(loss, "shape") else type(loss).__name__
    raise LabError(f"loss(output, target) must return a tensor with one number, not one {kind}.")


def estimate_curvature(task: Task, model: nn.Module, optimizer: CheckedOptimizer, batch: Batch) -> None:
    """Give Sophia the gradient of the loss with labels drawn from the model; no-op for other rules.

    Raises `LabError` if the targets are not classes, one for each last dimension of the output.
    """
    if not isinstance(optimizer, steprule.Sophia):
        return
    given, target = batch
    output = model(given)
    if target.is_floating_point() or output.shape[:-1] != target.shape:
        raise LabError(
            "Sophia draws class labels from the model to estimate the curvature, but this task does "
            "not predict classes. Choose another optimizer."
        )
    optimizer.zero_grad()
    chances = output.detach().flatten(0, -2).softmax(-1)
    drawn = torch.multinomial(chances, 1).view_as(target)
    torch.autograd.backward(loss_of(task, output, drawn))
    optimizer.update_hessian(target.numel())
