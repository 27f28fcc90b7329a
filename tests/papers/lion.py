"""Lion: the sign of a momentum that trusts the newest gradient more than its memory does.

    θ ← θ - lr·sign(β1·m + (1-β1)·g)
    m ← β2·m + (1-β2)·g                 after the step

Weight decay is decoupled.
Source: Chen, Liang, Huang et al. 2023, alg. 2, https://arxiv.org/abs/2302.06675
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    change = -lr * np.sign(beta1 * state["exp_avg"] + (1 - beta1) * g)
    state["exp_avg"] = beta2 * state["exp_avg"] + (1 - beta2) * g
    return theta + change
