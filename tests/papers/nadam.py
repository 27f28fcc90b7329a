"""NAdam: Adam with Nesterov's momentum and a momentum that warms up.

    μₜ = β1·(1 - ½·0.96^(t·ψ))          ψ is momentum_decay
    Πₜ = μ₁·μ₂·…·μₜ
    m ← β1·m + (1-β1)·g
    v ← β2·v + (1-β2)·g²                v̂ = v/(1-β2ᵗ)
    m̂ = μₜ₊₁·m/(1 - Πₜ·μₜ₊₁) + (1-μₜ)·g/(1 - Πₜ)
    θ ← θ - lr·m̂/(√v̂ + ε)

Source: Dozat 2016, alg. 2, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, with m as
torch.optim.NAdam keeps it (β1, not μₜ, averages the gradients).
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {
        "exp_avg": np.zeros_like(theta),
        "exp_avg_sq": np.zeros_like(theta),
        "mu_product": np.ones(()),
    }


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
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(
        theta,
        gradient,
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        decoupled=decoupled_weight_decay,
    )
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = state["mu_product"] = state["mu_product"] * mu
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
    v_hat = v / (1 - beta2**t)
    return theta - lr * m_hat / (np.sqrt(v_hat) + eps)
