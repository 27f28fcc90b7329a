"""Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from steprule.declare import Matrix, WeightDecay, decay, errors, hyper, slot
from steprule.matrix.words import METHODS, Method, orthogonalize
from steprule.words import Number, columns, ema, larger, lerp, rows, sqrt


class Muon(Matrix, flags=""):
    """Momentum in which every singular direction gets the same length.

    When: the hidden matrices of transformers. Use AdamW for embeddings, heads, biases and norms.

        M ← μ·M + (1-μ)·G           U = (1-μ)·G + μ·M with Nesterov, else M
        θ ← θ·(1 - lr·λ) - lr·s·orthogonalize(U)
        s = √max(1, rows/columns), or with adjust_lr_fn:
            "match_rms_adamw"     0.2·√max(rows, columns)
            "spectral_unclamped"  √(rows/columns)
        orthogonalize(U) is, by method:
            "newton_schulz"       near UVᵀ of U = USVᵀ
            "polar_express"       nearer to it, in as many steps and the same time
            "exact"               UVᵀ, many times slower

    State: 1 value per element (momentum_buffer). Parameters must be matrices.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, "Muon is
    Scalable for LLM Training", §2.2 (match_rms_adamw); Bernstein 2025, "Deriving Muon",
    https://jeremybernste.in/writing/deriving-muon (spectral_unclamped); Amsel et al. 2025, "The Polar
    Express", https://arxiv.org/abs/2505.16932 (polar_express).
    """

    counts_steps = False
    complex_error = RuntimeError

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-3, 1.0), meaning="step size")
    weight_decay: float | WeightDecay = decay(default=0.1, mode="decoupled")
    momentum: float = hyper(default=0.95, at_least=0, meaning="μ, decay of M")
    nesterov: bool = hyper(default=True, meaning="look ahead along the momentum")
    ns_coefficients: tuple[float, float, float] = hyper(
        default=(3.4445, -4.775, 2.0315), meaning="a, b, c of the iteration"
    )
    eps: float = hyper(default=1e-7, at_least=0, meaning="ε, smallest norm to divide by")
    ns_steps: int = hyper(default=5, at_least=0, below=100, meaning="how often to iterate")
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral_unclamped"] | None = hyper(
        default=None,
        choices=(None, "original", "match_rms_adamw", "spectral_unclamped"),
        meaning="how lr depends on the shape",
    )
    method: Method = hyper(
        default="newton_schulz", choices=METHODS, kw_only=True, meaning="how U is made orthogonal"
    )

    m = slot("momentum_buffer")

    @staticmethod
    def update(h: Muon, p: Number, g: Number, s: Muon, t: float) -> Number:
        s.m = ema(s.m, g, h.momentum)
        u = lerp(g, s.m, h.momentum) if h.nesterov else s.m
        scale = sqrt(larger(1, rows(p) / columns(p)))
        if h.adjust_lr_fn == "match_rms_adamw":
            scale = 0.2 * sqrt(larger(rows(p), columns(p)))
        elif h.adjust_lr_fn == "spectral_unclamped":
            scale = sqrt(rows(p) / columns(p))
        return -(h.lr * scale) * orthogonalize(u, h.method, h.ns_steps, h.ns_coefficients, h.eps)

    @classmethod
    def check_parameter(cls, param: Tensor, name: Callable[[], str], group: int | None) -> None:
        if param.ndim != 2:
            raise errors.not_a_matrix("Muon", name(), tuple(param.shape), group)
