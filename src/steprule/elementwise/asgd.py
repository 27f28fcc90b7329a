"""Averaged SGD."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, scalar_slot, slot
from steprule.words import Becomes, Number, becomes, larger, where


class ASGD(
    Elementwise,
    flags="foreach maximize differentiable capturable",
    positional="foreach maximize differentiable capturable",
):
    """SGD with a decreasing step that also averages the parameters, in the state `ax`.

    When: convex problems. Evaluate with `ax` after step t0.

        θ ← θ·(1 - λ·η) - η·g
        ax ← ax + μ·(θ - ax); ax ← θ while μ = 1
        η ← lr/(1 + λ·lr·t)^α       μ ← 1/max(1, t - t0)

    State: 1 value per element (ax), 2 per tensor (eta, mu).
    Source: Polyak, Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging",
    https://doi.org/10.1137/0330046; schedule: Bottou 2010, "Large-Scale Machine Learning with Stochastic
    Gradient Descent", https://leon.bottou.org/papers/bottou-2010
    """

    lr: float = hyper(default=1e-2, at_least=0, search=(3e-3, 3.0), meaning="the first step size")
    lambd: float = hyper(default=1e-4, at_least=0, meaning="λ, decay of θ and of the step size")
    alpha: float = hyper(default=0.75, meaning="α, power of the step size")
    t0: float = hyper(default=1e6, meaning="the step at which averaging starts")
    weight_decay: float | WeightDecay = decay(default=0)

    ax = slot("ax", not_in_8_bits="it holds the averaged weights")
    eta = scalar_slot("eta", starts="lr")
    mu = scalar_slot("mu", starts=1.0)

    @staticmethod
    def update(h: ASGD, p: Number, g: Number, s: ASGD, t: float) -> Becomes:
        p = p * (1 - h.lambd * s.eta) - s.eta * g
        s.ax = where(s.mu == 1, p, s.ax + (p - s.ax) * s.mu)
        s.eta = h.lr / ((1 + h.lambd * h.lr * t) ** h.alpha)
        s.mu = 1 / larger(t - h.t0, 1.0)
        return becomes(p)
