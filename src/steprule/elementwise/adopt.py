"""ADOPT."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, clamp, ema, ema_sq, larger, sqrt, where


class ADOPT(Elementwise):
    """Adam that divides by the v of the step before, and only then averages: it converges for any β2.

    When: Adam is unstable and you do not want to tune β2. The first step only measures the gradient.

        t = 1:  v ← g²
        t > 1:  u = clip(g/max(√v, ε), ±(t-1)^c)        c = ¼
                m ← β1·m + (1-β1)·u
                θ ← θ·(1 - lr·λ) - lr·m
                v ← β2·v + (1-β2)·g²

    State: 2 values per element (exp_avg, exp_avg_sq).
    Differs: from the authors' code, whose decay is L2 unless told otherwise, as
    WeightDecay(λ, weight_decouple=False) is here; and from timm's `adopt`, which has c = ⅓.
    Source: Taniguchi, Harada, Minegishi, Oshima, Jeong, Nagahara, Iiyama, Suzuki, Iwasawa, Matsuo 2024, "ADOPT:
    Modified Adam Can Converge with Any β2 with the Optimal Rate", algorithm 2,
    https://arxiv.org/abs/2411.02853
    """

    first_step_moves: ClassVar[bool] = False

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.9999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-6, above=0, meaning="ε, the smallest divisor")
    weight_decay: float | WeightDecay = decay(
        default=0, mode="own", meaning="λ, shrinks the parameter by lr·λ in every step but the first"
    )
    clip_exp: float = hyper(default=0.25, above=0, meaning="c, how fast the clipping of u loosens")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: ADOPT, t: float) -> tuple[Number, Number]:
        beta1, beta2 = h.betas
        # 0 in the first step, so that nothing moves.
        clip = (t - 1) ** h.clip_exp
        s.m = ema(s.m, clamp(g / larger(sqrt(s.v), h.eps), -clip, clip), beta1)
        s.v = where(t == 1, g * g, ema_sq(s.v, g, beta2))
        # 0 - x, so that a decay of 0 adds nothing: not even to -0.0.
        return where(t == 1, 0.0, 0 - h.lr * h.weight_decay) * p, -h.lr * s.m
