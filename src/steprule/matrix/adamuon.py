"""AdaMuon."""

from __future__ import annotations

from typing import Any

from steprule.declare import Matrix, WeightDecay, decay, hyper, slot
from steprule.matrix.words import METHODS, Method, orthogonalize
from steprule.words import Number, columns, ema, ema_sq, norm, rows, sign, sqrt


class AdaMuon(Matrix):
    """Muon whose every element is divided by its recent size, with steps as long as Adam's.

    When: the hidden matrices of transformers, with the lr and the weight decay that AdamW has there. Use AdamW
    for embeddings, heads, biases and norms.

        M ← μ·M + (1-μ)·G           O = orthogonalize(sign(M))
        V ← μ·V + (1-μ)·O²          Ô = O / (√V + ε)
        θ ← θ·(1 - lr·λ) - lr·0.2·√(rows·columns)/(‖Ô‖ + ε) · Ô

    State: 2 values per element (momentum_buffer, exp_avg_sq). Parameters must be matrices, or stacks of them
    in the last two dimensions.
    Differs: from the authors' first code, which takes no sign, has Nesterov, and a β2 of its own with a bias
    correction; timm takes no sign; pytorch-optimizer has the first code's scale, too.
    Source: Si, Zhang, Shen 2025, "AdaMuon: Adaptive Muon Optimizer", algorithm 1,
    https://arxiv.org/abs/2507.11005, with the lr and λ of the authors' runs on GPT-2
    """

    lr: float = hyper(
        default=6e-4, at_least=0, search=(3e-4, 3e-1), meaning="step size; a step's root mean square is 0.2·lr"
    )
    momentum: float = hyper(default=0.95, at_least=0, below=1, meaning="μ, decay of M and V")
    weight_decay: float | WeightDecay = decay(default=0.1, mode="decoupled")
    method: Method = hyper(
        default="newton_schulz", choices=METHODS, meaning="how sign(M) is made orthogonal, as in Muon"
    )
    ns_steps: int = hyper(default=5, at_least=0, below=100, meaning="how often to iterate")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")

    m = slot("momentum_buffer")
    v = slot("exp_avg_sq", never_negative=True)

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: AdaMuon, t: float) -> Number:
        s.m = ema(s.m, g, h.momentum)
        o = orthogonalize(sign(s.m), h.method, h.ns_steps)
        s.v = ema_sq(s.v, o, h.momentum)
        divided = o / (sqrt(s.v) + h.eps)
        length = 0.2 * sqrt(rows(p) * columns(p)) / (norm(divided, over="matrix") + h.eps)
        return -h.lr * (length * divided)
