"""From a data set of any of the usual kinds to batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from steprule.lab.errors import LabError, told

__all__ = ["Batch", "Batches", "Data", "Items", "as_batches"]

INPUT_KEYS = ("image", "img", "pixel_values", "x")
TARGET_KEYS = ("label", "labels", "y")
CHANNELS = (1, 3, 4)


class Items(Protocol):
    """What torch's map-style data sets, lists and Hugging Face data sets have in common."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


Data = Items | tuple[Any, Any]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Batches:
    """A data set that hands out any of its items as one batch: `fetch(indices)`."""

    length: int
    fetch: Callable[[Tensor], Batch]

    def __len__(self) -> int:
        return self.length


def as_batches(name: str, data: Data) -> Batches:
    """Batches of a map-style data set or of two arrays (X, y); `name` is for messages only."""
    given: Any = data
    if type(given) in (tuple, list) and len(given) == 2 and all(map(_is_array, given)):
        x, y = given
        if len(x) != len(y):
            raise LabError(f"{name} is (X, y) with {len(x)} inputs but {len(y)} targets.")
        batches = Batches(
            len(x), lambda index: (_as_input(_take(x, index), leading=1), _as_target(_take(y, index)))
        )
    elif hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        batches = Batches(len(given), lambda index: _read(name, given, index))
    else:
        raise LabError(
            f"{name} is a {type(data).__name__}; it must be two arrays (X, y) or a data set with a "
            "length, whose items are (input, target)."
        )
    if not len(batches):
        raise LabError(f"{name} is empty; training needs at least one item.")
    return batches


def _take(array: Any, index: Tensor) -> Any:
    # An array takes a tensor with one number for a plain number, and would drop the dimension.
    return array[index] if isinstance(array, Tensor) else array[index.numpy()]


def _read(name: str, items: Items, index: Tensor) -> Batch:
    pairs: list[tuple[Tensor, Tensor]] = []
    for i in map(int, index):
        try:
            item = items[i]
        except Exception as error:  # a user's data set may fail in any way
            raise LabError(f"item {i} of {name} cannot be read: {told(error)}") from error
        given, target = _input_and_target(name, item)
        pairs.append((_as_input(given), _as_target(target)))
    inputs, targets = zip(*pairs, strict=True)
    return _stack(name, "inputs", inputs), _stack(name, "targets", targets)


def _input_and_target(name: str, item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        fields = cast("Mapping[str, Any]", item)
        inputs = [key for key in INPUT_KEYS if key in fields]
        targets = [key for key in TARGET_KEYS if key in fields]
        if not inputs or not targets:
            raise LabError(
                f"an item of {name} has the keys {', '.join(map(str, fields))}; it needs one of "
                f"{', '.join(INPUT_KEYS)} and one of {', '.join(TARGET_KEYS)}."
            )
        return fields[inputs[0]], fields[targets[0]]
    if isinstance(item, (tuple, list)):
        parts = cast("Sequence[Any]", item)
        if len(parts) == 2:
            return parts[0], parts[1]
        raise LabError(f"an item of {name} has {len(parts)} parts; it needs (input, target).")
    raise LabError(
        f"the items of {name} are of type {type(item).__name__}; they must be (input, target) or dicts."
    )


def _as_input(value: Any, leading: int = 0) -> Tensor:
    """Floats as they are, bytes as 0 to 1, images with the channel first.

    A float tensor already has torch's layout; bytes and arrays have the channel last unless the
    shape says otherwise. `leading` counts the dimensions before those of one item.
    """
    tensor = _as_tensor(value)
    image = not isinstance(value, Tensor) or tensor.dtype == torch.uint8
    grey = tensor.dtype == torch.uint8 and tensor.ndim - leading == 2
    if tensor.dtype == torch.uint8:
        tensor = tensor.to(torch.get_default_dtype()) / 255
    elif tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
        tensor = tensor.to(torch.get_default_dtype())
    if grey:
        return tensor.unsqueeze(leading)
    if image and tensor.ndim - leading == 3 and tensor.shape[leading] not in CHANNELS:
        return tensor.movedim(-1, leading) if tensor.shape[-1] in CHANNELS else tensor
    return tensor


def _as_target(value: Any) -> Tensor:
    tensor = _as_tensor(value)
    floating = tensor.dtype.is_floating_point
    return tensor.to(torch.get_default_dtype() if floating else torch.int64)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "convert") and hasattr(value, "mode"):
        import numpy

        known = value.mode in ("L", "RGB", "RGBA")
        pixels = torch.tensor(numpy.array(value if known else value.convert("RGB")))
        return pixels.movedim(-1, 0) if pixels.ndim == 3 else pixels
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabError(f"a {type(value).__name__} cannot be made a tensor: {error}") from error


def _stack(name: str, what: str, tensors: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        first, second = sorted(shapes)[:2]
        raise LabError(
            f"the {what} of {name} have different shapes, {first} and {second}; let the data set "
            "bring them to one shape."
        )
    return torch.stack(list(tensors))


def _is_array(part: object) -> bool:
    return hasattr(part, "shape") and hasattr(part, "__getitem__")
