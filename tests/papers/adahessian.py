"""AdaHessian: Adam, with an estimate of the Hessian's diagonal in the place of the gradient in v.

    m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·D²
    θ ← θ - lr·m/(1-β1ᵗ) / ((v/(1-β2ⁿ))^{k/2} + ε)

where D is estimated n times, at every step or less often. Before that nothing is divided by v: θ stays. Weight
decay is decoupled.
Source: Yao, Gholami, Shen, Mustafa, Keutzer & Mahoney 2021, alg. 1, https://arxiv.org/abs/2006.00719, without
the averages over blocks; the defaults are those of https://github.com/amirgholami/adahessian.
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_hessian_diag_sq": np.zeros_like(theta), "estimates": 0}


def update_hessian(
    diagonal: np.ndarray, state: dict[str, Any], *, betas: tuple[float, float] = (0.9, 0.999)
) -> None:
    """Take D into v."""
    beta2 = betas[1]
    state["exp_hessian_diag_sq"] = beta2 * state["exp_hessian_diag_sq"] + (1 - beta2) * diagonal**2
    state["estimates"] += 1


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 0.15,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-4,
    hessian_power: float = 1.0,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    n = state["estimates"]
    if n == 0:
        return theta
    corrected = state["exp_hessian_diag_sq"] / (1 - beta2**n)
    return theta - lr * (m / (1 - beta1**t)) / (corrected ** (hessian_power / 2) + eps)
