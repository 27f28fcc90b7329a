"""LAMB."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, norm, sqrt, where


class LAMB(Elementwise):
    """AdamW whose step is, in every tensor, in proportion to the norm of the tensor.

    When: batches of thousands of examples and more, as in the pre-training of BERT.

        m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²
        u = m/(1-β1ᵗ) / (√v/√(1-β2ᵗ) + ε) + λ·θ
        θ ← θ - lr·‖θ‖/‖u‖ · u                      (norms of the tensor; the ratio is 1 where either is 0)

    State: 2 values per element (exp_avg, exp_avg_sq).
    Differs: from timm and NVIDIA, which also clip the gradients of all parameters to a norm of 1, and timm,
    which leaves the ratio out where λ is 0.
    Source: You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh 2020, "Large Batch
    Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2, https://arxiv.org/abs/1904.00962
    """

    lr: float = hyper(
        default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size, as a share of the tensor's norm"
    )
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-6, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(
        default=1e-2, mode="own", meaning="λ, added to u before its norm is taken"
    )

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: LAMB, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        s.v = ema_sq(s.v, g, beta2)
        adam = s.m / (1 - beta1**t) / (sqrt(s.v) / sqrt(1 - beta2**t) + h.eps)
        u = adam + h.weight_decay * p
        return -h.lr * trust_ratio(norm(p), norm(u)) * u


def trust_ratio(size: float, step: float) -> float:
    """size/step, but 1 where either is 0."""
    return where(size * step > 0, size / step, 1.0)
