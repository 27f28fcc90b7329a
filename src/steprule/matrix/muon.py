"""Muon."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch.nn.parameter import is_lazy

from steprule.declare import Matrix, WeightDecay, decay, errors, hyper, slot
from steprule.matrix.words import orthogonalize
from steprule.words import Number, ema, lerp


class Muon(Matrix, flags=""):
    """Momentum in which every singular direction gets the same length.

    When: the hidden matrices of transformers. Use AdamW for embeddings, heads, biases and norms.

        M ← μ·M + (1-μ)·G           U = (1-μ)·G + μ·M with Nesterov, else M
        θ ← θ·(1 - lr·λ) - lr·s·orthogonalize(U)
        s = √max(1, rows/columns), or with adjust_lr_fn:
            "match_rms_adamw"     0.2·√max(rows, columns)
            "spectral_unclamped"  √(rows/columns)

    State: 1 value per parameter (momentum_buffer). Parameters must be matrices.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, "Muon is
    Scalable for LLM Training", §2.2 (match_rms_adamw); Bernstein 2025, "Deriving Muon",
    https://jeremybernste.in/writing/deriving-muon (spectral_unclamped).
    """

    counts_steps = False
    complex_error = RuntimeError

    lr: float = hyper(default=1e-3, at_least=0, meaning="step size")
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

    m = slot("momentum_buffer")

    @staticmethod
    def update(h: Muon, p: Number, g: Number, s: Muon, t: float) -> Number:
        s.m = ema(s.m, g, h.momentum)
        u = lerp(g, s.m, h.momentum) if h.nesterov else s.m
        rows, columns = p.handle.shape
        scale = math.sqrt(max(1, rows / columns))
        if h.adjust_lr_fn == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        elif h.adjust_lr_fn == "spectral_unclamped":
            scale = math.sqrt(rows / columns)
        return -(h.lr * scale) * orthogonalize(u, h.ns_coefficients, h.ns_steps, h.eps)

    def _check_parameters(self, group: dict[str, Any], index: int) -> None:
        super()._check_parameters(group, index)
        names = group.get("param_names")
        for place, param in enumerate(group["params"]):
            # A lazy parameter is checked when it has a gradient.
            if not is_lazy(param) and param.ndim != 2:
                name = f"'{names[place]}'" if names else f"parameter {place}"
                raise errors.not_a_matrix("Muon", name, tuple(param.shape), index)

    def check_gradient(self, param: Any, gradient: Any, group: dict[str, Any]) -> None:
        """Refuse a parameter that is no longer a matrix: some trainers flatten all parameters."""
        super().check_gradient(param, gradient, group)
        if param.ndim != 2:
            raise errors.not_a_matrix("Muon", self.name_of(param), tuple(param.shape), None)
