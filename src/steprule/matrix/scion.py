"""Scion."""

from __future__ import annotations

from typing import Any, Literal

from steprule.declare import Matrix, WeightDecay, decay, hyper, slot
from steprule.matrix.words import METHODS, Method, orthogonalize
from steprule.words import Number, columns, ema, is_matrix, mean, norm, rows, sign, sqrt


class Scion(Matrix):
    """The momentum, normed in every layer as its kind of weights asks for, so that one lr fits all widths.

    When: all of a model with one rule, and hyper-parameters that are found on a small model. Hidden matrices
    have norm="spectral", embeddings and the output layer norm="sign" and a larger scale: 50 and 3000 in the
    authors' GPT, with lr 2⁻¹².

        M ← μ·M + (1-μ)·G
        θ ← θ·(1 - lr·λ) - lr·ρ·U                   with ρ = scale and, by norm,
            "spectral"  U = √(rows/columns) · orthogonalize(M)
            "sign"      U = sign(M) / columns
            "row"       U = M / (‖row of M‖·√columns + ε)
            "column"    U = M / (‖column of M‖/√rows + ε)
            vectors     U = M / (RMS(M) + ε), whatever the norm
        λ = 1 keeps the weights in the ball of radius ρ; λ = 0 is the unconstrained form.

    State: 1 value per element (momentum_buffer). More than two dimensions are a stack of matrices.
    Differs: from the authors' code, whose momentum is 1-μ; which has `unconstrained` for λ = 0; and which
    divides the step of a k × k convolution by k², which scale can do here.
    Source: Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher 2025, "Training Deep Learning Models with
    Norm-Constrained LMOs", §3, https://arxiv.org/abs/2502.07529, with the authors' code
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    momentum: float = hyper(default=0.9, at_least=0, below=1, meaning="μ, decay of M")
    scale: float = hyper(default=1.0, above=0, meaning="ρ, the radius within which weights stay")
    norm: Literal["spectral", "sign", "row", "column"] = hyper(
        default="spectral",
        choices=("spectral", "sign", "row", "column"),
        meaning="how long a step of a matrix is",
    )
    weight_decay: float | WeightDecay = decay(default=1.0, mode="decoupled")
    method: Method = hyper(
        default="newton_schulz", choices=METHODS, meaning="how M is made orthogonal, as in Muon"
    )
    ns_steps: int = hyper(default=5, at_least=0, below=100, meaning="how often to iterate")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")

    m = slot("momentum_buffer")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: Scion, t: float) -> Number:
        s.m = ema(s.m, g, h.momentum)
        return -(h.lr * h.scale) * normed(h, p, s.m)


def normed(h: Any, p: Number, m: Number) -> Number:
    """What of all steps with norm 1 goes farthest along m."""
    if not is_matrix(p):
        return m / (sqrt(mean(m * m)) + h.eps)
    if h.norm == "sign":
        return sign(m) * (1 / columns(p))
    if h.norm == "row":
        return m / (norm(m, over="row") * sqrt(columns(p)) + h.eps)
    if h.norm == "column":
        return m / (norm(m, over="column") / sqrt(rows(p)) + h.eps)
    return sqrt(rows(p) / columns(p)) * orthogonalize(m, h.method, h.ns_steps)
