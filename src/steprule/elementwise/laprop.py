"""LaProp."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, sqrt


class LaProp(Elementwise):
    """Adam that divides first and averages afterwards: the momentum of gradients that are already scaled.

    When: noisy or changing gradients, and with a small β2, where Adam fails.

        θ ← θ·(1 - lr·λ)
        v ← β2·v + (1-β2)·g²
        m ← β1·m + (1-β1)·g/(√v/√(1-β2ᵗ) + ε)
        θ ← θ - lr/(1-β1ᵗ) · m

    State: 2 values per element (exp_avg, exp_avg_sq).
    Differs: from the authors' code and timm, which keep lr inside m: the same while lr is constant.
    Source: Ziyin, Wang, Ueda 2020, "LaProp: Separating Momentum and Adaptivity in Adam", algorithm 1,
    https://arxiv.org/abs/2002.04839
    """

    lr: float = hyper(default=4e-4, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-15, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: LaProp, p: Number, g: Number, s: LaProp, t: float) -> Number:
        beta1, beta2 = h.betas
        s.v = ema_sq(s.v, g, beta2)
        s.m = ema(s.m, g / (sqrt(s.v) / sqrt(1 - beta2**t) + h.eps), beta1)
        return -(h.lr / (1 - beta1**t)) * s.m
