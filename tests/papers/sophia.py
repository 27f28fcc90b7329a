"""Sophia-G: momentum divided by a diagonal curvature estimate, every number clipped.

    m ← β1·m + (1-β1)·g
    θ ← θ - lr/rho·clip(m/(h + ε), -rho, rho)
    every few steps, with ĝ the gradient of the loss on labels drawn from the model itself and n the
    number of labels in the batch:  h ← β2·h + (1-β2)·n·ĝ²

Nothing is bias-corrected; lr is the longest step a number can make. Weight decay is decoupled.
Source: Liu, Li, Hall, Liang & Ma 2023, alg. 3 and sec. 2.3 (Gauss-Newton-Bartlett),
https://arxiv.org/abs/2305.14342; in the form of https://nn.labml.ai/optimizers/sophia.html
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "hessian": np.zeros_like(theta)}


def update_hessian(
    sampled_gradient: np.ndarray,
    state: dict[str, Any],
    number_of_labels: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
) -> None:
    """Take ĝ into h."""
    beta2 = betas[1]
    estimate = number_of_labels * sampled_gradient**2
    state["hessian"] = beta2 * state["hessian"] + (1 - beta2) * estimate


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-12,
    rho: float = 0.03,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1 = betas[0]
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    return theta - lr / rho * np.clip(m / (state["hessian"] + eps), -rho, rho)
