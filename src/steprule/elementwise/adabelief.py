"""AdaBelief."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.elementwise.radam import rectification
from steprule.words import Number, ema, ema_sq, larger, sqrt, where


class AdaBelief(Elementwise):
    """Adam that divides by the spread of the gradients around their mean: larger steps where gradients agree.

    When: Adam generalizes worse than SGD, or there is little data and few epochs.

        m ← β1·m + (1-β1)·g         s ← β2·s + (1-β2)·(g - m)²
        ρₜ ≥ 5:  θ ← θ - lr·rₜ·√(1-β2ᵗ)/(1-β1ᵗ) · m / (√(s + ε) + ε)         with RAdam's ρₜ and rₜ
        else:    θ ← θ - lr/(1-β1ᵗ) · m, or no change with degenerate_to_sgd=False
                 (the first five steps, with β2 = 0.999)
        rectify=False: always the first, with rₜ = 1
        optimized_update=False: θ ← θ - lr·rₜ/(1-β1ᵗ) · m / (√(s + ε)/√(1-β2ᵗ) + ε)
        eps_in_state: s ← β2·s + (1-β2)·(g - m)² + ε, and √s for √(s + ε) (the paper)
        amsgrad: uses the largest s so far in place of s

    State: 2 values per element (exp_avg, exp_avg_var); 3 with amsgrad (max_exp_avg_var).
    Differs: from labml's code, whose defaults arrive as amsgrad=True, degenerate_to_sgd=False and
    optimized_update=False; and from the authors' and timm's, which have eps_in_state=True.
    Source: Zhuang, Tang, Ding, Tatikonda, Dvornek, Papademetris, Duncan 2020, "AdaBelief Optimizer",
    algorithm 2, https://arxiv.org/abs/2010.07468; options and defaults as labml documents them. A number given
    as weight_decay is decoupled.
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(3e-4, 3e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of s")
    eps: float = hyper(default=1e-16, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")
    amsgrad: bool = hyper(default=False, meaning="divide by the largest s so far")
    degenerate_to_sgd: bool = hyper(default=True, meaning="use m̂ alone while ρₜ is below 5")
    rectify: bool = hyper(default=True, meaning="rectify s as RAdam rectifies v")
    optimized_update: bool = hyper(default=True, kw_only=True, meaning="add ε before correcting the bias of s")
    eps_in_state: bool = hyper(default=False, kw_only=True, meaning="add ε to s at every step, as in the paper")

    m = slot("exp_avg")
    s = slot("exp_avg_var", never_negative=True)
    s_max = slot("max_exp_avg_var", when="amsgrad", never_negative=True)

    @staticmethod
    def update(h: AdaBelief, p: Number, g: Number, s: AdaBelief, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        root = sqrt(spread(h, g, s))
        if not h.rectify:
            return step(h, h.lr, s.m, root, t)
        rho, r = rectification(beta2, t)
        adaptive = step(h, h.lr * r, s.m, root, t)
        young = -(h.lr / (1 - beta1**t)) * s.m if h.degenerate_to_sgd else 0.0
        return where(rho >= 5, adaptive, young)


def spread(h: AdaBelief, g: Number, s: AdaBelief) -> Number:
    """s + ε, where s may be the largest so far, and may keep the ε."""
    _, beta2 = h.betas
    belief = ema_sq(s.s, g - s.m, beta2)
    s.s = belief = belief + h.eps if h.eps_in_state else belief
    if h.amsgrad:
        s.s_max = belief = larger(s.s_max, belief)
    return belief if h.eps_in_state else belief + h.eps


def step(h: AdaBelief, lr: float, m: Number, root: Number, t: float) -> Number:
    """Adam's step, with ε added before or after the bias of s is corrected."""
    beta1, beta2 = h.betas
    size, correction = lr / (1 - beta1**t), sqrt(1 - beta2**t)
    if h.optimized_update:
        return -(size * correction) * m / (root + h.eps)
    return -size * m / (root / correction + h.eps)
