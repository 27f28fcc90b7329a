"""NAdamW: AdamW with Nesterov's momentum.

    m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²        v̂ = v/(1-β2ᵗ)
    m̂ = (β1·m + (1-β1)·g)/(1-β1ᵗ)
    θ ← θ - lr·m̂/(√v̂ + ε)

Weight decay is decoupled.
Source: Dozat 2016, alg. 2, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, with μₜ = β1
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
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 1e-2,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    m_hat = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
    return theta - lr * m_hat / (np.sqrt(v / (1 - beta2**t)) + eps)
