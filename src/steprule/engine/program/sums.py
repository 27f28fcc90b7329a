"""Sums over tensors, groups and all parameters, and over rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from steprule.engine.blocks import Region
from steprule.engine.program import exact
from steprule.engine.program.exact import Sum
from steprule.engine.sharding import parts


class Partial(NamedTuple):
    """What a reduction came to over some elements, before it is finished.

    A sum, for `norm` one of squares, or the largest element.
    """

    value: Sum | float
    elements: int


def partials(word: str, tensors: Sequence[Tensor], regions: Sequence[Region] | None = None) -> list[Partial]:
    """The part of a reduction that is taken over each of these tensors.

    regions: which part of a whole tensor each of them is; without them all are whole.
    """
    if word == "largest":
        return [Partial(_taken(word, x).item(), x.numel()) for x in tensors]
    plain = [x for x in tensors if not parts.sharded(x)]
    added = iter(exact.of_tensors(plain, word == "norm", regions))
    values = [exact.of_number(_taken(word, x).item()) if parts.sharded(x) else next(added) for x in tensors]
    return [Partial(value, x.numel()) for value, x in zip(values, tensors, strict=True)]


def partial(word: str, x: Tensor, region: Region | None = None) -> Partial:
    """The part of a reduction that is taken over one tensor."""
    return partials(word, [x], None if region is None else [region])[0]


def _taken(word: str, x: Tensor) -> Tensor:
    whole: Tensor = cast(Any, x).full_tensor() if parts.sharded(x) else x
    if word == "largest":
        return torch.amax(whole) if whole.numel() else whole.new_full((), -torch.inf)
    if word == "norm":
        norm: Tensor = cast(Any, torch.linalg).vector_norm(whole, dtype=torch.float64)
        return norm.square()
    return torch.sum(whole, dtype=torch.float64)


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
        if _many_short_columns(x, dimensions):
            return _norms_of_columns(x, dimensions[0])
        return cast(Any, torch).norm(x, dim=dimensions, keepdim=True) if dimensions else x.abs()
    if word == "largest":
        return _largest(x, tuple(range(x.dim())) if dimensions is None else dimensions)
    if dimensions == ():
        return x
    take: Any = torch.mean if word == "mean" else torch.sum
    return take(x) if dimensions is None else take(x, dim=dimensions, keepdim=True)


def _many_short_columns(x: Tensor, dimensions: tuple[int, ...]) -> bool:
    """Whether torch.norm would go one by one through columns of a few elements, as of convolutions."""
    if len(dimensions) != 1 or dimensions[0] % x.dim() == x.dim() - 1:
        return False
    if parts.sharded(x) or not (x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()) or x.requires_grad:
        return False
    length = x.shape[dimensions[0]]
    return 0 < 200 * length**2 < x.numel()


def _norms_of_columns(x: Tensor, dimension: int) -> Tensor:
    """The norms that torch.norm gives: the squares added in order, and the root rounded once."""
    first, *others = x.unbind(dimension)
    total = first * first
    for other in others:
        total += other * other
    # torch's root in single precision may be a unit off.
    return total.double().sqrt().to(x.dtype).unsqueeze(dimension)


def finished(word: str, parts: Iterable[Partial]) -> float:
    """What the parts come to together."""
    value, elements = together(word, parts)
    if not isinstance(value, Sum):
        return value
    result = value.rounded()
    if word == "mean":
        return result / max(1, elements)
    return math.sqrt(result) if word == "norm" and result >= 0 else result


def together(word: str, parts: Iterable[Partial]) -> Partial:
    """What several parts come to, as one part."""
    parts = list(parts)
    elements = sum(part.elements for part in parts)
    if word == "largest":
        values = [cast(float, part.value) for part in parts]
        undefined = [value for value in values if value != value]
        return Partial(undefined[0] if undefined else max(values, default=-math.inf), elements)
    return Partial(reduce(Sum.plus, (cast(Sum, part.value) for part in parts), Sum()), elements)


def counted_elsewhere(part: Partial) -> Partial:
    """What is left of a part that another process counts, too. The largest element may be counted twice."""
    return Partial(Sum() if isinstance(part.value, Sum) else part.value, 0)
