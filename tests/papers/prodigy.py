"""Prodigy: Adam on d·g, where d is an estimate of the distance to a solution.

    η = d·lr·√(1-β2ᵗ)/(1-β1ᵗ)           without use_bias_correction: η = d·lr
    m ← β1·m + (1-β1)·d·g               v ← β2·v + (1-β2)·d²·g²
    r ← β3·r + d/d0·η·⟨g, θ0 - θ⟩       s ← β3·s + d/d0·η·g         β3 = √β2
    d̂ = d_coef·r/‖s‖₁                   safeguard_warmup: s ← β3·s + d/d0·d·g
    θ ← θ - η·λ·θ                       by the old d
    θ ← θ - η·m/(√v + d'·ε)             d' = max(d, d̂)

growth_rate: with d_max the largest d̂ (and d0) so far, d' = min(d_max, growth_rate·d), where d is first set to
max(d, d̂) if it is d0. While ‖s‖₁ is 0, d stays.

One tensor is all parameters here.
Source: Mishchenko, Defazio 2024, alg. 4, https://arxiv.org/abs/2306.06101; old and new d as in prodigyopt.
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, own, prepare


def init(theta: np.ndarray, *, d0: float = 1e-6, **hyper: Any) -> dict[str, Any]:
    zeros = {key: np.zeros_like(theta) for key in ("exp_avg", "exp_avg_sq", "s")}
    return zeros | {
        "p0": theta.copy(),
        "d": np.array(d0),
        "d_max": np.array(d0),
        "d_numerator": np.zeros(()),
        "k": np.zeros(()),
    }


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    beta3 = np.sqrt(beta2)
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    d = float(state["d"])
    state["k"] = np.array(float(t))
    eta = d * lr * (np.sqrt(1 - beta2**t) / (1 - beta1**t) if use_bias_correction else 1.0)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * d * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * d**2 * g**2
    moved = np.sum(g * (state["p0"] - theta))
    r = state["d_numerator"] = np.asarray(beta3 * state["d_numerator"] + d / d0 * eta * moved)
    s = state["s"] = beta3 * state["s"] + d / d0 * (d if safeguard_warmup else eta) * g
    size = np.sum(abs(s))
    if size > 0:
        found = d_coef * r / size
        largest = max(float(state["d_max"]), found)
        if growth_rate:
            start = max(d, found) if d == d0 else d
            new = min(largest, growth_rate * start)
        else:
            new = largest
        state["d_max"], state["d"] = np.array(largest), np.array(new)
    theta = theta - eta * amount * theta
    return theta - eta * m / (np.sqrt(v) + state["d"] * eps)
