"""Yogi: Adam whose v moves towards g² by a part of g², whatever their distance is.

    m ← β1·m + (1-β1)·g         v ← v - (1-β2)·sign(v - g²)·g²
    θ ← θ - lr·m/(1-β1ᵗ)/(√(v/(1-β2ᵗ)) + ε)

Weight decay is decoupled.
Source: Zaheer, Reddi, Sachan, Kale, Kumar 2018, alg. 2,
https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization, with the start of m and v and the
corrections of its implementations.
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, *, initial_accumulator_value: float = 1e-6, **hyper: Any) -> dict[str, Any]:
    return {key: np.full_like(theta, initial_accumulator_value) for key in ("exp_avg", "exp_avg_sq")}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-3,
    weight_decay: float | WeightDecay = 0.0,
    initial_accumulator_value: float = 1e-6,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    old = state["exp_avg_sq"]
    v = state["exp_avg_sq"] = old - (1 - beta2) * np.sign(old - g**2) * g**2
    return theta - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
