"""One optimizer step on one batch, whatever the rule needs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

import steprule
from steprule.engine.optimizer import CheckedOptimizer
from steprule.lab.data import Batch
from steprule.lab.errors import LabError, failing, told
from steprule.lab.tasks import Task

__all__ = ["curvature_is_due", "estimate_curvature", "gradients_on", "judge", "output_of", "step_on"]

# After how many steps the curvature is estimated again, where that is not at every step as the paper does.
CURVATURE_EVERY = {"Sophia": 10, "SophiaH": 10}


def step_on(
    task: Task, model: nn.Module, optimizer: Optimizer, batch: Batch, clip_norm: float | None = None
) -> tuple[float, float]:
    """Take one step; returns the loss and the score on the batch before it.

    A closure suits every rule: one that needs the loss again calls it again, the others once.
    clip_norm: if the norm over all gradients is larger, they are scaled down to it.
    """
    before: tuple[float, float] | None = None

    @torch.enable_grad()
    def closure() -> Tensor:
        nonlocal before
        optimizer.zero_grad()
        output, loss = gradients_on(task, model, batch)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        if before is None:
            with torch.no_grad():
                before = float(loss.detach()), _score_of(task, output, batch[1])
        return loss

    who = type(optimizer).__name__
    step: Any = optimizer.step
    try:
        step(closure)
    except LabError:
        raise
    except Exception as error:  # a user's own class may fail in any way
        expected = isinstance(optimizer, CheckedOptimizer) and isinstance(
            error, (RuntimeError, ValueError, TypeError)
        )
        raise LabError(f"{who} cannot train this task: {error if expected else told(error) + '.'}") from error
    if before is None:
        raise LabError(f"{who}.step(closure) must call the closure: it computes the loss and the gradients.")
    return before


def gradients_on(task: Task, model: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
    """The output and the loss on a batch; its gradients are added to the parameters' own."""
    given, target = batch
    output = output_of(model, given)
    loss = _loss_of(task, output, target)
    with failing("backward()"):
        torch.autograd.backward(loss)
    return output, loss


def judge(task: Task, model: nn.Module, batch: Batch) -> tuple[float, float]:
    """The loss and the score on a batch, without a step."""
    given, target = batch
    output = output_of(model, given)
    return float(_loss_of(task, output, target)), _score_of(task, output, target)


def output_of(model: nn.Module, given: Tensor) -> Any:
    """The model's output on a batch."""
    try:
        with failing("the model"):
            return model(given)
    except LabError as error:
        whole = given.dtype == torch.int64 and "dtype" in str(error)
        hint = " The inputs are whole numbers (int64); if the model takes floats, convert them."
        raise LabError(f"{error}{hint if whole else ''}") from error


def _loss_of(task: Task, output: Any, target: Tensor) -> Tensor:
    """The task's loss. Raises `LabError` if it is not one number."""
    with failing("the loss"):
        loss: Any = task.loss(output, target)
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return loss
    kind = type(loss).__name__
    if isinstance(loss, Tensor):
        kind = f"of shape {tuple(loss.shape)}" if loss.numel() != 1 else f"of type {loss.dtype}"
    raise LabError(f"loss(output, target) must return a tensor with one number, not one {kind}.")


def _score_of(task: Task, output: Any, target: Tensor) -> float:
    if task.score is None:
        return 0.0
    with failing("the score"):
        return float(task.score.of_batch(output, target))


def curvature_is_due(optimizer: Optimizer, step: int) -> bool:
    """Whether the curvature is estimated again before this step, counted from 0."""
    return step % CURVATURE_EVERY.get(type(optimizer).__name__, 1) == 0


def estimate_curvature(task: Task, model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
    """Give rules that use the curvature an estimate of it; no-op for other rules.

    Raises `LabError` if Sophia gets targets that are not classes, one for each last dimension of the output.
    """
    if isinstance(optimizer, steprule.Sophia):
        _draw_labels(task, model, optimizer, batch)
    elif isinstance(optimizer, steprule.Elementwise) and hasattr(optimizer, "estimate"):
        given, target = batch
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        with failing("the estimate of the curvature"), sdpa_kernel(SDPBackend.MATH):
            loss = _loss_of(task, output_of(model, given), target)
            optimizer.update_hessian(steprule.hutchinson(loss, params))


def _draw_labels(task: Task, model: nn.Module, optimizer: steprule.Sophia, batch: Batch) -> None:
    """Give Sophia the gradient of the loss with labels drawn from the model."""
    given, target = batch
    output = output_of(model, given)
    if target.is_floating_point() or not isinstance(output, Tensor) or output.shape[:-1] != target.shape:
        raise LabError(
            "Sophia draws class labels from the model to estimate the curvature, but this task does "
            "not predict classes. Choose another optimizer."
        )
    optimizer.zero_grad()
    with failing("the estimate of the curvature"):
        chances = output.detach().flatten(0, -2).softmax(-1)
        drawn = torch.multinomial(chances, 1).view_as(target)
        torch.autograd.backward(_loss_of(task, output, drawn))
    optimizer.update_hessian(target.numel())
