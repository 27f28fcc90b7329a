"""LAMB: Adam's direction, scaled in every tensor to the tensor's norm.

    m ← β1·m + (1-β1)·g         m̂ = m/(1-β1ᵗ)
    v ← β2·v + (1-β2)·g²        v̂ = v/(1-β2ᵗ)
    u = m̂/(√v̂ + ε) + λ·θ
    θ ← θ - lr·φ·u              φ = ‖θ‖/‖u‖, or 1 where either norm is 0

Source: You, Li, Reddi et al. 2020, alg. 2, https://arxiv.org/abs/1904.00962
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, own, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float | WeightDecay = 0.01,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    u = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps) + amount * theta
    size, length = np.sqrt(np.sum(theta**2)), np.sqrt(np.sum(u**2))
    ratio = size / length if size > 0 and length > 0 else 1.0
    return theta - lr * ratio * u
