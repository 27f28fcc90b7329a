"""AdamAtan2: Adam with an angle in place of the quotient, and no ε.

    m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²
    m̂ = m/(1-β1ᵗ)               v̂ = v/(1-β2ᵗ)
    θ ← θ - lr·a·atan2(m̂, b·√v̂)

Weight decay is decoupled.
Source: Everett, Xiao, Wortsman et al. 2024, §4.3, https://arxiv.org/abs/2407.05872
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
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float | WeightDecay = 0.0,
    a: float = 1.27,
    b: float = 1.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    return theta - lr * a * np.arctan2(m / (1 - beta1**t), b * np.sqrt(v / (1 - beta2**t)))
