"""Adadelta."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema_sq, sqrt


class Adadelta(
    Elementwise,
    flags="maximize capturable foreach differentiable",
    positional="foreach",
):
    """The gradient divided by its recent size, times the size of recent steps, so that units match.

    When: you do not want to tune a learning rate.

        v ← ρ·v + (1-ρ)·g²          Δ = √(a + ε) / √(v + ε) · g
        a ← ρ·a + (1-ρ)·Δ²          θ ← θ - lr·Δ

    State: 2 values per element (square_avg, acc_delta).
    Source: Zeiler 2012, "ADADELTA: An Adaptive Learning Rate Method", algorithm 1 (with lr = 1),
    https://arxiv.org/abs/1212.5701
    """

    lr: float = hyper(default=1.0, at_least=0, search=(1e-1, 100.0), meaning="scales the step; 1 in the paper")
    rho: float = hyper(default=0.9, at_least=0, at_most=1, meaning="ρ, decay of v and a")
    eps: float = hyper(default=1e-6, at_least=0, meaning="ε, sets the size of the first step")
    weight_decay: float | WeightDecay = decay(default=0)

    v = slot("square_avg", never_negative=True)
    a = slot("acc_delta", never_negative=True)

    @staticmethod
    def update(h: Adadelta, p: Number, g: Number, s: Adadelta, t: float) -> Number:
        s.v = ema_sq(s.v, g, h.rho)
        delta = sqrt(s.a + h.eps) / sqrt(s.v + h.eps) * g
        s.a = ema_sq(s.a, delta, h.rho)
        return -h.lr * delta
