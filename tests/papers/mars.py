"""MARS: AdamW on gradients that are corrected by how they changed since the last step.

    c = g + γ·β1/(1-β1)·(g - last g)       0 before the first
    c ← c / max(1, ‖c‖)
    θ ← θ·(1 - lr·λ) - lr·(Adam's direction for c)

Vectors and single numbers are stepped by AdamW, with an lr, betas and λ of their own.
Source: Yuan et al. 2024, alg. 2, https://arxiv.org/abs/2411.10438, with the vectors of the authors' code
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, own, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    last = {"last_grad": np.zeros_like(theta)} if theta.ndim > 1 else {}
    return {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta), **last}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.99),
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    gamma: float = 0.025,
    lr_1d_factor: float = 1.0,
    betas_1d: tuple[float, float] = (0.9, 0.95),
    weight_decay_1d: float = 0.1,
    maximize: bool = False,
) -> np.ndarray:
    amount, before = own(weight_decay)
    theta, c = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    if theta.ndim > 1:
        c, state["last_grad"] = corrected(c, state["last_grad"], gamma, betas[0]), c
    else:
        lr, betas, amount = lr * lr_1d_factor, betas_1d, weight_decay_1d
    m = state["exp_avg"] = betas[0] * state["exp_avg"] + (1 - betas[0]) * c
    v = state["exp_avg_sq"] = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * c**2
    u = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return theta * (1 - lr * amount) - lr * u


def corrected(g: np.ndarray, last: np.ndarray, gamma: float, beta: float) -> np.ndarray:
    """The gradient, corrected and no longer than 1."""
    c = g + gamma * beta / (1 - beta) * (g - last)
    return c / max(1.0, float(np.linalg.norm(c)))
