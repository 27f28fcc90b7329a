"""Words on whole matrices. Unlike the words for single numbers, they may use torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from steprule.words import Number


def _norm(tensor: Tensor, **options: Any) -> Tensor:
    # Not linalg.vector_norm, which rounds differently: the numbers must be torch.optim's.
    norm = cast(Callable[..., Tensor], torch.norm)  # pyright: ignore[reportUnknownMemberType]
    return norm(tensor, **options)


def orthogonalize(x: Number, coefficients: tuple[float, float, float], steps: int, eps: float) -> Number:
    """Almost UVᵀ of x = USVᵀ: all singular values pushed towards 1 by a quintic iteration in bfloat16.

    X ← x / max(‖x‖, ε), then `steps` times A = XXᵀ, X ← a·X + (b·A + c·A²)X. The coefficients make small
    singular values grow as fast as they can, so they end between about 0.5 and 1.5 rather than at 1.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """
    a, b, c = coefficients
    given: Tensor = x.handle
    tall = given.size(-2) > given.size(-1)
    matrix: Tensor = (given.mT if tall else given).to(torch.bfloat16)
    matrix = matrix / _norm(matrix).clamp(min=eps)
    for _ in range(steps):
        gram = matrix @ matrix.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        matrix = torch.addmm(matrix, polynomial, matrix, beta=a)
    return Number(x.machine, matrix.mT if tall else matrix)
