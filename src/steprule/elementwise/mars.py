"""MARS."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, is_matrix, larger, norm, sqrt


class MARS(Elementwise):
    """AdamW on gradients that are corrected by how they changed since the last step.

    When: language models with large batches.

        c = g + γ·β1/(1-β1)·(g - g of the last step)       (0 before the first)
        c ← c / max(1, ‖c‖)                                 (norm of the tensor)
        m ← β1·m + (1-β1)·c         v ← β2·v + (1-β2)·c²
        θ ← θ·(1 - lr·λ) - lr · m/(1-β1ᵗ) / (√v/√(1-β2ᵗ) + ε)
        vectors: AdamW, with c = g, betas_1d, weight_decay_1d and lr · lr_1d_factor

    State: 2 values per element (exp_avg, exp_avg_sq), 1 more per element of a matrix (last_grad).
    Differs: from the authors' code in lr_1d_factor, where they give the lr of vectors itself.
    Source: Yuan, Liu, Wu, Zhou, Gu 2024, "MARS: Unleashing the Power of Variance Reduction for Training Large
    Models", algorithm 2, https://arxiv.org/abs/2411.10438, with the authors' vectors
    """

    lr: float = hyper(default=3e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.95, 0.99), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(
        default=0, mode="own", meaning="λ of matrices, shrinks them by lr·λ before the step"
    )
    gamma: float = hyper(default=0.025, at_least=0, meaning="γ, how much of the change of g is added")
    lr_1d_factor: float = hyper(default=1.0, at_least=0, meaning="lr of vectors, as a multiple of lr")
    betas_1d: tuple[float, float] = hyper(
        default=(0.9, 0.95), at_least=0, below=1, meaning="decay of m, of v for vectors"
    )
    weight_decay_1d: float = hyper(
        default=0.1, at_least=0, meaning="λ of vectors, which they have besides any other decay"
    )

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)
    g_last = slot("last_grad", only="matrices", not_in_8_bits="a small change of the gradient would be lost")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: MARS, t: float) -> Number:
        if is_matrix(p):
            beta1, beta2 = h.betas
            lr, strength = h.lr, h.weight_decay
            c = g + (h.gamma * (beta1 / (1 - beta1))) * (g - s.g_last)
            s.g_last = g
            c = c / larger(1.0, norm(c))
        else:
            beta1, beta2 = h.betas_1d
            lr, strength = h.lr * h.lr_1d_factor, h.weight_decay_1d
            c = g
        s.m = ema(s.m, c, beta1)
        s.v = ema_sq(s.v, c, beta2)
        u = s.m / (1 - beta1**t) / (sqrt(s.v) / sqrt(1 - beta2**t) + h.eps)
        return -lr * (u + strength * p)
