"""LARS: momentum on gradients that are scaled in every tensor to a share of the tensor's norm.

    q = τ·‖θ‖/(‖g‖ + λ·‖θ‖ + ε)         or 1 where either norm is 0
    b ← μ·b + q·(g + λ·θ)
    θ ← θ - lr·b                        Nesterov: θ ← θ - lr·(q·(g + λ·θ) + μ·b)

Source: You, Gitman, Ginsburg 2017, alg. 1, https://arxiv.org/abs/1708.03888, with lr outside of the buffer.
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, own, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"momentum_buffer": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1.0,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> np.ndarray:
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    size, slope = np.sqrt(np.sum(theta**2)), np.sqrt(np.sum(g**2))
    q = trust_coefficient * size / (slope + amount * size + eps) if size > 0 and slope > 0 else 1.0
    scaled = q * (g + amount * theta)
    b = state["momentum_buffer"] = momentum * state["momentum_buffer"] + scaled
    return theta - lr * (scaled + momentum * b if nesterov else b)
