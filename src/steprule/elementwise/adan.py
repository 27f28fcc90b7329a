"""Adan."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, sqrt, where


class Adan(Elementwise):
    """Adam with Nesterov momentum from the change of the gradient since the last step.

    When: vision transformers and large batches; it takes larger learning rates than AdamW.

        δ = g - g of the last step                  (0 in the first step)
        m ← β1·m + (1-β1)·g         w ← β2·w + (1-β2)·δ         n ← β3·n + (1-β3)·(g + β2·δ)²
        u = (m/(1-β1ᵗ) + β2·w/(1-β2ᵗ)) / (√n/√(1-β3ᵗ) + ε)
        θ ← (θ - lr·u)/(1 + lr·λ)

    State: 4 values per element (exp_avg, exp_avg_diff, exp_avg_sq, prev).
    Differs: from the paper and from optax in betas, which say here, as in the authors' code, how much is kept;
    the authors' no_prox=True is WeightDecay(λ) here.
    Source: Xie, Zhou, Li, Lin, Yan 2022, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep
    Models", algorithm 1, https://arxiv.org/abs/2208.06677, with the authors' bias corrections
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float, float] = hyper(
        default=(0.98, 0.92, 0.99), at_least=0, below=1, meaning="decay of m, of w, of n"
    )
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(
        default=0, mode="own", meaning="λ, divides the parameter by 1 + lr·λ after the step"
    )

    m = slot("exp_avg")
    w = slot("exp_avg_diff")
    n = slot("exp_avg_sq", never_negative=True)
    g_last = slot("prev", not_in_8_bits="a small change of the gradient would be lost")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: Adan, t: float) -> Number:
        beta1, beta2, beta3 = h.betas
        change = where(t == 1, 0.0, g - s.g_last)
        s.m = ema(s.m, g, beta1)
        s.w = ema(s.w, change, beta2)
        s.n = ema_sq(s.n, g + beta2 * change, beta3)
        s.g_last = g
        ahead = s.m / (1 - beta1**t) + (beta2 / (1 - beta2**t)) * s.w
        u = ahead / (sqrt(s.n) / sqrt(1 - beta3**t) + h.eps)
        # What the division by 1 + lr·λ comes to, as a change.
        return -(h.lr / (1 + h.lr * h.weight_decay)) * (u + h.weight_decay * p)
