"""Weights to evaluate with, such as averages, in place of the training weights, which come back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from steprule.engine import plans, storage
from steprule.engine.composition import Composition
from steprule.engine.runners import reference

# The key of a group that is in evaluation, and that of the weights which its parameters have set aside.
EVALUATING = "evaluating"
ASIDE = "training_weights"


def enter(optimizer: Any) -> None:
    """Put the weights to evaluate with into the model; the training weights wait in the state."""
    with torch.no_grad(), plans.of(optimizer).lock:
        found: list[tuple[Tensor, dict[str, Any], Tensor]] = []
        groups = [group for group in optimizer.param_groups if optimizer.composition(group).evaluates]
        for group in groups:
            if not group.get(EVALUATING):
                own = optimizer.composition(group)
                found += [(p, state, _weights(own, group, p, state)) for p, state in _stepped(optimizer, group)]
        for param, state, weights in found:
            state[ASIDE] = param.detach().clone(memory_format=torch.preserve_format)
            reference.write(param, weights)
        for group in groups:
            group[EVALUATING] = True


def leave(optimizer: Any) -> None:
    """Put the training weights back."""
    with torch.no_grad(), plans.of(optimizer).lock:
        for group in optimizer.param_groups:
            if group.pop(EVALUATING, False):
                for param, state in _stepped(optimizer, group):
                    if ASIDE in state:
                        param.copy_(state.pop(ASIDE))


def changes(optimizer: Any, training: bool) -> bool:
    """Whether other weights will be in the model if this is asked for."""
    groups = [group for group in optimizer.param_groups if optimizer.composition(group).evaluates]
    return any(bool(group.get(EVALUATING)) == training for group in groups)


def is_on(optimizer: Any) -> bool:
    """Whether any group is in evaluation."""
    return any(group.get(EVALUATING) for group in optimizer.param_groups)


def _stepped(optimizer: Any, group: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The parameters that have a state; the others have no other weights than their own."""
    for param in group["params"]:
        state = optimizer.state.get(param)
        if state:
            yield param, state


def _weights(own: Composition, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> Tensor:
    value = reference.evaluated(own, group, param, state)
    return value.to(param.dtype) if param.dtype in storage.HALF else value
