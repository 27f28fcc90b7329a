"""AdamAtan2."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, atan2, ema, ema_sq, sqrt


class AdamAtan2(Elementwise):
    """AdamW without ε: an angle takes the place of the quotient, so the scale of the gradients does not matter.

    When: large models, whose gradients can be as small as AdamW's ε, and models of many sizes with one lr.

        θ ← θ·(1 - lr·λ)
        m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²
        θ ← θ - lr·a·atan2(m/(1-β1ᵗ), b·√v/√(1-β2ᵗ))

    State: 2 values per element (exp_avg, exp_avg_sq).
    Source: Everett, Xiao, Wortsman, Alemi, Novak, Liu, Gur, Sohl-Dickstein, Kaelbling, Lee, Pennington 2024,
    "Scaling Exponents Across Parameterizations and Optimizers", §4.3, https://arxiv.org/abs/2407.05872, with
    the defaults of adam-atan2-pytorch
    """

    lr: float = hyper(default=1e-4, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.99), at_least=0, below=1, meaning="decay of m, of v")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")
    a: float = hyper(default=1.27, above=0, meaning="scales the angle, which is π/4 for equal gradients")
    b: float = hyper(default=1.0, above=0, meaning="scales √v inside the angle")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: AdamAtan2, p: Number, g: Number, s: AdamAtan2, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        s.v = ema_sq(s.v, g, beta2)
        angle = atan2(s.m / (1 - beta1**t), (h.b / sqrt(1 - beta2**t)) * sqrt(s.v))
        return -(h.lr * h.a) * angle
