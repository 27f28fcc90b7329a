"""Adagrad: each gradient divided by the root of the sum of all its squares.

    s ← s + g²                          s₀ is initial_accumulator_value
    θ ← θ - lr/(1 + (t-1)·lr_decay)·g/(√s + ε)

Source: Duchi, Hazan & Singer 2011, sec. 1.1 (diagonal case), https://jmlr.org/papers/v12/duchi11a.html;
lr_decay and ε as torch.optim.Adagrad
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, *, initial_accumulator_value: float = 0.0, **hyper: Any) -> dict[str, Any]:
    return {"sum": np.full_like(theta, initial_accumulator_value)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float | WeightDecay = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize)
    s = state["sum"] = state["sum"] + g**2
    return theta - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(s) + eps)
