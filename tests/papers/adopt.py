"""ADOPT: the gradient is divided by the v of the step before, and then averaged.

    t = 1: v ← g², and nothing else
    u = clip(g/max(√v, ε), -(t-1)^c, (t-1)^c)
    m ← β1·m + (1-β1)·u
    θ ← θ·(1 - lr·λ) - lr·m
    v ← β2·v + (1-β2)·g²

Source: Taniguchi, Harada, Minegishi et al. 2024, alg. 2, https://arxiv.org/abs/2411.02853
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
    betas: tuple[float, float] = (0.9, 0.9999),
    eps: float = 1e-6,
    weight_decay: float | WeightDecay = 0.0,
    clip_exp: float = 0.25,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    if t == 1:
        state["exp_avg_sq"] = g**2
        return theta
    clip = (t - 1) ** clip_exp
    u = np.clip(g / np.maximum(np.sqrt(state["exp_avg_sq"]), eps), -clip, clip)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * u
    state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    return theta * (1 - lr * amount) - lr * m
