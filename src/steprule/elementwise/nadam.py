"""NAdam."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, scalar_slot, slot
from steprule.words import Number, as_stored, ema, ema_sq, sqrt


class NAdam(Elementwise, flags="maximize foreach capturable differentiable"):
    """Adam with Nesterov momentum that warms up.

    When: recurrent networks, and where Nesterov momentum helped SGD.

        μₜ = β1·(1 - ½·0.96^(t·ψ))          Π ← Π·μₜ
        m ← β1·m + (1-β1)·g                 v ← β2·v + (1-β2)·g²
        θ ← θ - lr·[(1-μₜ)/(1-Π)·g + μₜ₊₁/(1-Π·μₜ₊₁)·m] / (√(v/(1-β2ᵗ)) + ε)

    State: 2 values per element (exp_avg, exp_avg_sq), 1 per tensor (mu_product).
    Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam", algorithm 2,
    https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """

    lr: float = hyper(default=2e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0)
    momentum_decay: float = hyper(default=4e-3, at_least=0, meaning="ψ, how fast μ warms up")
    decoupled_weight_decay: bool = hyper(default=False, meaning="decay as AdamW does")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)
    mu_product = scalar_slot("mu_product", starts=1.0)

    @staticmethod
    def update(h: NAdam, p: Number, g: Number, s: NAdam, t: float) -> tuple[Number, Number]:
        beta1, beta2 = h.betas
        mu = beta1 * (1.0 - 0.5 * (0.96 ** (t * h.momentum_decay)))
        mu_next = beta1 * (1.0 - 0.5 * (0.96 ** ((t + 1) * h.momentum_decay)))
        # torch multiplies in the precision that the product is stored in, and rounds mu to it first.
        s.mu_product = as_stored(s.mu_product * as_stored(mu))
        s.m = ema(s.m, g, beta1)
        s.v = ema_sq(s.v, g, beta2)
        denominator = sqrt(s.v / (1 - beta2**t)) + h.eps
        along_g = -h.lr * (1.0 - mu) / (1.0 - s.mu_product)
        along_m = -h.lr * mu_next / (1.0 - s.mu_product * mu_next)
        return along_g * g / denominator, along_m * s.m / denominator
