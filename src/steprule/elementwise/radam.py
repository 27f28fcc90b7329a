"""RAdam."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, larger, sqrt, where


def rectification(beta2: float, t: float, least: float = 5.0) -> tuple[Any, Any]:
    """ρₜ, how many gradients v has effectively averaged, and rₜ, which is only used above ρₜ = least."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * (beta2**t) / (1 - beta2**t)
    # Below it neither value is used; without the floor the formula could divide by zero there.
    top, now = larger(rho_inf, least), larger(rho, least)
    return rho, sqrt((now - 4) * (now - 2) * top / ((top - 4) * (top - 2) * now))


class RAdam(Elementwise, flags="maximize foreach capturable differentiable"):
    """Adam that takes plain momentum steps until v has averaged enough gradients.

    When: you want Adam without a warm-up schedule.

        m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²        m̂ = m/(1-β1ᵗ)
        ρ∞ = 2/(1-β2) - 1           ρₜ = ρ∞ - 2t·β2ᵗ/(1-β2ᵗ)
        ρₜ > 5:  θ ← θ - lr·m̂ · √(1-β2ᵗ)/(√v + ε) · rₜ
                 rₜ = √[ (ρₜ-4)(ρₜ-2)ρ∞ / ((ρ∞-4)(ρ∞-2)ρₜ) ]
        else:    θ ← θ - lr·m̂, or no change with degenerate_to_sgd=False

    State: 2 values per element (exp_avg, exp_avg_sq).
    Source: Liu, Jiang, He, Chen, Liu, Gao, Han 2020, "On the Variance of the Adaptive Learning Rate and
    Beyond", algorithm 2, https://arxiv.org/abs/1908.03265, with torch's threshold of 5 (the paper has 4).
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0)
    decoupled_weight_decay: bool = hyper(default=False, meaning="decay as AdamW does")
    degenerate_to_sgd: bool = hyper(default=True, kw_only=True, meaning="use m̂ alone while ρₜ is 5 or less")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: RAdam, p: Number, g: Number, s: RAdam, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        s.v = ema_sq(s.v, g, beta2)
        rho, r = rectification(beta2, t)
        step = s.m / (1 - beta1**t) * h.lr
        adaptive = step * (sqrt(1 - beta2**t) / (sqrt(s.v) + h.eps)) * r
        young = step if h.degenerate_to_sgd else 0.0
        return -where(rho > 5, adaptive, young)
