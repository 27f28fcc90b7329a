"""MADGRAD."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, parameter, slot
from steprule.words import Number, sqrt, where


class MADGRAD(Elementwise):
    """Adagrad by dual averaging: every point is the start minus the scaled sum of all gradients, smoothed.

    When: images and other problems where SGD beats Adam; it needs less weight decay than either.

        a = (lr + ε)·√t                             (0 while lr is 0)
        s ← s + a·g                 ν ← ν + a·g²
        z = θ0 - s/(∛ν + ε)
        θ ← μ·θ + (1-μ)·z

    State: 3 values per element (grad_sum, grad_sum_sq, x0).
    Source: Defazio, Jelassi 2021, "Adaptivity without Compromise: A Momentumized, Adaptive, Dual Averaged
    Gradient Method for Stochastic Optimization", algorithm 1, https://arxiv.org/abs/2101.11075
    """

    lr: float = hyper(default=1e-2, at_least=0, search=(3e-4, 3e-1), meaning="step size")
    momentum: float = hyper(default=0.9, at_least=0, below=1, meaning="μ, the share of the last point to keep")
    weight_decay: float | WeightDecay = decay(default=0)
    eps: float = hyper(default=1e-6, above=0, meaning="ε, avoids division by zero")

    s = slot("grad_sum", not_in_8_bits="the weights are made of it")
    v = slot("grad_sum_sq", never_negative=True, not_in_8_bits="the weights are made of it")
    start = slot("x0", starts=parameter)

    @staticmethod
    def update(h: MADGRAD, p: Number, g: Number, s: MADGRAD, t: float) -> Number:
        a = where(h.lr > 0, h.lr + h.eps, 0.0) * sqrt(t)
        s.s = s.s + a * g
        s.v = s.v + a * g * g
        z = s.start - s.s / (s.v ** (1 / 3) + h.eps)
        return -(1 - h.momentum) * (p - z)
