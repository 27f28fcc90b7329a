"""LARS."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, norm, where


class LARS(Elementwise):
    """SGD with momentum, whose gradient is scaled in every tensor to a share of the norm of the tensor.

    When: convolutional networks with batches of thousands of images, and self-supervised vision. Give biases
    and normalization layers a group with lr of another size, or train them with SGD.

        q = τ·‖θ‖/(‖g‖ + λ·‖θ‖ + ε)                 (norms of the tensor; 1 where either is 0)
        b ← μ·b + q·(g + λ·θ)
        d = q·(g + λ·θ) + μ·b with Nesterov, else b
        θ ← θ - lr·d

    State: 1 value per element (momentum_buffer).
    Differs: from timm, which leaves q out where λ is 0.
    Source: You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks", algorithm 1,
    https://arxiv.org/abs/1708.03888. The buffer does not include lr, as in torch's SGD.
    """

    lr: float = hyper(default=1.0, at_least=0, search=(1e-1, 100.0), meaning="step size, in shares of τ")
    momentum: float = hyper(default=0.9, at_least=0, meaning="μ, the share of the last step to keep")
    trust_coefficient: float = hyper(default=1e-3, above=0, meaning="τ, how far a tensor moves for its norm")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(
        default=0, mode="own", meaning="λ, added to the gradient, and to its norm in q"
    )
    nesterov: bool = hyper(default=False, meaning="look ahead along the buffer")

    b = slot("momentum_buffer")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: LARS, t: float) -> Number:
        size, slope = norm(p), norm(g)
        bottom = slope + h.weight_decay * size + h.eps
        q = where(size * slope > 0, h.trust_coefficient * size / bottom, 1.0)
        step = q * (g + h.weight_decay * p)
        s.b = h.momentum * s.b + step
        return -h.lr * (step + h.momentum * s.b if h.nesterov else s.b)
