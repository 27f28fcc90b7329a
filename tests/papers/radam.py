"""RAdam: Adam that waits until its second moment can be trusted.

    m ← β1·m + (1-β1)·g                 m̂ = m/(1-β1ᵗ)
    v ← β2·v + (1-β2)·g²
    ρ∞ = 2/(1-β2) - 1                   ρₜ = ρ∞ - 2·t·β2ᵗ/(1-β2ᵗ)
    ρₜ > 5:   r = √[(ρₜ-4)(ρₜ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρₜ)]
              θ ← θ - lr·r·m̂·√(1-β2ᵗ)/(√v + ε)
    else:     θ ← θ - lr·m̂              nothing when degenerate_to_sgd is False

The paper's threshold is 4, the authors' code and torch use 5.
Source: Liu, Jiang, He, Chen, Liu, Gao & Han 2020, alg. 2, https://arxiv.org/abs/1908.03265
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def sma_length(beta2: float, t: int) -> float:
    """ρₜ, how many gradients the second moment averages over after t steps."""
    return 2 / (1 - beta2) - 1 - 2 * t * beta2**t / (1 - beta2**t)


def rectification(beta2: float, t: int) -> float:
    """r, the factor by which step t is shortened; needs ρₜ > 4."""
    end, now = 2 / (1 - beta2) - 1, sma_length(beta2, t)
    return float(np.sqrt((now - 4) * (now - 2) * end / ((end - 4) * (end - 2) * now)))


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta)}


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
    decoupled_weight_decay: bool = False,
    degenerate_to_sgd: bool = True,
    maximize: bool = False,
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
    m_hat = m / (1 - beta1**t)
    if sma_length(beta2, t) > 5:
        adaptive = np.sqrt(1 - beta2**t) / (np.sqrt(v) + eps)
        return theta - lr * rectification(beta2, t) * m_hat * adaptive
    return theta - lr * m_hat if degenerate_to_sgd else theta
