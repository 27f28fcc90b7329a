"""AdaMuon: the sign of a momentum, made orthogonal, divided by the root of an average of its squares.

    M ← μ·M + G                 O = orthogonalized(sign(M))
    V ← μ·V + (1-μ)·O²          Ô = O/(√V + ε)
    θ ← θ·(1 - lr·λ) - lr·0.2·√(rows·columns)/(‖Ô‖ + ε)·Ô

More than two dimensions are a stack of matrices. What is kept is (1-μ)·M, which has the same signs.
Source: Si, Zhang & Shen 2025, alg. 1, https://arxiv.org/abs/2507.11005
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare
from .orthogonalize import orthogonalized


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"momentum_buffer": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 6e-4,
    momentum: float = 0.95,
    weight_decay: float | WeightDecay = 0.1,
    method: str = "newton_schulz",
    ns_steps: int = 5,
    eps: float = 1e-8,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - momentum) * g
    o = orthogonalized(np.sign(m), method, ns_steps)
    v = state["exp_avg_sq"] = momentum * state["exp_avg_sq"] + (1 - momentum) * o**2
    divided = o / (np.sqrt(v) + eps)
    rows, columns = theta.shape[-2:]
    size = np.sqrt(np.sum(divided**2, axis=(-2, -1), keepdims=True))
    return theta - lr * 0.2 * np.sqrt(rows * columns) / (size + eps) * divided
