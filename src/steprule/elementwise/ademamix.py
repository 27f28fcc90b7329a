"""AdEMAMix."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, exp, log, smaller, sqrt


class AdEMAMix(Elementwise):
    """AdamW with a second, much slower momentum, which remembers gradients from thousands of steps ago.

    When: long runs of language models. For a run of T steps, set warmup to T, and α between 5 and 10.

        θ ← θ·(1 - lr·λ)
        m ← β1·m + (1-β1)·g         n ← β3·n + (1-β3)·g         v ← β2·v + (1-β2)·g²
        θ ← θ - lr·(m/(1-β1ᵗ) + α·n) / (√v/√(1-β2ᵗ) + ε)
        warmup: in its first T steps, with σ = t/T, α is σ·α, and β3 is the β whose 1/ln β is
        (1-σ)/ln β1 + σ/ln β3

    State: 3 values per element (exp_avg, exp_avg_slow, exp_avg_sq).
    Source: Pagliardini, Ablin, Grangier 2024, "The AdEMAMix Optimizer: Better, Faster, Older", algorithm 1 and
    §3, https://arxiv.org/abs/2409.03137, with the defaults of the authors' code
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float, float] = hyper(
        default=(0.9, 0.999, 0.9999), at_least=0, below=1, meaning="decay of m, of v, of n"
    )
    alpha: float = hyper(default=2.0, at_least=0, meaning="α, weight of the slow momentum n")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")
    warmup: int = hyper(default=0, at_least=0, switch=True, meaning="T, steps in which α and β3 rise; 0: none")

    m = slot("exp_avg")
    n = slot("exp_avg_slow", not_in_8_bits="rounding would add more to this slow average than there is in it")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: AdEMAMix, p: Number, g: Number, s: AdEMAMix, t: float) -> Number:
        beta1, beta2, beta3 = h.betas
        alpha, beta3 = warmed_up(h, t) if h.warmup else (h.alpha, beta3)
        s.m = ema(s.m, g, beta1)
        s.n = ema(s.n, g, beta3)
        s.v = ema_sq(s.v, g, beta2)
        mixed = s.m / (1 - beta1**t) + alpha * s.n
        return -h.lr * mixed / (sqrt(s.v) / sqrt(1 - beta2**t) + h.eps)


def warmed_up(h: AdEMAMix, t: float) -> tuple[Any, Any]:
    """α and β3 in step t. The time that n remembers grows linearly."""
    beta1, _, beta3 = h.betas
    done = smaller(t / h.warmup, 1.0)
    memory = (1 - done) / log(beta1) + done / log(beta3)
    return h.alpha * done, smaller(exp(1 / memory), beta3)
