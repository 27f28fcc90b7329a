"""NorMuon."""

from __future__ import annotations

from typing import Any

from steprule.declare import Matrix, WeightDecay, decay, hyper, slot
from steprule.matrix.words import METHODS, Method, orthogonalize
from steprule.words import Number, columns, ema, larger, lerp, mean, norm, rows, sqrt


class NorMuon(Matrix):
    """Muon in which every row of a matrix, the weights of one neuron, moves about equally far.

    When: where Muon is used, the hidden matrices of transformers; it takes fewer steps at next to no cost. Use
    AdamW for embeddings, heads, biases and norms.

        M ← β1·M + (1-β1)·G         U = (1-β1)·G + β1·M with Nesterov, else M
        O = orthogonalize(U)        v ← β2·v + (1-β2)·rowmean(O²)
        Ô = O / (√v + ε)
        θ ← θ·(1 - lr·λ) - lr·√max(1, rows/columns)·‖O‖/(‖Ô‖ + ε) · Ô

    State: 1 value per element (momentum_buffer), 1 per row (second_momentum_buffer). Parameters must be
    matrices, or stacks of them in the last two dimensions.
    Differs: from the paper, which has no Nesterov and gives Ô a root mean square of 0.2: this is the authors'
    code, whose lr is that of the first Muon. NVIDIA averages along the longer side instead of each row.
    Source: Li, Liu, Liang, Chen, Zhao 2025, "NorMuon: Making Muon more efficient and scalable", algorithm 1,
    https://arxiv.org/abs/2510.05491, with the authors' code
    """

    lr: float = hyper(default=0.02, at_least=0, search=(1e-3, 1.0), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.95, 0.95), at_least=0, below=1, meaning="decay of M, of v")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")
    nesterov: bool = hyper(default=True, meaning="look ahead along the momentum")
    method: Method = hyper(
        default="newton_schulz", choices=METHODS, meaning="how U is made orthogonal, as in Muon"
    )
    ns_steps: int = hyper(default=5, at_least=0, below=100, meaning="how often to iterate")
    eps: float = hyper(default=1e-10, at_least=0, meaning="ε, avoids division by zero")

    m = slot("momentum_buffer")
    v = slot("second_momentum_buffer", per="row", never_negative=True)

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: NorMuon, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        u = lerp(g, s.m, beta1) if h.nesterov else s.m
        o = orthogonalize(u, h.method, h.ns_steps)
        s.v = ema(s.v, mean(o * o, over="row"), beta2)
        normed = o / (sqrt(s.v) + h.eps)
        length = norm(o, over="matrix") / (norm(normed, over="matrix") + h.eps)
        return -(h.lr * sqrt(larger(1, rows(p) / columns(p)))) * (length * normed)
