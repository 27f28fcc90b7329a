"""Kron."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from steprule.declare import Matrix, WeightDecay, decay, hyper, identity, scalar_slot, slot
from steprule.matrix.words import matrix_word, transpose
from steprule.whole import of_a_square
from steprule.words import (
    Number,
    columns,
    ema,
    exp,
    gaussian,
    is_matrix,
    larger,
    largest,
    mean,
    rows,
    smaller,
    sqrt,
    total,
)

# Below what a divisor does not go.
TINY = 1e-30


class Kron(Matrix):
    """PSGD: a preconditioner for each side of a matrix, fitted step by step until it makes gradients white.

    When: you look for the fewest steps, as with Shampoo and SOAP, without their decompositions.

        M ← μ·M + (1-μ)·G           M̂ = M/(1-μᵗ)
        every 1/π steps, where π falls from 1 to fit_min by exp(-fit_decay·(t-fit_start)), with V ~ N(0, 1):
            A = P·M̂·Qᵀ              B = P⁻ᵀ·V·Q⁻¹
            P ← P - ρ·triu(A·Aᵀ - B·Bᵀ)·P / ‖A·Aᵀ + B·Bᵀ‖          Q likewise with Aᵀ·A, Bᵀ·B
        U = Pᵀ·P·M̂·Qᵀ·Q             θ ← θ·(1 - lr·λ) - lr·U·min(1, 1.1/RMS(U))
        of longer sides than max_side, P or Q is diagonal, and so it is of vectors

    State: 1 value per element (momentum_buffer), rows² + columns² more for a matrix (left, right), without
    those of a side that is longer than max_side; 1 per row and column (row, column), of vectors 1 per element
    (diagonal); 2 per tensor (since_fit, noise_key).
    Differs: from the authors' code in a stack of matrices, each of which has a P and a Q of its own; and in not
    bringing P and Q to one size now and then, which changes only rounding.
    Source: Li 2015, "Preconditioned Stochastic Gradient Descent", https://arxiv.org/abs/1512.04202;
    Pooladzandi, Li 2024, "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners",
    https://arxiv.org/abs/2402.04553, with the schedule and the limits of the authors' kron_torch
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    momentum: float = hyper(default=0.9, at_least=0, below=1, meaning="μ, decay of M")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")
    fit_lr: float = hyper(default=0.1, at_least=0, meaning="ρ, step size of P and Q")
    fit_min: float = hyper(default=0.03, above=0, at_most=1, meaning="how often P and Q are fitted at last")
    fit_decay: float = hyper(default=1e-3, at_least=0, meaning="how fast fits become rarer")
    fit_start: int = hyper(default=500, at_least=0, meaning="for how many steps there is a fit at each")
    max_side: int = hyper(default=8192, at_least=0, meaning="the longest side whose P or Q is a whole triangle")
    seed: int = hyper(default=0, at_least=0, meaning="where the random numbers start")

    m = slot("momentum_buffer")
    left = slot("left", per="left", only="matrices", up_to="max_side", starts=identity)
    right = slot("right", per="right", only="matrices", up_to="max_side", starts=identity)
    row = slot("row", per="row", only="matrices", starts=1.0)
    column = slot("column", per="column", only="matrices", starts=1.0)
    diagonal = slot("diagonal", only="vectors", starts=1.0, not_in_8_bits="a fit changes it by a few percent")
    since = scalar_slot("since_fit")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: Kron, t: float) -> Number:
        s.m = ema(s.m, g, h.momentum)
        m = s.m / (1 - h.momentum**t)
        often = larger(h.fit_min, smaller(1.0, exp(-h.fit_decay * (t - 1 - h.fit_start))))
        due = bool((s.since + 1) * often >= 1)
        s.since = 0.0 if due else s.since + 1
        if not is_matrix(p):
            if due:
                a, b = s.diagonal * m, gaussian() / s.diagonal
                most = larger(largest(a * a + b * b), TINY)
                s.diagonal = s.diagonal - h.fit_lr * (a * a - b * b) / most * s.diagonal
            u = s.diagonal * s.diagonal * m
            return -h.lr * smaller(1.0, 1.1 / (sqrt(mean(u * u)) + 1e-8)) * u
        left, right = bool(rows(p) <= h.max_side), bool(columns(p) <= h.max_side)
        if due:
            a, b = m, gaussian()
            a, b = (s.left @ a, transpose(inverse(s.left)) @ b) if left else (s.row * a, b / s.row)
            a, b = (a @ transpose(s.right), b @ inverse(s.right)) if right else (a * s.column, b / s.column)
            if left:
                s.left = fitted(s.left, a @ transpose(a), b @ transpose(b), h.fit_lr)
            else:
                s.row = s.row - h.fit_lr * of_diagonal(a, b, "row", "column") * s.row
            if right:
                s.right = fitted(s.right, transpose(a) @ a, transpose(b) @ b, h.fit_lr)
            else:
                s.column = s.column - h.fit_lr * of_diagonal(a, b, "column", "row") * s.column
        u = transpose(s.left) @ (s.left @ m) if left else s.row * s.row * m
        u = (u @ transpose(s.right)) @ s.right if right else u * s.column * s.column
        return -h.lr * smaller(1.0, 1.1 / (sqrt(mean(u * u, over="matrix")) + 1e-8)) * u


def of_diagonal(a: Number, b: Number, own: Any, other: Any) -> Any:
    """What a diagonal P moves by, as a share of itself: one value per row (own), or Q per column."""
    squares: Any = total(a * a, over=own)
    noise: Any = total(b * b, over=own)
    return (squares - noise) / larger(largest(squares + noise, over=other), TINY)


@matrix_word(form=of_a_square)
def inverse(a: Tensor) -> Tensor:
    """The inverse of a triangular matrix, which is 0 below its diagonal."""
    unit = torch.eye(a.size(-1), dtype=a.dtype, device=a.device)
    return cast(Any, torch.linalg).solve_triangular(a, unit.expand_as(a), upper=True)


@matrix_word(never_raises=True)
def fitted(p: Tensor, a: Tensor, b: Tensor, rate: float) -> Tensor:
    """P - ρ·triu(a - b)·P / ‖a + b‖ for symmetric matrices a and b."""
    if not p.numel():
        return p.clone()
    return p - rate * ((a - b).triu() @ p) / _norm(a + b).clamp(min=TINY)


def _norm(a: Tensor) -> Tensor:
    """A lower bound of the spectral norm of symmetric matrices, rarely far below it."""
    largest = a.abs().amax((-2, -1), keepdim=True).clamp(min=TINY)
    a = a / largest
    longest = a.square().sum(-1, keepdim=True).argmax(-2, keepdim=True)
    row = a.gather(-2, longest.expand(*longest.shape[:-1], a.size(-1)))
    direction = row @ a
    direction = direction / _length(direction).clamp(min=TINY)
    return largest * _length(direction @ a)


def _length(rows: Tensor) -> Tensor:
    return rows.square().sum(-1, keepdim=True).sqrt()
