"""What happens to a step whose gradients are NaN or infinite, where a group asks for something to happen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steprule import errors
from steprule.engine.fields import SKIPPED_STEPS
from steprule.engine.matching import Place, own_places


def allow_step(optimizer: Any, count: bool = True) -> bool:
    """Whether the gradients may move anything, decided over all groups together.

    Groups with nonfinite="ignore" are not looked at. count: add a skipped step to the groups' counts.
    Raises: RuntimeError that names the parameters, if a group with nonfinite="raise" has such gradients.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    asked = [group for group in groups if group.get("nonfinite", "ignore") != "ignore"]
    if all_finite([p.grad for group in asked for p in group["params"] if p.grad is not None]):
        return True
    strict = [index for index, group in enumerate(groups) if group.get("nonfinite") == "raise"]
    names = [place.shown for place in offenders(groups) if place.group in strict]
    if names:
        raise errors.nonfinite_gradients(type(optimizer).__name__, names)
    for group in groups if count else ():
        if SKIPPED_STEPS in group:
            group[SKIPPED_STEPS] += 1
    return False


def offenders(groups: list[dict[str, Any]]) -> list[Place]:
    """The parameters whose gradients are NaN or infinite."""
    with_gradients = [place for place in own_places(groups) if place.key.grad is not None]
    return [place for place in with_gradients if not all_finite([place.key.grad])]


@torch.no_grad()
def all_finite(gradients: list[Any]) -> bool:
    """Whether all numbers are finite: each gradient is read once, and the host waits once per device."""
    extremes: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        numbers = _numbers(gradient)
        if not numbers.numel():
            continue
        if type(numbers) is not Tensor:
            # Sharded: every process has to come to the same decision.
            finite: Any = numbers.isfinite().all()
            if not bool(finite.full_tensor() if hasattr(finite, "full_tensor") else finite):
                return False
        else:
            extremes.setdefault((numbers.device, numbers.dtype), []).extend(numbers.aminmax())
    return all(bool(torch.stack(found).isfinite().all()) for found in extremes.values())


def _numbers(gradient: Tensor) -> Tensor:
    """The numbers of a gradient as real ones; of a sparse one, what its rows add up to."""
    gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
