"""MADGRAD: dual averaging with a cube root, and momentum.

    a = (lr + ε)·√t             0 while lr is 0
    s ← s + a·g                 ν ← ν + a·g²
    z = θ0 - s/(ν^⅓ + ε)
    θ ← μ·θ + (1-μ)·z

Weight decay is L2.
Source: Defazio, Jelassi 2021, alg. 1, https://arxiv.org/abs/2101.11075; ε in a as in the authors' code.
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"grad_sum": np.zeros_like(theta), "grad_sum_sq": np.zeros_like(theta), "x0": theta.copy()}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-2,
    momentum: float = 0.9,
    weight_decay: float | WeightDecay = 0.0,
    eps: float = 1e-6,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize)
    a = (lr + eps) * np.sqrt(t) if lr else 0.0
    s = state["grad_sum"] = state["grad_sum"] + a * g
    nu = state["grad_sum_sq"] = state["grad_sum_sq"] + a * g**2
    z = state["x0"] - s / (np.cbrt(nu) + eps)
    return momentum * theta + (1 - momentum) * z
