"""SOAP."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Matrix, WeightDecay, decay, hyper, identity, slot
from steprule.matrix.words import add_product, by_diagonal, eigenvectors, qr, transpose
from steprule.words import Number, columns, ema, ema_sq, is_matrix, rows, sqrt


class SOAP(Matrix):
    """Adam in a basis of each matrix that its gradients choose, and that follows them slowly.

    When: language models. It needs fewer steps than AdamW with the same betas, and every tenth takes longer.

        first step:  L = (1-β2)·G·Gᵀ   R = (1-β2)·Gᵀ·G   P, Q = the eigenvectors of L, R;  nothing else
        H = Pᵀ·G·Q
        M ← β1·M + (1-β1)·H            V ← β2·V + (1-β2)·H²
        θ ← θ·(1 - lr·λ) - lr·√(1-β2ᵗ)/(1-β1ᵗ) · P·(M / (√V + ε))·Qᵀ         t does not count the first step
        L ← β2·L + (1-β2)·G·Gᵀ         R ← β2·R + (1-β2)·Gᵀ·G
        if t % every = 0:  sort P, Q and V by the diagonals of Pᵀ·L·P and Qᵀ·R·Q, then P ← qr(L·P)   Q ← qr(R·Q)
                           and turn M from the old P, Q into the new ones
        vectors, and matrices of two longer sides than max_side:  Adam

    State: 2 values per element (exp_avg, exp_avg_sq), 2·rows² + 2·columns² more for a matrix (left,
    left_basis, right, right_basis), without those of a side that is longer than max_side.
    Differs: from the authors' code in M, which they keep as it is and turn in every step: the same except for
    rounding; in the decay, which comes before the step and in the first one, too; in vectors, which take the
    first step; and in the basis of what the first gradient has no part in.
    Source: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade 2024, "SOAP: Improving and
    Stabilizing Shampoo using Adam", algorithm 3, https://arxiv.org/abs/2409.11321, with the authors' first step
    """

    first_step_moves: ClassVar[bool] = False

    lr: float = hyper(default=3e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(
        default=(0.95, 0.95), at_least=0, below=1, meaning="decay of M, of V, L and R"
    )
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=1e-2, mode="decoupled")
    every: int = hyper(default=10, at_least=1, meaning="after how many steps P and Q follow L and R")
    max_side: int = hyper(default=10000, at_least=0, meaning="the longest side that has a basis")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)
    left = slot("left", per="left", only="matrices", up_to="max_side")
    p_left = slot("left_basis", per="left", only="matrices", up_to="max_side", starts=identity)
    right = slot("right", per="right", only="matrices", up_to="max_side")
    p_right = slot("right_basis", per="right", only="matrices", up_to="max_side", starts=identity)

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: SOAP, t: float) -> Number | float:
        beta1, beta2 = h.betas
        left = is_matrix(p) and bool(rows(p) <= h.max_side)
        right = is_matrix(p) and bool(columns(p) <= h.max_side)
        if left:
            s.left = add_product(s.left, g, transpose(g), beta2, 1 - beta2)
        if right:
            s.right = add_product(s.right, transpose(g), g, beta2, 1 - beta2)
        if left or right:
            if t == 1:
                if left:
                    s.p_left = eigenvectors(s.left)
                if right:
                    s.p_right = eigenvectors(s.right)
                return -0.0  # which changes no element, a negative zero neither
            t = t - 1
        if left:
            g = transpose(s.p_left) @ g
        if right:
            g = g @ s.p_right
        s.m = ema(s.m, g, beta1)
        s.v = ema_sq(s.v, g, beta2)
        u = s.m / (sqrt(s.v) + h.eps)
        if left:
            u = s.p_left @ u
        if right:
            u = u @ transpose(s.p_right)
        if left and t % h.every == 0:
            p, lp = s.p_left, s.left @ s.p_left
            s.p_left = qr(by_diagonal(lp, transpose(p) @ lp))
            s.v = transpose(by_diagonal(transpose(s.v), transpose(p) @ lp))
            s.m = transpose(s.p_left) @ (p @ s.m)
        if right and t % h.every == 0:
            q, rq = s.p_right, s.right @ s.p_right
            s.p_right = qr(by_diagonal(rq, transpose(q) @ rq))
            s.v = by_diagonal(s.v, transpose(q) @ rq)
            s.m = (s.m @ transpose(q)) @ s.p_right
        return -(h.lr * sqrt(1 - beta2**t) / (1 - beta1**t)) * u
