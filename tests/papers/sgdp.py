"""SGDP: SGD with momentum whose step has no part along weights that look scale-invariant.

    b ← μ·b + (1-dampening)·g          u = b, or g + μ·b with Nesterov
    u is projected as in AdamP
    θ ← θ·(1 - lr·λ/(1-μ)·(wd_ratio if projected, otherwise 1)) - lr·u

Source: Heo et al. 2021, alg. 1, https://arxiv.org/abs/2006.08217; the authors' code projects b as well
"""

from typing import Any

import numpy as np

from .adamp import projected
from .decay import WeightDecay, own, prepare


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
    dampening: float = 0.0,
    weight_decay: float | WeightDecay = 0.0,
    nesterov: bool = False,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    maximize: bool = False,
) -> np.ndarray:
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    b = state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - dampening) * g
    u, ratio = projected(theta, g, g + momentum * b if nesterov else b, delta, wd_ratio, eps)
    return theta * (1 - lr * amount * ratio / (1 - momentum)) - lr * u
