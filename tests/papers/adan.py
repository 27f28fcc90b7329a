"""Adan: Nesterov momentum from the change of the gradient.

    δ = g - g₋₁ (0 in the first step)
    m ← β1·m + (1-β1)·g         w ← β2·w + (1-β2)·δ         n ← β3·n + (1-β3)·(g + β2·δ)²
    m̂ = m/(1-β1ᵗ)               ŵ = w/(1-β2ᵗ)               n̂ = n/(1-β3ᵗ)
    u = (m̂ + β2·ŵ)/(√n̂ + ε)
    θ ← (θ - lr·u)/(1 + lr·λ)

Source: Xie, Zhou, Li, Lin, Yan 2022, alg. 1, https://arxiv.org/abs/2208.06677; betas and corrections as in the
authors' code.
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, own, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {key: np.zeros_like(theta) for key in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "prev")}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2, beta3 = betas
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    delta = g - state["prev"] if t > 1 else np.zeros_like(g)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    w = state["exp_avg_diff"] = beta2 * state["exp_avg_diff"] + (1 - beta2) * delta
    n = state["exp_avg_sq"] = beta3 * state["exp_avg_sq"] + (1 - beta3) * (g + beta2 * delta) ** 2
    state["prev"] = g.copy()
    ahead = m / (1 - beta1**t) + beta2 * w / (1 - beta2**t)
    u = ahead / (np.sqrt(n / (1 - beta3**t)) + eps)
    return (theta - lr * u) / (1 + lr * amount)
