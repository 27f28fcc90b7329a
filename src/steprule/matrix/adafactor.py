"""Adafactor."""

from __future__ import annotations

import torch

from steprule.declare import Matrix, WeightDecay, decay, hyper, slot
from steprule.matrix.words import inverse_root, mean_square, rank_one, rms
from steprule.words import Number, lerp


def _rows(shape: torch.Size) -> tuple[int, ...] | None:
    return (*shape[:-1], 1) if len(shape) > 1 else None


def _columns(shape: torch.Size) -> tuple[int, ...] | None:
    return (*shape[:-2], 1, shape[-1]) if len(shape) > 1 else None


def _vector(shape: torch.Size) -> tuple[int, ...] | None:
    return None if len(shape) > 1 else tuple(shape)


class Adafactor(Matrix, flags="foreach maximize"):
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

    decays_first = False
    complex_error = RuntimeError

    lr: float = hyper(default=1e-2, at_least=0, meaning="the largest relative step")
    beta2_decay: float = hyper(default=-0.8, at_most=0, meaning="power of t in 1-β2ₜ")
    eps: tuple[float | None, float] = hyper(
        default=(None, 1e-3), at_least=0, meaning="ε₁ (None: the dtype's epsilon), ε₂"
    )
    d: float = hyper(default=1.0, at_least=1, meaning="the largest RMS of u")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")

    row_var = slot("row_var", shape=_rows)
    col_var = slot("col_var", shape=_columns)
    variance = slot("variance", shape=_vector)

    @staticmethod
    def update(h: Adafactor, p: Number, g: Number, s: Adafactor, t: float) -> Number:
        eps1, eps2 = h.eps
        floor = torch.finfo(p.handle.dtype).eps if eps1 is None else eps1
        weight = t**h.beta2_decay
        alpha = max(eps2, rms(p)) * min(h.lr, 1 / t**0.5)
        if p.handle.dim() > 1:
            s.row_var = lerp(s.row_var, mean_square(g, -1), weight)
            s.col_var = lerp(s.col_var, mean_square(g, -2), weight)
            v = rank_one(s.row_var, s.col_var, floor)
        else:
            s.variance = v = lerp(s.variance, g * g, weight)
        u = inverse_root(v, floor * floor) * g
        return -(alpha / max(1.0, rms(u) / h.d)) * u
