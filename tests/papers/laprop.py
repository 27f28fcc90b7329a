"""LaProp: divide first, average afterwards.

    v ← β2·v + (1-β2)·g²        v̂ = v/(1-β2ᵗ)
    m ← β1·m + (1-β1)·g/(√v̂ + ε)
    θ ← θ - lr·m/(1-β1ᵗ)

Weight decay is decoupled.
Source: Ziyin, Wang, Ueda 2020, alg. 1, https://arxiv.org/abs/2002.04839, with lr outside of m
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 4e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-15,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    scaled = g / (np.sqrt(v / (1 - beta2**t)) + eps)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * scaled
    return theta - lr * m / (1 - beta1**t)
