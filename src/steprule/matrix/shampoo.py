"""Shampoo."""

from __future__ import annotations

from typing import Any

from steprule.declare import Matrix, WeightDecay, decay, hyper, identity, slot
from steprule.matrix.words import add_product, inverse_root, transpose
from steprule.words import Number, columns, ema, ema_sq, is_matrix, larger, norm, rows, sqrt, where


class Shampoo(Matrix):
    """Each matrix divided by the roots of its rows' and its columns' averaged products.

    When: you look for the fewest steps, and have memory for it. With grafting use AdamW's lr.

        M ← β1·M + (1-β1)·G         V ← β2·V + (1-β2)·G²         A = M/(1-β1ᵗ) / (√V/√(1-β2ᵗ) + ε₂)
        L ← L + G·Gᵀ                R ← R + Gᵀ·G                 or their averages, with β3 < 1
        U = (L+ε₁)^(-1/4) · M/(1-β1ᵗ) · (R+ε₁)^(-1/4)            both roots at every k-th step
        θ ← θ·(1 - lr·λ) - lr·U·‖A‖/‖U‖                          without grafting lr·U
        one side only:  U = (L+ε₁)^(-1/2) · M/(1-β1ᵗ)
        the first k-1 steps with grafting, vectors, and matrices of two longer sides than max_side:  A

    State: 2 values per element (exp_avg, exp_avg_sq), 2·rows² + 2·columns² more for a matrix (left,
    left_root, right, right_root), without those of a side that is longer than max_side.
    Differs: from Distributed Shampoo, which cuts long sides into blocks; from others, which start L, R at ε₁.
    Source: Gupta, Koren, Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization", algorithm 1,
    https://arxiv.org/abs/1802.09568; Shi et al. 2023, "A Distributed Data-Parallel PyTorch Implementation of
    the Distributed Shampoo Optimizer", §3, https://arxiv.org/abs/2309.06497 (averages, grafting); An et al.
    2025, "ASGO: Adaptive Structured Gradient Optimization", https://arxiv.org/abs/2503.20762 (one side)
    """

    lr: float = hyper(default=1e-2, at_least=0, search=(1e-3, 1.0), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of M, of V")
    side_decay: float = hyper(default=1.0, at_least=0, at_most=1, meaning="β3, decay of L and R; 1 adds up")
    eps: tuple[float, float] = hyper(default=(1e-12, 1e-8), above=0, meaning="ε₁, ε₂, avoid division by zero")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")
    every: int = hyper(default=10, at_least=1, meaning="k, after how many steps the roots follow L and R")
    max_side: int = hyper(default=10000, at_least=0, meaning="the longest side that has a root")
    both_sides: bool = hyper(default=True, meaning="L and R; else only L")
    graft: bool = hyper(default=True, meaning="take the length of Adam's step")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)
    left = slot("left", per="left", only="matrices", up_to="max_side")
    p_left = slot("left_root", per="left", only="matrices", up_to="max_side", starts=identity)
    right = slot("right", per="right", only="matrices", up_to="max_side", when="both_sides")
    p_right = slot(
        "right_root", per="right", only="matrices", up_to="max_side", when="both_sides", starts=identity
    )

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: Shampoo, t: float) -> Number:
        (beta1, beta2), (eps1, eps2) = h.betas, h.eps
        beta3 = h.side_decay
        left = is_matrix(p) and bool(rows(p) <= h.max_side)
        right = is_matrix(p) and h.both_sides and bool(columns(p) <= h.max_side)
        s.m = ema(s.m, g, beta1)
        s.v = ema_sq(s.v, g, beta2)
        u = s.m / (1 - beta1**t)
        a = u / (sqrt(s.v) / sqrt(1 - beta2**t) + eps2)
        added, count = where(beta3 < 1, 1 - beta3, 1), where(beta3 < 1, 1 - beta3**t, 1)
        if left:
            s.left = add_product(s.left, g, transpose(g), beta3, added)
        if right:
            s.right = add_product(s.right, transpose(g), g, beta3, added)
        if not (left or right) or (h.graft and t < h.every):
            return -h.lr * a
        due = bool(t % h.every == 0) or (not h.graft and bool(t == 1))
        root = 4 if left and right else 2
        if left:
            s.p_left = inverse_root(s.left / count, root, eps1) if due else s.p_left
            u = s.p_left @ u
        if right:
            s.p_right = inverse_root(s.right / count, root, eps1) if due else s.p_right
            u = u @ s.p_right
        if h.graft:
            u = u * (norm(a, over="matrix") / larger(norm(u, over="matrix"), 1e-30))
        return -h.lr * u
