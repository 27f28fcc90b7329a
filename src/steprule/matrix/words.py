"""Words on whole matrices, for rules that subclass `steprule.declare.Matrix`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice, repeat
from typing import Any, Literal, cast

import torch
from torch import Tensor

from steprule.levels import SIDES
from steprule.values import Number
from steprule.whole import matrix_word, of_a_square, of_product, transpose

__all__ = [
    "METHODS",
    "Method",
    "add_product",
    "by_diagonal",
    "eigenvectors",
    "inverse_root",
    "matrix_word",
    "newton_schulz",
    "orthogonalize",
    "polar_express",
    "polar_factor",
    "qr",
    "transpose",
]

Method = Literal["newton_schulz", "polar_express", "exact"]
METHODS: tuple[Method, ...] = ("newton_schulz", "polar_express", "exact")
# a, b, c of a step of an iteration.
Quintic = tuple[float, float, float]
JORDANS: Quintic = (3.4445, -4.775, 2.0315)
# The precision of iterations.
NARROW = torch.bfloat16


def orthogonalize(
    x: Number, method: Method, steps: float = 5, coefficients: Quintic = JORDANS, eps: float = 1e-7
) -> Number:
    """UVᵀ of x = USVᵀ, the nearest matrix with orthogonal rows or columns, or almost.

    method: "newton_schulz" and "polar_express" iterate `steps` times in bfloat16, which takes about the same
    time; the singular values end between 0.5 and 1.5 by the first, nearer to 1 by the second. "exact" takes the
    decomposition, which is many times slower. coefficients: of "newton_schulz".
    """
    if method == "exact":
        return polar_factor(x)
    if method == "polar_express":
        return polar_express(x, steps, eps)
    return newton_schulz(x, coefficients, steps, eps)


@matrix_word(dtype="bfloat16", never_raises=True)
def newton_schulz(x: Tensor, coefficients: Quintic, steps: float, eps: float) -> Tensor:
    """Almost UVᵀ of x = USVᵀ: all singular values pushed towards 1 by a quintic iteration in bfloat16.

    X ← x / max(‖x‖, ε), then `steps` times A = XXᵀ, X ← a·X + (b·A + c·A²)X. The coefficients make small
    singular values grow as fast as they can, so they end between about 0.5 and 1.5 rather than at 1.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """
    return _iterated(x, repeat(coefficients, int(steps)), lambda norm: norm.clamp(min=eps))


# The best a, b, c of each step for singular values from 0.001 to 1; later steps repeat the last ones.
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# A singular value that rounding has made larger than 1 must not grow without bound.
SAFETY = 1.01
SAFE = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]


@matrix_word(dtype="bfloat16", never_raises=True)
def polar_express(x: Tensor, steps: float, eps: float) -> Tensor:
    """Almost UVᵀ of x = USVᵀ: the iteration of `newton_schulz` with the best coefficients for every step.

    X ← x / (1.01·‖x‖ + ε), then `steps` times A = XXᵀ, X ← a·X + (b·A + c·A²)X, where a, b, c are divided by
    1.01, 1.01³, 1.01⁵ in all steps but the last of the table, which later steps repeat.

    Source: Amsel, Persson, Musco, Gower 2025, "The Polar Express: Optimal Matrix Sign Methods and Their
    Application to the Muon Algorithm", the coefficients of its listing, https://arxiv.org/abs/2505.16932
    """
    coefficients = islice(chain(SAFE, repeat(POLAR_EXPRESS[-1])), int(steps))
    return _iterated(x, coefficients, lambda norm: norm * SAFETY + eps)


def _iterated(x: Tensor, coefficients: Iterable[Quintic], scale: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrices after X ← a·X + (b·A + c·A²)X with A = XXᵀ for each a, b, c. scale: of the norm of x."""
    tall = x.size(-2) > x.size(-1)
    matrix = (x.mT if tall else x).to(NARROW)
    matrix = matrix / scale(_norm(matrix))
    add: Any = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    for a, b, c in coefficients:
        gram = matrix @ matrix.mT
        polynomial = add(gram, gram, gram, beta=b, alpha=c)
        matrix = add(matrix, polynomial, matrix, beta=a)
    return matrix.mT if tall else matrix


def _norm(matrices: Tensor) -> Tensor:
    # Not linalg.vector_norm, which rounds differently: the numbers must be torch.optim's.
    norm = cast(Callable[..., Tensor], torch.norm)  # pyright: ignore[reportUnknownMemberType]
    return norm(matrices) if matrices.dim() == 2 else norm(matrices, dim=(-2, -1), keepdim=True)


