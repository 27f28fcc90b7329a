"""Adam for sparse gradients."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, errors, hyper, slot
from steprule.words import Number, sqrt


class SparseAdam(Elementwise, flags="maximize", positional="maximize"):
    """Adam that updates only the rows that a sparse gradient touches. Other rows keep their moments.

    When: large embeddings with `sparse=True`.

        m ← m + (1-β1)·(g - m)      v ← v + (1-β2)·(g² - v)       on the touched rows
        θ ← θ - lr·√(1-β2ᵗ)/(1-β1ᵗ) · m / (√v + ε)

    State: 2 values per element (exp_avg, exp_avg_sq).
    Source: Kingma, Ba 2015, the optimized update at the end of §2, row by row as in torch,
    https://arxiv.org/abs/1412.6980
    """

    gradients = "rows only"
    complex_error = ValueError

    lr: float = hyper(default=1e-3, above=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, above=0, meaning="ε, avoids division by zero")

    m = slot("exp_avg")
    v = slot("exp_avg_sq")

    @staticmethod
    def update(h: SparseAdam, p: Number, g: Number, s: SparseAdam, t: float) -> Number:
        beta1, beta2 = h.betas
        # torch adds the rounded change, so that is what must be stored; ema would round differently.
        s.m = s.m + (g - s.m) * (1 - beta1)
        s.v = s.v + (g**2 - s.v) * (1 - beta2)
        step = h.lr * sqrt(1 - beta2**t) / (1 - beta1**t)
        return s.m / (sqrt(s.v) + h.eps) * -step

    @classmethod
    def check_parameter(cls, param: Any, name: Any, group: int | None) -> None:
        where = "" if group is None else f" of group {group}"
        if param.is_sparse:
            raise errors.not_dense("SparseAdam", f"{name()}{where}")
        if param.is_complex():
            raise errors.complex_parameter("SparseAdam", f"{name()}{where}", ValueError)
