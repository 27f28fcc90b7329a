"""NovoGrad: momentum of gradients that are divided by the norm of their tensor.

    v ← β2·v + (1-β2)·‖g‖²      ‖g‖² in the first step
    m ← β1·m + g/(√v + ε) + λ·θ         grad_averaging: β1·m + (1-β1)·(g/(√v + ε) + λ·θ)
    θ ← θ - lr·m

Source: Ginsburg, Castonguay, Hrinchuk et al. 2019, alg. 1, https://arxiv.org/abs/1905.11286
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, own, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros(())}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.95, 0.98),
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    grad_averaging: bool = False,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    square = np.sum(g**2)
    v = state["exp_avg_sq"] = np.asarray(
        square if t == 1 else beta2 * state["exp_avg_sq"] + (1 - beta2) * square
    )
    scaled = g / (np.sqrt(v) + eps) + amount * theta
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1 if grad_averaging else 1.0) * scaled
    return theta - lr * m
