"""NovoGrad."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, norm, sqrt, where


class NovoGrad(Elementwise):
    """Momentum of gradients that are divided by the norm of their tensor: half the state of Adam.

    When: speech recognition, and large batches.

        v ← ‖g‖² in the first step, then β2·v + (1-β2)·‖g‖²         (norm of the tensor)
        m ← β1·m + g/(√v + ε) + λ·θ
        θ ← θ - lr·m
        grad_averaging: m ← β1·m + (1-β1)·(g/(√v + ε) + λ·θ)

    State: 1 value per element (exp_avg), 1 per tensor (exp_avg_sq).
    Differs: from optax in β2, which is 0.25 there, as in one place of the paper.
    Source: Ginsburg, Castonguay, Hrinchuk, Kuchaiev, Lavrukhin, Leary, Li, Nguyen, Zhang, Cohen 2019,
    "Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep Networks", algorithm 1,
    https://arxiv.org/abs/1905.11286
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-3, 1.0), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.95, 0.98), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0, mode="own", meaning="λ, added after the division")
    grad_averaging: bool = hyper(default=False, meaning="weight what is added to m by 1-β1")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", per="tensor")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: NovoGrad, t: float) -> Number:
        beta1, beta2 = h.betas
        square = norm(g) ** 2
        s.v = where(t == 1, square, beta2 * s.v + (1 - beta2) * square)
        scaled = g / (sqrt(s.v) + h.eps) + h.weight_decay * p
        s.m = beta1 * s.m + ((1 - beta1) if h.grad_averaging else 1.0) * scaled
        return -h.lr * s.m
