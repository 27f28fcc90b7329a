"""AdEMAMix: Adam with a second, slower momentum that is not corrected.

    m ← β1·m + (1-β1)·g         n ← β3ₜ·n + (1-β3ₜ)·g       v ← β2·v + (1-β2)·g²
    θ ← θ - lr·(m/(1-β1ᵗ) + αₜ·n)/(√v/√(1-β2ᵗ) + ε)

With a warm-up of T steps and σ = min(t/T, 1):

    αₜ = σ·α        β3ₜ = min(exp(ln β1·ln β3/((1-σ)·ln β3 + σ·ln β1)), β3)

Weight decay is decoupled.
Source: Pagliardini, Ablin, Grangier 2024, alg. 1, https://arxiv.org/abs/2409.03137
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {key: np.zeros_like(theta) for key in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 2.0,
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    warmup: int = 0,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2, beta3 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    if warmup:
        share = min(t / warmup, 1.0)
        alpha = share * alpha
        logs = np.log(beta1), np.log(beta3)
        beta3 = min(np.exp(logs[0] * logs[1] / ((1 - share) * logs[1] + share * logs[0])), beta3)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    n = state["exp_avg_slow"] = beta3 * state["exp_avg_slow"] + (1 - beta3) * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    return theta - lr * (m / (1 - beta1**t) + alpha * n) / (np.sqrt(v) / np.sqrt(1 - beta2**t) + eps)
