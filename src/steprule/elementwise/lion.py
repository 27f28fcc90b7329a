"""Lion."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, sign


class Lion(Elementwise):
    """The sign of an interpolated momentum: every element moves by exactly lr.

    When: large batches and large models. Use an lr 3 to 10 times smaller than AdamW's, and a
    decay that much larger.

        θ ← θ·(1 - lr·λ)
        θ ← θ - lr·sign(β1·m + (1-β1)·g)
        m ← β2·m + (1-β2)·g

    State: 1 value per element (exp_avg).
    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2,
    https://arxiv.org/abs/2302.06675
    """

    lr: float = hyper(default=1e-4, at_least=0, search=(1e-5, 1e-2), meaning="how far every element moves")
    betas: tuple[float, float] = hyper(
        default=(0.9, 0.99), at_least=0, below=1, meaning="weight of m in the step, decay of m"
    )
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")

    m = slot("exp_avg")

    @staticmethod
    def update(h: Lion, p: Number, g: Number, s: Lion, t: float) -> Number:
        beta1, beta2 = h.betas
        change = -h.lr * sign(ema(s.m, g, beta1))
        s.m = ema(s.m, g, beta2)
        return change
