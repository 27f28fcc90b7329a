"""What happens to a step with NaN or infinite gradients, if a group asks for a check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from steprule import errors
from steprule.engine.checkpoint.matching import Place, own_places
from steprule.engine.fields import SKIPPED_STEPS


def allow_step(optimizer: Any, count: bool = True) -> bool:
    """Whether to take the step, decided for all groups together.

    Groups with nonfinite="ignore" are not checked. count: add a skipped step to the groups' counts.
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
def all_finite(tensors: list[Any]) -> bool:
    """Whether all elements are finite. Normally each is read once, and the host waits once."""
    plain: list[Tensor] = []
    for tensor in tensors:
        numbers = _numbers(tensor)
        if type(numbers) is Tensor:
            plain.append(numbers)
            continue
        # Sharded: every process has to come to the same decision.
        finite: Any = numbers.isfinite().all()
        if not bool(finite.full_tensor() if hasattr(finite, "full_tensor") else finite):
            return False
    # A finite norm proves it. Any other may only have overflowed, so the elements are checked.
    if not plain or bool(get_total_norm(plain).isfinite()):
        return True
    return all(bool(torch.stack(x.aminmax()).isfinite().all()) for x in plain if x.numel())


def _numbers(gradient: Tensor) -> Tensor:
    """The elements of a gradient as real numbers; of a sparse one, with its rows added up."""
    gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
