"""AdaBelief: Adam that measures how far each gradient is from its own prediction.

    m ← β1·m + (1-β1)·g                 m̂ = m/(1-β1ᵗ)
    s ← β2·s + (1-β2)·(g-m)²            with the new m, uncorrected
    ŝ = (s + ε)/(1-β2ᵗ)                 this ε does not stay in the state
    θ ← θ - lr·m̂/(√ŝ + ε)
    amsgrad             s in the last two lines is the largest s so far
    optimized_update    θ ← θ - lr·√(1-β2ᵗ)/(1-β1ᵗ)·m/(√(s + ε) + ε), on by default: it differs
                        from the line above where √s is near ε only
    rectify             RAdam's r multiplies the step while ρₜ ≥ 5; before that the step is
                        θ ← θ - lr·m̂, or nothing when degenerate_to_sgd is False
    eps_in_state        the paper: s ← β2·s + (1-β2)·(g-m)² + ε, ŝ = s/(1-β2ᵗ)

Weight decay is decoupled.
Source: Zhuang, Tang, Ding, Tatikonda, Dvornek, Papademetris & Duncan 2020, alg. 2,
https://arxiv.org/abs/2010.07468; ε outside the state as documented by
https://nn.labml.ai/optimizers/ada_belief.html; r from radam.py
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare
from .radam import rectification, sma_length


def init(theta: np.ndarray, *, amsgrad: bool = False, **hyper: Any) -> dict[str, Any]:
    state = {"exp_avg": np.zeros_like(theta), "exp_avg_var": np.zeros_like(theta)}
    if amsgrad:
        state["max_exp_avg_var"] = np.zeros_like(theta)
    return state


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float | WeightDecay = 0.0,
    amsgrad: bool = False,
    optimized_update: bool = True,
    rectify: bool = True,
    degenerate_to_sgd: bool = True,
    eps_in_state: bool = False,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
    s = beta2 * state["exp_avg_var"] + (1 - beta2) * (g - m) ** 2
    if eps_in_state:
        s = s + eps
    state["exp_avg_var"] = s
    if amsgrad:
        s = state["max_exp_avg_var"] = np.maximum(state["max_exp_avg_var"], s)
    if not eps_in_state:
        s = s + eps

    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    r = 1.0
    if rectify:
        if sma_length(beta2, t) < 5:
            return theta - lr * m / correction1 if degenerate_to_sgd else theta
        r = rectification(beta2, t)
    if optimized_update:
        return theta - lr * np.sqrt(correction2) / correction1 * r * m / (np.sqrt(s) + eps)
    return theta - lr * r * (m / correction1) / (np.sqrt(s / correction2) + eps)
