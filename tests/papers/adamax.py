"""Adamax: Adam with the largest recent gradient as its yardstick.

    m ← β1·m + (1-β1)·g
    u ← max(β2·u, |g| + ε)
    θ ← θ - lr/(1-β1ᵗ)·m/u

ε is torch's: the paper has none.
Source: Kingma & Ba 2015, sec. 7.1, alg. 2, https://arxiv.org/abs/1412.6980
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_inf": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    u = state["exp_inf"] = np.maximum(beta2 * state["exp_inf"], np.abs(g) + eps)
    return theta - lr / (1 - beta1**t) * m / u
