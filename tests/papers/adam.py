"""Adam, and with options AdamW and AMSGrad.

    m ← β1·m + (1-β1)·g                 m̂ = m/(1-β1ᵗ)
    v ← β2·v + (1-β2)·g²                v̂ = v/(1-β2ᵗ)
    θ ← θ - lr·m̂/(√v̂ + ε)
    amsgrad             v in the last line is the largest v so far, taken before its correction
    optimized_update    θ ← θ - lr·√(1-β2ᵗ)/(1-β1ᵗ)·m/(√v + ε): ε is not corrected with v

AdamW is `decoupled_weight_decay=True` with λ = 0.01; labml's AMSGrad is both options with ε = 1e-16.
Source: Kingma & Ba 2015, alg. 1 and the last lines of sec. 2 (optimized_update),
https://arxiv.org/abs/1412.6980; Loshchilov & Hutter 2019, alg. 2, https://arxiv.org/abs/1711.05101;
Reddi, Kale & Kumar 2018, alg. 2, https://arxiv.org/abs/1904.09237 (the paper has no correction,
torch and labml correct after the maximum).
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, *, amsgrad: bool = False, **hyper: Any) -> dict[str, Any]:
    state = {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta)}
    if amsgrad:
        state["max_exp_avg_sq"] = np.zeros_like(theta)
    return state


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
    amsgrad: bool = False,
    optimized_update: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(
        theta,
        gradient,
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        decoupled=decoupled_weight_decay,
    )
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = np.maximum(state["max_exp_avg_sq"], v)
    if optimized_update:
        return theta - lr * np.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (np.sqrt(v) + eps)
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return theta - lr * m_hat / (np.sqrt(v_hat) + eps)
