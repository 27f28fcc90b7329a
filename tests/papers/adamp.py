"""AdamP: Adam whose step has no part along weights that look scale-invariant.

    u = Adam's direction without lr
    if max over the rows of |cos(g_i, θ_i)| < δ/√(elements of a row):    u_i ← u_i - (p_i·u_i)·p_i,   p = θ/‖θ‖
    otherwise if |cos(g, θ)| < δ/√(elements):                           u ← u - (p·u)·p
    θ ← θ·(1 - lr·λ·(wd_ratio if projected, otherwise 1)) - lr·u

A row is what has one first index. Only tensors of two dimensions and more are looked at. ε is added to norms.
Source: Heo et al. 2021, alg. 2, https://arxiv.org/abs/2006.08217, with the rows of the authors' code
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
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    maximize: bool = False,
) -> np.ndarray:
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    beta1, beta2 = betas
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    ahead = beta1 * m + (1 - beta1) * g if nesterov else m
    u = ahead / (np.sqrt(v) / np.sqrt(1 - beta2**t) + eps) / (1 - beta1**t)
    u, ratio = projected(theta, g, u, delta, wd_ratio, eps)
    return theta * (1 - lr * amount * ratio) - lr * u


def projected(
    theta: np.ndarray, g: np.ndarray, u: np.ndarray, delta: float, wd_ratio: float, eps: float
) -> tuple[np.ndarray, float]:
    """What is left of u, and of the decay."""
    if theta.ndim < 2:
        return u, 1.0
    for rows in (len(theta), 1):
        p, d, change = (x.reshape(rows, -1) for x in (theta, g, u))
        lengths = np.linalg.norm(p, axis=1) + eps
        cosines = np.abs(np.sum(p * d, axis=1)) / lengths / (np.linalg.norm(d, axis=1) + eps)
        if np.max(cosines) < delta / np.sqrt(p.shape[1]):
            unit = p / lengths[:, None]
            left = change - unit * np.sum(unit * change, axis=1, keepdims=True)
            return left.reshape(theta.shape), wd_ratio
    return u, 1.0
