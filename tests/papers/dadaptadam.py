"""DAdaptAdam: Adam with D-Adaptation, where d is a lower bound of the distance to a solution.

    λₖ = d·lr                            use_bias_correction: d·lr·√(1-β2ᵗ)/(1-β1ᵗ)
    A = √v + ε                           before v is updated
    r ← √β2·r + (1-√β2)·λₖ·⟨g, A⁻¹s⟩     before s is updated
    m ← β1·m + (1-β1)·λₖ·g               v ← β2·v + (1-β2)·g²
    s ← √β2·s + (1-√β2)·λₖ·g
    d̂ = r/((1-√β2)·‖s‖₁)                 while ‖s‖₁ is 0, d stays
    d ← max(d, d̂)                        growth_rate: max(d, min(d̂, growth_rate·d))
    θ ← θ - λₖ·λ·θ                       by the old d
    θ ← θ - m/(√v + ε)

One tensor is all parameters here.
Source: Defazio, Mishchenko 2023, alg. 5, https://arxiv.org/abs/2301.07733; options as in dadaptation.
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, own, prepare


def init(theta: np.ndarray, *, d0: float = 1e-6, **hyper: Any) -> dict[str, Any]:
    zeros = {key: np.zeros_like(theta) for key in ("exp_avg", "exp_avg_sq", "s")}
    return zeros | {"d": np.array(d0), "numerator_weighted": np.zeros(()), "k": np.zeros(())}


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
    d0: float = 1e-6,
    growth_rate: float = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    beta1, beta2 = betas
    root = np.sqrt(beta2)
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    d = float(state["d"])
    state["k"] = np.array(float(t))
    dlr = d * lr * (np.sqrt(1 - beta2**t) / (1 - beta1**t) if use_bias_correction else 1.0)
    product = np.sum(g * state["s"] / (np.sqrt(state["exp_avg_sq"]) + eps))
    r = root * state["numerator_weighted"] + (1 - root) * dlr * product
    state["numerator_weighted"] = np.asarray(r)
    m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * dlr * g
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    s = state["s"] = root * state["s"] + (1 - root) * dlr * g
    size = np.sum(abs(s))
    if size > 0:
        found = r / ((1 - root) * size)
        state["d"] = np.array(max(d, min(found, growth_rate * d) if growth_rate else found))
    theta = theta - dlr * amount * theta
    return theta - m / (np.sqrt(v) + eps)
