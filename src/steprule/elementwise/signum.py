"""Signum, and SignSGD."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, sign


class Signum(Elementwise):
    """The sign of the momentum: every element moves by exactly lr.

    When: large batches, and where memory or communication is short. Use an lr 3 to 10 times smaller than
    AdamW's. momentum=0 is SignSGD; momentum=0.965 is Tiger.

        θ ← θ·(1 - lr·λ)
        m ← μ·m + (1-μ)·g
        θ ← θ - lr·sign(m)                          (momentum=0: sign(g))

    State: 1 value per element (exp_avg), none with momentum=0.
    Source: Bernstein, Wang, Azizzadenesheli, Anandkumar 2018, "signSGD: Compressed Optimisation for Non-Convex
    Problems", algorithm 2, https://arxiv.org/abs/1802.04434
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-5, 1e-2), meaning="how far every element moves")
    momentum: float = hyper(default=0.9, at_least=0, below=1, switch=True, meaning="μ, decay of m")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")

    m = slot("exp_avg", when="momentum")

    @staticmethod
    def update(h: Signum, p: Number, g: Number, s: Signum, t: float) -> Number:
        if not h.momentum:
            return -h.lr * sign(g)
        s.m = ema(s.m, g, h.momentum)
        return -h.lr * sign(s.m)
