"""Prodigy."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, parameter, slot
from steprule.words import Number, larger, smaller, sqrt, total, where


class Prodigy(Elementwise):
    """AdamW that finds its own learning rate: d, an estimate of the distance from the start to a solution.

    When: you do not want to tune lr. Leave lr at 1, with or without a schedule; fine-tuning of diffusion
    models is its usual place. d_coef makes the estimate bolder or more careful.

        η = d·lr                                                (the old d, in all lines but the last two)
        m ← β1·m + (1-β1)·d·g       v ← β2·v + (1-β2)·d²·g²
        r ← β3·r + d/d0·η·⟨g, θ0 - θ⟩       s ← β3·s + d/d0·η·g         β3 = √β2
        d ← max(d, d_coef·r/‖s‖₁)                               (sums over all parameters)
        θ ← θ·(1 - η·λ) - η · m/(√v + d·ε)                      (the new d beside ε)
        use_bias_correction: η = d·lr·√(1-β2ᵏ)/(1-β1ᵏ)
        safeguard_warmup: s ← β3·s + d²/d0·g
        growth_rate: d grows to at most growth_rate·d in a step, after the first step away from d0

    State: 4 values per element (exp_avg, exp_avg_sq, s, p0), and d for all parameters, in the groups.
    Source: Mishchenko, Defazio 2024, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner",
    algorithm 4, https://arxiv.org/abs/2306.06101, with the options, the defaults and the order of steps of the
    authors' prodigyopt. All groups have one d, so they need the same lr.
    """

    lr: float = hyper(
        default=1.0, at_least=0, search=(0.3, 3.0), meaning="scales the step that is found; 1, times a schedule"
    )
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(
        default=0,
        mode="own",
        not_decoupled="lr is 1 and not the step size, so λ would be the share that is lost in every step.",
        meaning="λ, shrinks the parameter by d·lr·λ",
    )
    use_bias_correction: bool = hyper(default=False, meaning="correct m and v as Adam does")
    safeguard_warmup: bool = hyper(default=False, meaning="leave lr out of s, for a schedule that warms up")
    d0: float = hyper(default=1e-6, above=0, meaning="the first d; smaller than any good one")
    d_coef: float = hyper(default=1.0, above=0, meaning="scales the estimate of d")
    growth_rate: float = hyper(
        default=0.0, at_least=0, switch=True, meaning="how many times larger d may get in a step; 0: no limit"
    )

    d = slot("d", per="all", starts="d0")
    d_max = slot("d_max", per="all", starts="d0")
    r = slot("d_numerator", per="all")
    k = slot("k", per="all")
    start = slot("p0", starts=parameter)
    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)
    s = slot("s")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: Prodigy, t: float) -> tuple[Number, Number]:
        beta1, beta2 = h.betas
        beta3, d, eta = sqrt(beta2), s.d, s.d * h.lr
        s.k = s.k + 1
        if h.use_bias_correction:
            eta = eta * sqrt(1 - beta2**s.k) / (1 - beta1**s.k)
        s.m = beta1 * s.m + (d * (1 - beta1)) * g
        s.v = beta2 * s.v + (d * d * (1 - beta2)) * g * g
        s.s = beta3 * s.s + (d / h.d0 * (d if h.safeguard_warmup else eta)) * g
        s.r = beta3 * s.r + d / h.d0 * eta * total(g * (s.start - p), over="all")
        size = total(abs(s.s), over="all")
        found = where(size > 0, h.d_coef * s.r / size, 0.0)
        s.d_max = larger(s.d_max, found)
        grown = where(d == h.d0, larger(d, found), d) * h.growth_rate
        s.d = smaller(s.d_max, grown) if h.growth_rate else s.d_max
        # 0 - x, so that a decay of 0 adds nothing: not even to -0.0.
        return (0 - eta * h.weight_decay) * p, -eta * s.m / (sqrt(s.v) + s.d * h.eps)
