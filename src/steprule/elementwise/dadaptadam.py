"""DAdaptAdam."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema_sq, larger, smaller, sqrt, total, where


class DAdaptAdam(Elementwise):
    """Adam that finds its own learning rate: d, a lower bound of the distance from the start to a solution.

    When: you do not want to tune lr, and Prodigy, its successor, comes to steps that are too large. Leave lr
    at 1, with or without a schedule.

        η = d·lr                                                (the old d)
        r ← √β2·r + (1-√β2)·η·⟨g, s/(√v + ε)⟩                   (the old s and v; sums over all parameters)
        m ← β1·m + (1-β1)·η·g       v ← β2·v + (1-β2)·g²        s ← √β2·s + (1-√β2)·η·g
        d ← max(d, r/((1-√β2)·‖s‖₁))
        θ ← θ·(1 - η·λ) - m/(√v + ε)
        use_bias_correction: η = d·lr·√(1-β2ᵏ)/(1-β1ᵏ)
        growth_rate: d grows to at most growth_rate·d in a step

    State: 3 values per element (exp_avg, exp_avg_sq, s), and d for all parameters, in the groups.
    Differs: a number given as weight_decay is what the authors' dadaptation does with decouple=True; what it
    does without is WeightDecay(λ, weight_decouple=False) here. Optax has another form of the rule.
    Source: Defazio, Mishchenko 2023, "Learning-Rate-Free Learning by D-Adaptation", algorithm 5,
    https://arxiv.org/abs/2301.07733, with the options of the authors' dadaptation. All groups have one d, so
    they need the same lr.
    """

    lr: float = hyper(
        default=1.0, at_least=0, search=(0.3, 3.0), meaning="scales the step that is found; 1, times a schedule"
    )
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, above=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(
        default=0,
        mode="own",
        not_decoupled="lr is 1 and not the step size, so λ would be the share that is lost in every step.",
        meaning="λ, shrinks the parameter by d·lr·λ",
    )
    use_bias_correction: bool = hyper(default=False, meaning="correct m and v as Adam does")
    d0: float = hyper(default=1e-6, above=0, meaning="the first d; smaller than any good one")
    growth_rate: float = hyper(
        default=0.0, at_least=0, switch=True, meaning="how many times larger d may get in a step; 0: no limit"
    )

    d = slot("d", per="all", starts="d0")
    r = slot("numerator_weighted", per="all")
    k = slot("k", per="all")
    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)
    s = slot("s")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: DAdaptAdam, t: float) -> tuple[Number, Number]:
        beta1, beta2 = h.betas
        beta3, d, eta = sqrt(beta2), s.d, s.d * h.lr
        s.k = s.k + 1
        if h.use_bias_correction:
            eta = eta * sqrt(1 - beta2**s.k) / (1 - beta1**s.k)
        s.r = beta3 * s.r + (1 - beta3) * eta * total(g * s.s / (sqrt(s.v) + h.eps), over="all")
        s.m = beta1 * s.m + (eta * (1 - beta1)) * g
        s.v = ema_sq(s.v, g, beta2)
        s.s = beta3 * s.s + (eta * (1 - beta3)) * g
        size = (1 - beta3) * total(abs(s.s), over="all")
        found = where(size > 0, s.r / size, 0.0)
        s.d = larger(d, smaller(found, d * h.growth_rate) if h.growth_rate else found)
        # 0 - x, so that a decay of 0 adds nothing: not even to -0.0.
        return (0 - eta * h.weight_decay) * p, -s.m / (sqrt(s.v) + h.eps)
