"""Scion: a step of a given norm along the momentum, and weights that are pulled into the ball of that norm.

    M ← μ·M + (1-μ)·G
    θ ← θ·(1 - lr·λ) - lr·ρ·U
    "spectral": U = √(rows/columns)·orthogonalized(M)
    "sign": U = sign(M)/columns
    "row": U = M/(‖row‖·√columns + ε)
    "column": U = M/(‖column‖/√rows + ε)
    vectors: U = M/(√mean(M²) + ε)

The paper has λ = 1, and λ = 0 in the unconstrained form; its α is 1-μ. More than two dimensions are a stack of
matrices.
Source: Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls & Cevher 2025, sec. 3,
https://arxiv.org/abs/2502.07529, with the norms and ε of the authors' code
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare
from .orthogonalize import orthogonalized


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"momentum_buffer": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    momentum: float = 0.9,
    scale: float = 1.0,
    norm: str = "spectral",
    weight_decay: float | WeightDecay = 1.0,
    method: str = "newton_schulz",
    ns_steps: int = 5,
    eps: float = 1e-8,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - momentum) * g
    if m.ndim < 2:
        return theta - lr * scale * m / (np.sqrt(np.mean(m**2)) + eps)
    rows, columns = m.shape[-2:]
    if norm == "sign":
        u = np.sign(m) / columns
    elif norm == "row":
        u = m / (np.sqrt(np.sum(m**2, axis=-1, keepdims=True)) * np.sqrt(columns) + eps)
    elif norm == "column":
        u = m / (np.sqrt(np.sum(m**2, axis=-2, keepdims=True)) / np.sqrt(rows) + eps)
    else:
        u = np.sqrt(rows / columns) * orthogonalized(m, method, ns_steps)
    return theta - lr * scale * u
