"""CAME: Adafactor whose momentum is divided by how much the updates disagree with it.

    R ← β2·R + (1-β2)·mean over columns of (G² + ε1)        C likewise, over rows
    U = G / √(R·C/mean(R))                                  U ← U / max(1, RMS(U)/clip)
    M ← β1·M + (1-β1)·U
    R_s ← β3·R_s + (1-β3)·mean over columns of ((U - M)² + ε2)      C_s likewise
    θ ← θ - lr·M / √(R_s·C_s/mean(R_s))

Vectors and single numbers keep V ← β2·V + (1-β2)·(G² + ε1), U = G/√V, and step by M. More than two dimensions
are a stack of matrices, with one RMS.
Source: Luo et al. 2023, alg. 2, https://arxiv.org/abs/2307.02047, and the authors' code for vectors
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    m = {"exp_avg": np.zeros_like(theta)}
    if theta.ndim < 2:
        return {**m, "exp_avg_sq": np.zeros_like(theta)}
    rows, columns = theta[..., :1], theta[..., :1, :]
    return m | {
        "exp_avg_sq_row": np.zeros_like(rows),
        "exp_avg_sq_col": np.zeros_like(columns),
        "exp_avg_res_row": np.zeros_like(rows),
        "exp_avg_res_col": np.zeros_like(columns),
    }


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 2e-4,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    beta1, beta2, beta3 = betas
    if g.ndim < 2:
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * (g**2 + eps[0])
        u = g / np.sqrt(v)
    else:
        u = g / np.sqrt(estimate(state, "sq", g**2 + eps[0], beta2))
    u = u / max(1.0, float(np.sqrt(np.mean(u**2))) / clip_threshold)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * u
    if g.ndim < 2:
        return theta - lr * m
    return theta - lr * m / np.sqrt(estimate(state, "res", (u - m) ** 2 + eps[1], beta3))


def estimate(state: dict[str, Any], name: str, squares: np.ndarray, beta: float) -> np.ndarray:
    """The matrix of rank one with the averages of the row and column means, which are brought up to date."""
    means: list[np.ndarray] = []
    for key, axis in ((f"exp_avg_{name}_row", -1), (f"exp_avg_{name}_col", -2)):
        state[key] = beta * state[key] + (1 - beta) * np.mean(squares, axis=axis, keepdims=True)
        means.append(state[key])
    rows, columns = means
    return rows * columns / np.mean(rows, axis=-2, keepdims=True)
