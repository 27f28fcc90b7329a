"""CAME."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, is_matrix, larger, mean, sqrt


class CAME(Elementwise):
    """Adafactor with momentum that trusts its momentum less where the updates disagree with it.

    When: diffusion and language models whose optimizer state must be small. Keeps 1 value per element; Adam
    keeps 2. Use an lr of about a tenth of AdamW's.

        R ← β2·R + (1-β2)·(rowmean(g²) + ε₁),   C likewise over columns       u = g / √(R·C/mean(R))
        u ← u / max(1, RMS(u)/clip)             m ← β1·m + (1-β1)·u
        Rᵣ ← β3·Rᵣ + (1-β3)·(rowmean((u-m)²) + ε₂),   Cᵣ likewise over columns
        θ ← θ·(1 - lr·λ) - lr · m / √(Rᵣ·Cᵣ/mean(Rᵣ))
        vectors:  v ← β2·v + (1-β2)·(g² + ε₁)   u = g/√v, clipped and averaged to m;  θ ← θ·(1 - lr·λ) - lr·m

    State: 1 value per element (exp_avg), 2 · (rows + columns) values per matrix (exp_avg_sq_row,
    exp_avg_sq_col, exp_avg_res_row, exp_avg_res_col), 1 more per element of a vector (exp_avg_sq). Rows and
    columns are those of the last two dimensions.
    Source: Luo, Ren, Zheng, Jiang, Jiang, You 2023, "CAME: Confidence-guided Adaptive Memory Efficient
    Optimization", algorithm 2, https://arxiv.org/abs/2307.02047, with the authors' clipping and vectors
    """

    matrices: ClassVar[str] = "stacked"
    complex_error: ClassVar[type[Exception] | None] = RuntimeError

    lr: float = hyper(default=2e-4, at_least=0, search=(3e-5, 3e-2), meaning="step size")
    betas: tuple[float, float, float] = hyper(
        default=(0.9, 0.999, 0.9999), at_least=0, below=1, meaning="decay of m, of R and C, of Rᵣ and Cᵣ"
    )
    eps: tuple[float, float] = hyper(
        default=(1e-30, 1e-16), at_least=0, meaning="ε₁, ε₂, avoid division by zero"
    )
    clip_threshold: float = hyper(default=1.0, above=0, meaning="clip, the largest RMS of u")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", only="vectors", never_negative=True)
    r = slot("exp_avg_sq_row", per="row", only="matrices", never_negative=True)
    c = slot("exp_avg_sq_col", per="column", only="matrices", never_negative=True)
    r_res = slot("exp_avg_res_row", per="row", only="matrices", never_negative=True)
    c_res = slot("exp_avg_res_col", per="column", only="matrices", never_negative=True)

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: CAME, t: float) -> Number:
        beta1, beta2, beta3 = h.betas
        eps1, eps2 = h.eps
        if not is_matrix(p):
            s.v = ema(s.v, g * g + eps1, beta2)
            s.m = ema(s.m, clipped(g / sqrt(s.v), h.clip_threshold), beta1)
            return -h.lr * s.m
        s.r = ema(s.r, mean(g * g, over="row") + eps1, beta2)
        s.c = ema(s.c, mean(g * g, over="column") + eps1, beta2)
        u = clipped(divided(g, s.r, s.c), h.clip_threshold)
        s.m = ema(s.m, u, beta1)
        disagreement = (u - s.m) * (u - s.m)
        s.r_res = ema(s.r_res, mean(disagreement, over="row") + eps2, beta3)
        s.c_res = ema(s.c_res, mean(disagreement, over="column") + eps2, beta3)
        return -h.lr * divided(s.m, s.r_res, s.c_res)


def divided(x: Number, r: Any, c: Any) -> Number:
    """x / √(R·C/mean(R)): by the root of the matrix with these row and column means."""
    return x * (r / mean(r, over="column")) ** -0.5 * c**-0.5


def clipped(u: Number, most: float) -> Number:
    """U with a root mean square of `most` at most."""
    return u / larger(1.0, sqrt(mean(u * u)) / most)
