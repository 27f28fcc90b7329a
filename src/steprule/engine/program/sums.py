"""Sums over tensors, groups and all parameters: taken in double, so that their order hardly shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from steprule.engine import storage


class Partial(NamedTuple):
    """What a reduction came to over some elements, before it is finished.

    A sum, for `norm` one of squares, or the largest element.
    """

    value: float
    elements: int


def partial(word: str, x: Tensor) -> Partial:
    """The part of a reduction that is taken over one tensor."""
    return Partial(_whole(_taken(word, x)).item(), x.numel())


def _taken(word: str, x: Tensor) -> Tensor:
    if word == "largest":
        if storage.sharded(x):
            x = _whole(x)  # a process may hold no element of it
        return torch.amax(x) if x.numel() else x.new_full((), -torch.inf)
    if word == "norm":
        norm: Tensor = cast(Any, torch.linalg).vector_norm(x, dtype=torch.float64)
        return norm.square()
    return torch.sum(x, dtype=torch.float64)


def _whole(x: Tensor) -> Tensor:
    return cast(Any, x).full_tensor() if storage.sharded(x) else x


def on_tape(word: str, x: Tensor) -> Tensor:
    """A whole reduction over one tensor, through which autograd can go back."""
    if word == "norm":
        return cast(Any, torch.linalg).vector_norm(x, dtype=torch.float64).to(x.dtype)
    if word == "mean":
        return torch.mean(x, dtype=torch.float64).to(x.dtype)
    return _taken(word, x).to(x.dtype)


def along(word: str, x: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    """A reduction along these dimensions, which stay with length 1, in double."""
    if not dimensions:
        return x.double().abs() if word == "norm" else x.double()
    if word == "largest":
        return _largest(x.double(), dimensions)
    if word == "norm":
        return cast(Any, torch.linalg).vector_norm(x, dim=dimensions, keepdim=True, dtype=torch.float64)
    total = torch.sum(x, dim=dimensions, keepdim=True, dtype=torch.float64)
    return total / max(1, math.prod(x.shape[i] for i in dimensions)) if word == "mean" else total


def _largest(x: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    if x.numel():
        return torch.amax(x, dim=dimensions, keepdim=True)
    shape = [1 if i in dimensions else size for i, size in enumerate(x.shape)]
    return x.new_full(shape, -torch.inf)


def as_torch(word: str, x: Tensor, dimensions: tuple[int, ...] | None) -> Tensor:
    """A reduction in the precision of the tensor, by the operations of torch's own optimizers; None: of all."""
    if word == "norm":
        # Not linalg.vector_norm, which rounds differently.
        if dimensions is None:
            return cast(Any, torch).norm(x)
        return cast(Any, torch).norm(x, dim=dimensions, keepdim=True) if dimensions else x.abs()
    if word == "largest":
        return _largest(x, tuple(range(x.dim())) if dimensions is None else dimensions)
    if dimensions == ():
        return x
    take: Any = torch.mean if word == "mean" else torch.sum
    return take(x) if dimensions is None else take(x, dim=dimensions, keepdim=True)


def finished(word: str, parts: Iterable[Partial]) -> float:
    """What the parts come to together."""
    parts = list(parts)
    values = [part.value for part in parts]
    if word == "largest":
        undefined = [value for value in values if value != value]
        return undefined[0] if undefined else max(values, default=-math.inf)
    try:
        result = math.fsum(values)
    except (OverflowError, ValueError):  # of numbers too large for a double
        result = sum(values)
    if word == "mean":
        return result / max(1, sum(part.elements for part in parts))
    return math.sqrt(result) if word == "norm" and result >= 0 else result


def together(word: str, parts: Iterable[Partial]) -> Partial:
    """What several parts come to, as one part."""
    parts = list(parts)
    value = finished(word if word == "largest" else "total", parts)
    return Partial(value, sum(part.elements for part in parts))
