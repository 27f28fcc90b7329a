"""NAdamW."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, sqrt


class NAdamW(Elementwise):
    """AdamW that looks one step ahead along its momentum.

    When: wherever you would use AdamW; it is the baseline of the AlgoPerf benchmark.

        θ ← θ·(1 - lr·λ)
        m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²
        θ ← θ - lr/(1-β1ᵗ) · (β1·m + (1-β1)·g) / (√v/√(1-β2ᵗ) + ε)

    State: 2 values per element (exp_avg, exp_avg_sq).
    Differs: from NAdam, whose momentum warms up, and from optax, which divides β1·m by 1-β1^(t+1).
    Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam", algorithm 2, with a constant momentum,
    https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, and the decay of Loshchilov, Hutter 2019
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=1e-2, mode="decoupled")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: NAdamW, p: Number, g: Number, s: NAdamW, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        s.v = ema_sq(s.v, g, beta2)
        ahead = ema(s.m, g, beta1)
        return -(h.lr / (1 - beta1**t)) * ahead / (sqrt(s.v) / sqrt(1 - beta2**t) + h.eps)
