"""NorMuon: Muon whose rows are divided by the root of an average of their mean squares.

    M ← β1·M + (1-β1)·G         U = β1·M + (1-β1)·G with Nesterov's momentum, else U = M
    O = orthogonalized(U)
    v ← β2·v + (1-β2)·(mean over the columns of O²), one for each row
    Ô = O/(√v + ε)              Ô ← Ô·‖O‖/(‖Ô‖ + ε)
    θ ← θ·(1 - lr·λ) - lr·√max(1, rows/columns)·Ô

More than two dimensions are a stack of matrices.
Source: Li, Liu, Liang, Chen & Zhao 2025, alg. 1, https://arxiv.org/abs/2510.05491, in the form of the authors'
code: with Nesterov, and with ‖O‖ in place of 0.2·√(rows·columns)
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare
from .orthogonalize import orthogonalized


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"momentum_buffer": np.zeros_like(theta), "second_momentum_buffer": np.zeros_like(theta[..., :1])}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 0.02,
    betas: tuple[float, float] = (0.95, 0.95),
    weight_decay: float | WeightDecay = 0.0,
    nesterov: bool = True,
    method: str = "newton_schulz",
    ns_steps: int = 5,
    eps: float = 1e-10,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    beta1, beta2 = betas
    m = state["momentum_buffer"] = beta1 * state["momentum_buffer"] + (1 - beta1) * g
    o = orthogonalized(beta1 * m + (1 - beta1) * g if nesterov else m, method, ns_steps)
    average = beta2 * state["second_momentum_buffer"] + (1 - beta2) * np.mean(o**2, axis=-1, keepdims=True)
    state["second_momentum_buffer"] = average
    normed = o / (np.sqrt(average) + eps)
    normed = normed * size(o) / (size(normed) + eps)
    rows, columns = theta.shape[-2:]
    return theta - lr * np.sqrt(max(1, rows / columns)) * normed


def size(matrix: np.ndarray) -> np.ndarray:
    """Frobenius' norm."""
    return np.sqrt(np.sum(matrix**2, axis=(-2, -1), keepdims=True))
