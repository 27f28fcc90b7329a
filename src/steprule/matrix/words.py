"""Words on whole matrices, for rules that subclass `steprule.declare.Matrix`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from steprule.whole import matrix_word, transpose

__all__ = ["matrix_word", "orthogonalize", "transpose"]


def _norm(matrices: Tensor) -> Tensor:
    # Not linalg.vector_norm, which rounds differently: the numbers must be torch.optim's.
    norm = cast(Callable[..., Tensor], torch.norm)  # pyright: ignore[reportUnknownMemberType]
    return norm(matrices) if matrices.dim() == 2 else norm(matrices, dim=(-2, -1), keepdim=True)


@matrix_word(dtype="bfloat16")
def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: float, eps: float) -> Tensor:
    """Almost UVᵀ of x = USVᵀ: all singular values pushed towards 1 by a quintic iteration in bfloat16.

    X ← x / max(‖x‖, ε), then `steps` times A = XXᵀ, X ← a·X + (b·A + c·A²)X. The coefficients make small
    singular values grow as fast as they can, so they end between about 0.5 and 1.5 rather than at 1.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """
    a, b, c = coefficients
    tall = x.size(-2) > x.size(-1)
    matrix = (x.mT if tall else x).to(torch.bfloat16)
    matrix = matrix / _norm(matrix).clamp(min=eps)
    add: Any = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    for _ in range(int(steps)):
        gram = matrix @ matrix.mT
        polynomial = add(gram, gram, gram, beta=b, alpha=c)
        matrix = add(matrix, polynomial, matrix, beta=a)
    return matrix.mT if tall else matrix
