"""Adadelta: steps in the units of the parameter, from two running mean squares.

    s ← rho·s + (1-rho)·g²
    Δ = √(a + ε)/√(s + ε)·g             with a of the steps before this one
    a ← rho·a + (1-rho)·Δ²
    θ ← θ - lr·Δ

lr is torch's: the paper has 1.
Source: Zeiler 2012, alg. 1, https://arxiv.org/abs/1212.5701
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"square_avg": np.zeros_like(theta), "acc_delta": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize)
    s = state["square_avg"] = rho * state["square_avg"] + (1 - rho) * g**2
    delta = np.sqrt(state["acc_delta"] + eps) / np.sqrt(s + eps) * g
    state["acc_delta"] = rho * state["acc_delta"] + (1 - rho) * delta**2
    return theta - lr * delta
