"""AdamP and SGDP."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import (
    Number,
    columns,
    ema,
    ema_sq,
    is_matrix,
    larger,
    largest,
    norm,
    size,
    sqrt,
    total,
    where,
)


class AdamP(Elementwise):
    """Adam without the part of the step that only makes scale-invariant weights longer.

    When: networks with normalization after most layers, whose weights grow under momentum so that the effective
    step shrinks.

        m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²
        u = m/(1-β1ᵗ) / (√v/√(1-β2ᵗ) + ε)
        if max |cos(gᵢ, θᵢ)| < δ/√columns over the rows i:   uᵢ ← uᵢ - ⟨uᵢ, θᵢ⟩·θᵢ/‖θᵢ‖²,   λ ← λ·wd_ratio
        else if |cos(g, θ)| < δ/√size:                       u ← u - ⟨u, θ⟩·θ/‖θ‖²,         λ ← λ·wd_ratio
        θ ← θ·(1 - lr·λ) - lr·u                             vectors are not projected

    State: 2 values per element (exp_avg, exp_avg_sq).
    Source: Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha 2021, "AdamP: Slowing Down the Slowdown for Momentum Optimizers
    on Scale-invariant Weights", algorithm 2, https://arxiv.org/abs/2006.08217, with the authors' tests of rows
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero, in u and in norms")
    weight_decay: float | WeightDecay = decay(
        default=0, mode="own", meaning="λ, shrinks the parameter by lr·λ, or by less where u is projected"
    )
    delta: float = hyper(default=0.1, at_least=0, meaning="δ, up to which cosine weights are scale-invariant")
    wd_ratio: float = hyper(default=0.1, at_least=0, meaning="what is left of λ where u is projected")
    nesterov: bool = hyper(default=False, meaning="look ahead along the momentum")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: AdamP, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        s.v = ema_sq(s.v, g, beta2)
        ahead = ema(s.m, g, beta1) if h.nesterov else s.m
        u = ahead / (sqrt(s.v) / sqrt(1 - beta2**t) + h.eps)
        u, ratio = projected(h, p, g, u)
        return -h.lr * (u / (1 - beta1**t) + (h.weight_decay * ratio) * p)


class SGDP(Elementwise):
    """SGD with momentum without the part of the step that only makes scale-invariant weights longer.

    When: SGD on networks with normalization after most layers, such as ResNets.

        b ← μ·b + (1-dampening)·g                u = b, or g + μ·b with Nesterov
        u is projected and λ reduced as in AdamP
        θ ← θ·(1 - lr·λ/(1-μ)) - lr·u

    State: 1 value per element (momentum_buffer).
    Differs: from the authors' code, which projects b itself, too, and in which μ is 0 unless it is given.
    Source: Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha 2021, "AdamP: Slowing Down the Slowdown for Momentum Optimizers
    on Scale-invariant Weights", algorithm 1, https://arxiv.org/abs/2006.08217
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(3e-3, 3.0), meaning="step size")
    momentum: float = hyper(default=0.9, at_least=0, below=1, meaning="μ, decay of b")
    dampening: float = hyper(default=0.0, meaning="how much less of g goes into b")
    weight_decay: float | WeightDecay = decay(
        default=0, mode="own", meaning="λ, shrinks the parameter by lr·λ/(1-μ), or by less where u is projected"
    )
    nesterov: bool = hyper(default=False, meaning="look ahead along the momentum")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero in norms")
    delta: float = hyper(default=0.1, at_least=0, meaning="δ, up to which cosine weights are scale-invariant")
    wd_ratio: float = hyper(default=0.1, at_least=0, meaning="what is left of λ where u is projected")

    b = slot("momentum_buffer")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: SGDP, t: float) -> Number:
        s.b = h.momentum * s.b + (1 - h.dampening) * g
        u, ratio = projected(h, p, g, g + h.momentum * s.b if h.nesterov else s.b)
        return -h.lr * (u + (h.weight_decay / (1 - h.momentum) * ratio) * p)


def projected(h: Any, p: Number, g: Number, u: Number) -> tuple[Number, float]:
    """U without its part along θ where g is nearly orthogonal to θ, and the factor of the weight decay."""
    if not is_matrix(p):
        return u, 1.0
    length, lengths = norm(p) + h.eps, norm(p, over="row") + h.eps
    cosine = abs(total(g * p)) / (norm(g) + h.eps) / length
    cosines = abs(total(g * p, over="row")) / (norm(g, over="row") + h.eps) / lengths
    by_row = largest(cosines, over="column") < h.delta / sqrt(columns(p))
    whole = cosine < h.delta / sqrt(size(p))
    rows_projected = u - total(u * p, over="row") / (lengths * lengths) * p
    projection = u - total(u * p) / (length * length) * p
    kept = where(by_row, rows_projected, where(whole, projection, u))
    return kept, where(larger(by_row, whole), h.wd_ratio, 1.0)
