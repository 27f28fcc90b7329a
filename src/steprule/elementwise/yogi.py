"""Yogi."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, sign, sqrt


class Yogi(Elementwise):
    """Adam whose v shrinks slowly, by as much as the gradient says, so that the steps do not grow suddenly.

    When: sparse or rarely large gradients, and federated learning.

        θ ← θ·(1 - lr·λ)
        m ← β1·m + (1-β1)·g         v ← v - (1-β2)·sign(v - g²)·g²
        θ ← θ - lr/(1-β1ᵗ) · m / (√v/√(1-β2ᵗ) + ε)

    State: 2 values per element (exp_avg, exp_avg_sq).
    Source: Zaheer, Reddi, Sachan, Kale, Kumar 2018, "Adaptive Methods for Nonconvex Optimization", algorithm 2,
    https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization, with Adam's bias corrections
    and with the start of m and v that its implementations have
    """

    lr: float = hyper(default=1e-2, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-3, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")
    initial_accumulator_value: float = hyper(default=1e-6, at_least=0, meaning="where m and v start")

    m = slot("exp_avg", starts="initial_accumulator_value")
    v = slot("exp_avg_sq", starts="initial_accumulator_value", never_negative=True)

    @staticmethod
    def update(h: Yogi, p: Number, g: Number, s: Yogi, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        square = g * g
        s.v = s.v - (1 - beta2) * sign(s.v - square) * square
        return -(h.lr / (1 - beta1**t)) * s.m / (sqrt(s.v) / sqrt(1 - beta2**t) + h.eps)
