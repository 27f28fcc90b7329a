"""Sparse gradients: the same step, applied only to the rows that the gradient touches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steprule.engine.composition import Composition
from steprule.engine.runners import reference


def run(
    composition: Composition,
    group: dict[str, Any],
    param: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
) -> None:
    """One step on the rows of `param` that a sparse gradient touches. Other rows do not change."""
    gradient = gradient.coalesce()
    touched = gradient._indices()
    if composition.rule.gradients == "rows" and group.get("momentum"):
        # Momentum moves every row, so the zeros of the gradient count.
        gradient = gradient.to_dense()
    t = None
    if "step" in state:
        state["step"] += 1
        t = float(state["step"])
    if not gradient.is_sparse:
        reference.run(composition, group, param, gradient, state, t)
        return
    if touched.numel() == 0:
        return
    where = tuple(touched)
    slots = {k: v for k, v in state.items() if k != "step" and isinstance(v, Tensor)}
    rows = {k: v[where] if v.shape == param.shape else v for k, v in slots.items()}
    values = param[where].clone()
    reference.run(composition, group, values, gradient._values(), rows, t)
    for key, value in rows.items():
        if state[key].shape == param.shape:
            state[key][where] = value
    with torch.no_grad():
        param[where] = values
