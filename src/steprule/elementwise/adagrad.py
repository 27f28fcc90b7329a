"""Adagrad."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, sqrt


class Adagrad(Elementwise, flags="foreach maximize differentiable fused", positional="foreach"):
    """The gradient, divided by the root of all squared gradients so far.

    When: sparse features and convex problems. Its effective learning rate only shrinks.

        s ← s + g²
        θ ← θ - lr/(1 + (t-1)·η) · g / (√s + ε)

    State: 1 value per element (sum).
    Source: Duchi, Hazan, Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", figure 1, https://jmlr.org/papers/v12/duchi11a.html
    """

    gradients = "rows"
    starts_with_state = True

    lr: float = hyper(default=1e-2, at_least=0, search=(1e-3, 1.0), meaning="step size")
    lr_decay: float = hyper(default=0, at_least=0, meaning="η, shrinks lr with the step count")
    weight_decay: float | WeightDecay = decay(default=0)
    initial_accumulator_value: float = hyper(default=0, at_least=0, meaning="where s starts")
    eps: float = hyper(default=1e-10, at_least=0, meaning="ε, avoids division by zero")

    s = slot("sum", starts="initial_accumulator_value", never_negative=True)

    @staticmethod
    def update(h: Adagrad, p: Number, g: Number, s: Adagrad, t: float) -> Number:
        s.s = s.s + g * g
        return -(h.lr / (1 + (t - 1) * h.lr_decay)) * g / (sqrt(s.s) + h.eps)
