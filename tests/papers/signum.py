"""Signum: the sign of the momentum; without momentum, SignSGD.

    m ← μ·m + (1-μ)·g
    θ ← θ - lr·sign(m)

Weight decay is decoupled.
Source: Bernstein, Wang, Azizzadenesheli, Anandkumar 2018, alg. 2, https://arxiv.org/abs/1802.04434
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, *, momentum: float = 0.9, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta)} if momentum else {}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    theta, m = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    if momentum:
        m = state["exp_avg"] = momentum * state["exp_avg"] + (1 - momentum) * m
    return theta - lr * np.sign(m)
