"""How the matrices lie in a parameter: a convolution, a stack of experts, several projections in one weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor


@dataclass(frozen=True)
class View:
    """How the matrices lie in a parameter of two dimensions and more.

    flatten: the first dimension is that of the rows, and all others together are the columns; otherwise the
    last two are a matrix, and the others a stack of them. split: the sizes of parts that are matrices of their
    own, along the rows, or along the columns if dim is 1. heads: into how many equal matrices each part is
    split further, along the same dimension. transpose: what the parameter has as rows are the columns.
    """

    flatten: bool = False
    split: tuple[int, ...] = ()
    dim: int = 0
    heads: int = 1
    transpose: bool = False

    @property
    def plain(self) -> bool:
        """Whether the matrices lie one after the other in memory, each row by row."""
        return not self.transpose and (self.dim == 0 or self.parts == 1)

    @property
    def parts(self) -> int:
        """How many matrices each matrix of the parameter is split into."""
        return max(1, len(self.split)) * self.heads

    def matrices(self, x: Tensor, leading: int = 0) -> Tensor:
        """The matrices, in the last two dimensions of a tensor of two or three; it shares memory where it can.

        leading: how many dimensions come before those of the parameter.
        """
        if self.flatten:
            x = x.flatten(leading + 1)
        if self.parts > 1:
            along = x.dim() - 2 + self.dim
            x = cast(Any, x).unflatten(along, (self.parts, x.size(along) // self.parts)).movedim(along, -3)
        if self.transpose:
            x = x.mT
        return x.flatten(0, -3) if x.dim() > 3 else x

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what `matrices` makes of a parameter of this shape."""
        rows, columns = shape[-2], shape[-1]
        stack = 1
        for size in shape[:-2]:
            stack *= size
        if self.flatten:
            rows, columns, stack = shape[0], stack * rows * columns // shape[0] if shape[0] else 0, 1
        sizes = [rows, columns]
        sizes[self.dim] //= self.parts
        stack *= self.parts
        lead = () if stack == 1 and (self.flatten or len(shape) == 2) else (stack,)
        return (*lead, *(reversed(sizes) if self.transpose else sizes))


AS_IT_IS = View()


def of(group: Mapping[str, Any], param: Tensor) -> View:
    """How the matrices lie in a parameter of this group."""
    return AS_IT_IS