def _of_sum(c: str, a: str, b: str) -> str | None:
    """The form of c, if a product of a and b has it, too."""
    return c if of_product(a, b) == c else None


@matrix_word(form=_of_sum, never_raises=True)
def add_product(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """β·c + α·a·b, which takes less time than the product and the sum after each other."""
    add: Any = torch.addmm if c.dim() == 2 else torch.baddbmm
    return add(c, a, b, beta=beta, alpha=alpha)


_Decomposition = Callable[..., tuple[Tensor, Tensor, Tensor]]


@matrix_word
def polar_factor(x: Tensor) -> Tensor:
    """UVᵀ of x = USVᵀ, by the singular value decomposition, in the precision that the step is computed in.

    Directions whose singular value is 0, up to rounding, are 0. A matrix that is not finite becomes NaN.
    """
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    svd = cast(_Decomposition, torch.linalg.svd)  # pyright: ignore[reportUnknownMemberType]
    u, s, vt = svd(torch.where(finite, x, 0.0), full_matrices=False)
    smallest = max(x.shape[-2:]) * torch.finfo(s.dtype).eps * s[..., :1]
    directions = (s > smallest).to(s.dtype)
    return torch.where(finite, (u * directions.unsqueeze(-2)) @ vt, torch.nan)


# Its functions have no types.
_LINALG = cast(Any, torch.linalg)


def _eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the smallest first, and eigenvectors of symmetric matrices."""
    eigh: Callable[[Tensor], tuple[Tensor, Tensor]] = _LINALG.eigh
    if not a.isfinite().all():
        raise RuntimeError("NaN or infinite elements; nonfinite='skip' skips steps with such gradients")
    try:
        return eigh(a)
    except RuntimeError:
        values, vectors = eigh(a.double().cpu())
        return values.to(a), vectors.to(a)


def _rounding(a: Tensor, values: Tensor) -> Tensor:
    """How large eigenvalues of symmetric matrices may be that are nothing but rounding."""
    return values[..., -1:] * (a.size(-1) * torch.finfo(a.dtype).eps)


@matrix_word(form=of_a_square)
def eigenvectors(a: Tensor) -> Tensor:
    """The eigenvectors of a symmetric matrix, as columns; those of the largest eigenvalues come first.

    Eigenvalues of 0 have no vectors of their own. What they span is then divided into the eigenvectors of a
    diagonal matrix with the numbers 1, 2, 3, …, so that the result does not depend on rounding.
    """
    values, vectors = _eigh(a)
    hidden = values <= _rounding(a, values)
    if hidden.any():
        null = vectors * hidden.unsqueeze(-2)
        count = torch.arange(1, 1 + a.size(-1), dtype=a.dtype, device=a.device)
        within = null.mT @ (count.unsqueeze(-1) * null) / a.size(-1)
        largest = torch.where(values[..., -1:, None] > 0, values[..., -1:, None], 1)
        # Below all other eigenvalues, so that these come last.
        _, vectors = _eigh(a - largest * (null @ within @ null.mT))
    return vectors.flip(-1)


@matrix_word(form=of_a_square)
def inverse_root(a: Tensor, root: float, eps: float) -> Tensor:
    """(a + ε)^(-1/root) of a symmetric matrix whose eigenvalues are not negative.

    Eigenvalues that are nothing but rounding count as large as rounding may make them.
    """
    values, vectors = _eigh(a)
    values = torch.maximum(values, _rounding(a, values)) + eps
    return (vectors * values.pow(-1 / root).unsqueeze(-2)) @ vectors.mT


@matrix_word(form=of_a_square, never_raises=True)
def qr(a: Tensor) -> Tensor:
    """The orthogonal Q of a = Q·R, where R is 0 below its diagonal."""
    return _LINALG.qr(a)[0]


def _of_columns(x: str, a: str) -> str | None:
    """The form of x, whose columns a square matrix has one of each of."""
    return x if SIDES[a] == (SIDES[x][1],) * 2 else None


@matrix_word(form=_of_columns, never_raises=True)
def by_diagonal(x: Tensor, a: Tensor) -> Tensor:
    """The columns of x in the order in which the diagonal of a falls."""
    order = a.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    return torch.take_along_dim(x, order.unsqueeze(-2), dim=-1)
