"""Sophia-H: momentum divided by an estimate of the Hessian's diagonal, every number clipped.

    m ← β1·m + (1-β1)·g
    θ ← θ - lr·clip(m/max(rho·h, ε), -1, 1)
    every few steps, with D the estimate:  h ← β2·h + (1-β2)·D

Nothing is bias-corrected; lr is the longest step a number can make. Weight decay is decoupled.
Source: Liu, Li, Hall, Liang & Ma 2023, alg. 3 and sec. 2.3 (Hutchinson), https://arxiv.org/abs/2305.14342; rho
is the paper's γ.
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "hessian": np.zeros_like(theta)}


def update_hessian(
    diagonal: np.ndarray, state: dict[str, Any], *, betas: tuple[float, float] = (0.96, 0.99)
) -> None:
    """Take D into h."""
    beta2 = betas[1]
    state["hessian"] = beta2 * state["hessian"] + (1 - beta2) * diagonal


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 6e-4,
    betas: tuple[float, float] = (0.96, 0.99),
    eps: float = 1e-12,
    rho: float = 0.01,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1 = betas[0]
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    return theta - lr * np.clip(m / np.maximum(rho * state["hessian"], eps), -1, 1)
