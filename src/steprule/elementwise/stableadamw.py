"""StableAdamW."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, larger, mean, sqrt


class StableAdamW(Elementwise):
    """AdamW that takes a smaller step in a tensor whose gradients are larger than v expects.

    When: the loss of AdamW has spikes, as in CLIP-like models. It takes the place of clipping the gradients.

        β̂ = (βᵗ - β)/(βᵗ - 1), for β1 and for β2
        m ← β̂1·m + (1-β̂1)·g        v ← β̂2·v + (1-β̂2)·g²
        η = lr/max(1, RMS(g/max(√v, ε)))            (root mean square over the tensor)
        θ ← θ·(1 - η·λ) - η·m/(√v + ε)

    State: 2 values per element (exp_avg, exp_avg_sq).
    Differs: from AdamW with a clipped update, because the decay is by the smaller η too.
    Source: Wortsman, Dettmers, Zettlemoyer, Morcos, Farhadi, Schmidt 2023, "Stable and low-precision training
    for large-scale vision-language models", algorithm 2, https://arxiv.org/abs/2304.13013
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="the largest step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.99), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-6, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(
        default=1e-2, mode="own", meaning="λ, shrinks the parameter by η·λ"
    )

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: StableAdamW, t: float) -> tuple[Number, Number]:
        beta1, beta2 = (corrected(beta, t) for beta in h.betas)
        s.m = ema(s.m, g, beta1)
        s.v = ema_sq(s.v, g, beta2)
        surprise = g / larger(sqrt(s.v), h.eps)
        eta = h.lr / larger(1.0, sqrt(mean(surprise * surprise)))
        # 0 - x, so that a decay of 0 adds nothing: not even to -0.0.
        return (0 - eta * h.weight_decay) * p, -eta * s.m / (sqrt(s.v) + h.eps)


def corrected(beta: float, t: float) -> float:
    """The β̂ with which an average needs no other correction of its bias."""
    return (beta**t - beta) / (beta**t - 1)
