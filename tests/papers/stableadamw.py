"""StableAdamW: AdamW whose step is smaller where the gradient is larger than v expects.

    β̂ = (βᵗ - β)/(βᵗ - 1)
    m ← β̂1·m + (1-β̂1)·g         v ← β̂2·v + (1-β̂2)·g²
    η = lr/max(1, √(mean of g²/max(v, ε²)))
    θ ← θ·(1 - η·λ) - η·m/(√v + ε)

Source: Wortsman, Dettmers, Zettlemoyer et al. 2023, alg. 2, https://arxiv.org/abs/2304.13013
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
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-6,
    weight_decay: float | WeightDecay = 1e-2,
    maximize: bool = False,
) -> np.ndarray:
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    beta1, beta2 = ((beta**t - beta) / (beta**t - 1) for beta in betas)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    eta = lr / max(1.0, np.sqrt(np.mean(g**2 / np.maximum(v, eps**2))))
    return theta * (1 - eta * amount) - eta * m / (np.sqrt(v) + eps)
