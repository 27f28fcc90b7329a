"""Ranger, the first version: RAdam that, every k steps, goes back part of the way.

    m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²
    θ ← θ - lr·λ·θ
    ρₜ > 5:  θ ← θ - lr·r·√(1-β2ᵗ)/(1-β1ᵗ) · m/(√v + ε)
    else:    θ ← θ - lr/(1-β1ᵗ) · m
    t divisible by k:  slow ← slow + α·(θ - slow), θ ← slow

Source: Wright 2019, Ranger 9.3.19, https://github.com/lessw2020/Ranger-Deep-Learning-Optimizer; r from radam.py
"""

from typing import Any

import numpy as np

from .radam import rectification, sma_length


def init(theta: np.ndarray) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta), "slow": theta.copy()}


def step(
    theta: np.ndarray,
    g: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.95, 0.999),
    eps: float = 1e-5,
    weight_decay: float = 0.0,
    k: int = 6,
    alpha: float = 0.5,
) -> np.ndarray:
    beta1, beta2 = betas
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    theta = theta - lr * weight_decay * theta
    step_size = lr / (1 - beta1**t)
    if sma_length(beta2, t) > 5:
        theta = theta - step_size * rectification(beta2, t) * np.sqrt(1 - beta2**t) * m / (np.sqrt(v) + eps)
    else:
        theta = theta - step_size * m
    if t % k == 0:
        theta = state["slow"] = state["slow"] + alpha * (theta - state["slow"])
    return theta
