"""Adamax."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, larger


class Adamax(Elementwise, flags="foreach maximize differentiable capturable", positional="foreach"):
    """Adam that divides by the largest recent gradient.

    When: most gradients are zero, as in embeddings.

        m ← β1·m + (1-β1)·g         u ← max(β2·u, |g| + ε)
        θ ← θ - lr/(1-β1ᵗ) · m/u

    State: 2 values per element (exp_avg, exp_inf).
    Source: Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", §7.1,
    https://arxiv.org/abs/1412.6980. The paper has no ε.
    """

    lr: float = hyper(default=2e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of u")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0)

    m = slot("exp_avg")
    u = slot("exp_inf", never_negative=True)

    @staticmethod
    def update(h: Adamax, p: Number, g: Number, s: Adamax, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        s.u = larger(s.u * beta2, abs(g) + h.eps)
        return -(h.lr / (1 - beta1**t)) * s.m / s.u
