"""What of a tensor is in this process.

A step sees the local part of a DTensor, never the DTensor: its kernels, lists and loops are those of plain
tensors. A `Region` says which elements of the whole these are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steprule import process_errors
from steprule.engine import blocks
from steprule.engine.blocks import Region


def kind() -> Any:
    """The class of sharded tensors, or None if nobody can have any, since nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which this process may hold only a part."""
    dtensor = kind()
    return dtensor is not None and isinstance(tensor, dtensor)


def any_sharded(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any parameter of these groups is a DTensor."""
    dtensor = kind()
    return dtensor is not None and any(isinstance(x, dtensor) for group in groups for x in group["params"])


def split(tensor: Any) -> bool:
    """Whether it is a DTensor that no process holds completely."""
    if not sharded(tensor):
        return False
    pairs = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return any(number > 1 and not placement.is_replicate() for number, placement in pairs)


def local(tensor: Any) -> Any:
    """This process's part, without a tape or a dispatch; anything that is no DTensor as it is."""
    if not sharded(tensor):
        return tensor
    part: Any = tensor._local_tensor
    # What a collective is still filling has to be waited for.
    return part.wait() if hasattr(part, "wait") and type(part) is not Tensor else part


def region_of(tensor: Any, coordinate: Sequence[int] | None = None) -> Region:
    """Which elements of a tensor are here, or in the process at another coordinate of its mesh."""
    if not sharded(tensor):
        return blocks.whole(tensor.shape)
    mesh = tensor.device_mesh
    at = mesh.get_coordinate() if coordinate is None else coordinate
    return region_at(tuple(tensor.shape), tensor.placements, tuple(mesh.shape), tuple(at))


def region_at(
    shape: Sequence[int], placements: Sequence[Any], mesh: Sequence[int], at: Sequence[int]
) -> Region:
    """Which elements of a tensor are in the process at this coordinate of a mesh of this shape."""
    held: list[Any] = [range(size) for size in shape]
    for placement, here, processes in zip(placements, at, mesh, strict=True):
        if placement.is_shard() or hasattr(placement, "split_factor"):
            held[placement.dim] = _share(held[placement.dim], placement, here, processes)
    ranges = list(map(_as_range, held))
    return Region(tuple(shape), tuple(map(len, ranges)), tuple(x.start for x in ranges))


def _share(held: Any, placement: Any, here: int, processes: int) -> Any:
    """Which of these indices a process holds, before later dimensions of the mesh share them further."""
    factor = getattr(placement, "split_factor", 1)
    if factor == 1 and isinstance(held, range):
        size = -(-len(held) // processes)
        return held[min(here * size, len(held)) : min((here + 1) * size, len(held))]
    vector = torch.arange(held.start, held.stop) if isinstance(held, range) else held
    pieces = vector.chunk(factor) if len(vector) else (vector,)
    shares = [x.chunk(processes) if len(x) else () for x in pieces]
    own = [x[here] for x in shares if here < len(x)]
    return torch.cat(own) if own else vector[:0]


def _as_range(held: Any) -> range:
    if isinstance(held, range):
        return held
    if not len(held):
        return range(0)
    start, stop = int(held[0]), int(held[-1]) + 1
    if stop - start != len(held):
        raise process_errors.in_strides()
    return range(start, stop)


def within(region: Region) -> tuple[slice, ...]:
    """What takes a part out of the whole tensor."""
    return tuple(slice(x, x + size) for x, size in zip(region.first, region.shape, strict=True))


def repeated(tensor: Any) -> bool:
    """Whether another process holds the same part of a DTensor and comes before this one."""
    at = tensor.device_mesh.get_coordinate()
    return any(x.is_replicate() and here for x, here in zip(tensor.placements, at, strict=True))


class PartState(dict[str, Any]):
    """The state of one parameter as a step sees it: the local parts of its entries, and where they are."""

    region: Region | None = None
    # Whether it is stepped as if it were a parameter: then only codes and what is random go by the whole.
    alone = False
    # The state that it is of. Where a count or a key in it is replaced, it is replaced there, too.
    source: dict[str, Any] | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if self.source is not None and isinstance(value, Tensor) and not value.dim():
            self.source[key] = value


def region_in(state: Mapping[str, Any]) -> Region | None:
    """Where the parameter of this state is in the whole one; None if all of it is here."""
    return getattr(state, "region", None)


def is_piece(state: Mapping[str, Any]) -> bool:
    """Whether the tensor of this state is stepped as if it were a parameter, though it is part of one."""
    return getattr(state, "alone", False)


def shape_of(param: Tensor, state: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    region = region_in(state)
    return tuple(param.shape) if region is None or is_piece(state) else region.whole


def like(tensor: Any, part: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor of this shape of which this is the part here, if it is sharded as another one is.

    It may have the other one's dimensions and more.
    """
    if not sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    stride = _row_by_row(shape)
    if tuple(shape[: tensor.dim()]) == tuple(tensor.shape):
        more = shape[tensor.dim() :]
        stride = [*(x * math.prod(more) for x in tensor.stride()), *_row_by_row(more)]
    layout = {"shape": torch.Size(shape), "stride": tuple(stride), "run_check": False}
    return cast(Any, DTensor).from_local(part, tensor.device_mesh, tensor.placements, **layout)


def stacked(tensor: Any, part: Tensor, shape: Sequence[int]) -> Tensor:
    """As `like`, with one more dimension before the others, which counts tensors that are sharded alike."""
    if not sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    def later(placement: Any) -> Any:
        if placement.is_replicate():
            return placement
        more = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
        return type(placement)(placement.dim + 1, **more)

    layout = {"shape": torch.Size(shape), "stride": tuple(_row_by_row(shape)), "run_check": False}
    placements = list(map(later, tensor.placements))
    return cast(Any, DTensor).from_local(part, tensor.device_mesh, placements, **layout)


def in_order(x: Tensor, like: Tensor) -> Tensor:
    """These elements, in the order in memory of those of another tensor."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


def full(like: Any, shape: Sequence[int], dtype: torch.dtype, whole: Tensor | None = None) -> Tensor:
    """A tensor of another shape that is sharded over the same processes as a DTensor, along its longest side.

    whole: its elements; zeros if left out.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    along = max(range(len(shape)), key=lambda d: shape[d])
    placements = [Replicate() if x.is_replicate() else Shard(along) for x in like.placements]
    layout = {"shape": torch.Size(shape), "stride": tuple(_row_by_row(shape)), "run_check": False}
    empty = torch.empty(0, dtype=dtype, device=local(like).device)
    made: Any = cast(Any, DTensor).from_local(empty, like.device_mesh, placements, **layout)
    region = region_of(made)
    part = (
        empty.new_zeros(region.shape)
        if whole is None
        else whole[within(region)].to(empty.device, dtype).clone()
    )
    return cast(Any, DTensor).from_local(part, like.device_mesh, placements, **layout)


def _row_by_row(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]
