"""SophiaH."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, clamp, ema, larger


class SophiaH(Elementwise):
    """Sophia with Hutchinson's estimate of the curvature, which needs no labels sampled from the model.

    When: as Sophia, and for losses without classes, too. Before the first step and then about every ten steps,
    call `update_hessian(steprule.hutchinson(loss, params))`. Until its first call every element moves by lr.

        m ← β1·m + (1-β1)·g         h ← β2·h + (1-β2)·D    in update_hessian, D = z⊙Hz
        θ ← θ·(1 - lr·λ)
        θ ← θ - lr · clip(m/max(ρ·h, ε), -1, 1)

    State: 2 values per element (exp_avg, hessian).
    Differs: where other implementations clip m/max(h, ε) at ±ρ, their lr is this lr divided by ρ.
    Source: Liu, Li, Hall, Liang, Ma 2023, "Sophia: A Scalable Stochastic Second-order Optimizer",
    algorithm 3 with the Hutchinson estimator, https://arxiv.org/abs/2305.14342; ρ is its γ
    """

    lr: float = hyper(
        default=6e-4, at_least=0, search=(3e-5, 3e-2), meaning="the largest change of any element"
    )
    betas: tuple[float, float] = hyper(default=(0.96, 0.99), at_least=0, below=1, meaning="decay of m, of h")
    eps: float = hyper(default=1e-12, at_least=0, meaning="ε, avoids division by zero")
    rho: float = hyper(default=0.01, above=0, meaning="ρ; the smaller, the more elements are clipped")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")

    m = slot("exp_avg")
    h = slot("hessian")

    @staticmethod
    def update(h: SophiaH, p: Number, g: Number, s: SophiaH, t: float) -> Number:
        s.m = ema(s.m, g, h.betas[0])
        return -h.lr * clamp(s.m / larger(h.rho * s.h, h.eps), -1.0, 1.0)

    @staticmethod
    def estimate(h: SophiaH, p: Number, d: Number, s: SophiaH, t: float) -> None:
        s.h = ema(s.h, d, h.betas[1])
