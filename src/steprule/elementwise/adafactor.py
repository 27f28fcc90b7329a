"""Adafactor."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import (
    Number,
    columns,
    epsilon,
    is_matrix,
    larger,
    lerp,
    mean,
    norm,
    rows,
    size,
    smaller,
    sqrt,
    where,
)


class Adafactor(Elementwise, flags="foreach maximize"):
    """Adam without momentum that keeps only row and column means of a matrix's second moments.

    When: memory is short. Keeps almost no state.

        1-β2ₜ = tᵈ (d = beta2_decay)       R ← β2ₜ·R + (1-β2ₜ)·rowmean(g²),  C likewise over columns
        V̂ = R·C/mean(R)  (a vector keeps V itself)         u = g / √max(V̂, ε₁²)
        α = max(ε₂, RMS(θ)) · min(lr, 1/√t)
        θ ← θ·(1 - lr·λ) - α · u / max(1, RMS(u)/d)

    State: rows + columns values per matrix (row_var, col_var), 1 per element of a vector (variance).
    Source: Shazeer, Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    algorithms 4 and 5, https://arxiv.org/abs/1804.04235, with torch's reading of lr.
    """

    matrices: ClassVar[str] = "stacked"
    sums_as_torch: ClassVar[bool] = True
    decays_first: ClassVar[bool] = False
    complex_error: ClassVar[type[Exception] | None] = RuntimeError

    lr: float = hyper(default=1e-2, at_least=0, search=(1e-3, 1.0), meaning="the largest relative step")
    beta2_decay: float = hyper(default=-0.8, at_most=0, meaning="power of t in 1-β2ₜ")
    eps: tuple[float | None, float] = hyper(
        default=(None, 1e-3), at_least=0, meaning="ε₁ (None: the dtype's epsilon), ε₂"
    )
    d: float = hyper(default=1.0, at_least=1, meaning="the largest RMS of u")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")

    row_var = slot("row_var", per="row", only="matrices")
    col_var = slot("col_var", per="column", only="matrices")
    variance = slot("variance", only="vectors", never_negative=True)

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: Adafactor, t: float) -> Number:
        eps1, eps2 = h.eps
        floor = epsilon(p) if eps1 is None else eps1
        weight, root = t**h.beta2_decay, sqrt(size(p))
        alpha = at_least(eps2, norm(p) / root) * smaller(h.lr, 1 / sqrt(t))
        if is_matrix(p):
            s.row_var = lerp(s.row_var, norm(g, over="row") ** 2 / columns(p), weight)
            s.col_var = lerp(s.col_var, norm(g, over="column") ** 2 / rows(p), weight)
            v = s.row_var * s.col_var / larger(mean(s.row_var, over="column"), floor)
        else:
            s.variance = v = lerp(s.variance, g * g, weight)
        u = larger(v, floor * floor) ** -0.5 * g
        return -(alpha / at_least(1.0, norm(u) / (root * h.d))) * u


def at_least(least: float, x: float) -> float:
    """The larger one; `least` where x is NaN, as in torch, so that one NaN does not spread."""
    return where(x > least, x, least)
