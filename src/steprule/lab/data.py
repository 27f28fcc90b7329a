"""Converts a data set of any of the usual kinds to batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from steprule.lab.arrays import Rows, as_tensor, is_array, is_picture, picture_as_tensor, rows_of
from steprule.lab.errors import LabError, at, failing, told

__all__ = ["Batch", "Batches", "Data", "Items", "as_batches", "as_input", "not_finite"]

PARTS = ("inputs", "targets")
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
    """A data set that returns any of its items as one batch: `fetch(indices)`."""

    length: int
    fetch: Callable[[Tensor], Batch]

    def __len__(self) -> int:
        return self.length


def as_batches(name: str, data: Data) -> Batches:
    """Batches of a map-style data set or of two arrays (X, y); `name` is for messages only."""
    given: Any = data
    if _is_pair_of_arrays(given):
        (inputs, take_inputs), (targets, take_targets) = (
            rows_of(f"the {what} of {name}", part) for what, part in zip(PARTS, given, strict=True)
        )
        if inputs != targets:
            raise LabError(f"{name} is (X, y) with {inputs} inputs but {targets} targets.")
        batches = Batches(inputs, lambda index: _take(name, take_inputs, take_targets, index))
    elif _is_data_set(given):
        with failing(f"len() of {name}"):
            length = len(given)
        batches = Batches(length, lambda index: _read(name, given, index))
    else:
        raise LabError(f"{name} is a {type(data).__name__}; {_advice(given)}")
    if not len(batches):
        raise LabError(f"{name} is empty; training needs at least one item.")
    return batches


def _is_pair_of_arrays(given: Any) -> bool:
    if type(given) not in (tuple, list) or len(given) != 2:
        return False
    arrays = [is_array(part) for part in given]
    # A list next to an array is an array; two lists may also be two items of a data set.
    lists = [isinstance(part, (list, range)) for part in given]
    return any(arrays) and all(array or listed for array, listed in zip(arrays, lists, strict=True))


def _is_data_set(given: Any) -> bool:
    numbered = hasattr(given, "__len__") and hasattr(given, "__getitem__")
    return numbered and not isinstance(given, (Mapping, str, IterableDataset)) and not _is_table(given)


def _is_table(given: Any) -> bool:
    return hasattr(given, "columns") and (hasattr(given, "to_numpy") or hasattr(given, "to_pandas"))


def _advice(given: Any) -> str:
    if isinstance(given, DataLoader):
        return "give its data set, DataLoader.dataset; batches are made here, with --batch-size."
    if isinstance(given, Mapping):
        return "give one of its parts, or two arrays (X, y)."
    if _is_table(given):
        return "give two arrays (X, y), such as (table[inputs].to_numpy(), table[target].to_numpy())."
    return (
        "it must be two arrays (X, y) or a data set with a length and items by number, each of them "
        "(input, target). Collect what can only be iterated over first, with list(…)."
    )


def _take(name: str, inputs: Rows, targets: Rows, index: Tensor) -> Batch:
    with at(lambda: name), failing("reading a batch"):
        return as_input(inputs(index), leading=1), _as_target(targets(index))


def _read(name: str, items: Items, index: Tensor) -> Batch:
    pairs: list[tuple[Tensor, Tensor]] = []
    places = [int(i) for i in index]
    for i in places:
        try:
            item = items[i]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a user's data set may fail in any way
            raise LabError(f"item {i} of {name} cannot be read: {told(error)}.") from error
        pairs.append(_pair(name, i, item))
    inputs, targets = zip(*pairs, strict=True)
    return _stack(name, "inputs", inputs, places), _stack(name, "targets", targets, places)


def _pair(name: str, i: int, item: Any) -> tuple[Tensor, Tensor]:
    with at(lambda: f"item {i} of {name}"), failing("reading it"):
        given, target = _input_and_target(item)
        return as_input(given), _as_target(target)


def _input_and_target(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        fields = cast("Mapping[str, Any]", item)
        inputs = [key for key in INPUT_KEYS if key in fields]
        targets = [key for key in TARGET_KEYS if key in fields]
        if not inputs or not targets:
            raise LabError(
                f"it has the keys {', '.join(map(str, fields))}; it needs one of "
                f"{', '.join(INPUT_KEYS)} and one of {', '.join(TARGET_KEYS)}."
            )
        return fields[inputs[0]], fields[targets[0]]
    if isinstance(item, (tuple, list)):
        parts = cast("Sequence[Any]", item)
        if len(parts) == 2:
            return parts[0], parts[1]
        raise LabError(
            f"it has {len(parts)} parts; it needs (input, target). If the data are two lists X and y, "
            "give (numpy.array(X), numpy.array(y))."
        )
    raise LabError(f"it is of type {type(item).__name__}; it must be (input, target) or a dict.")


def as_input(value: Any, leading: int = 0) -> Tensor:
    """Floats unchanged, bytes as 0 to 1, images with the channel first.

    A float tensor already has torch's layout; bytes and arrays have the channel last unless the
    shape says otherwise. `leading` is the number of dimensions before those of one item.
    """
    if is_picture(value):
        return _as_floats(picture_as_tensor(value))
    tensor = as_tensor(value)
    image = not isinstance(value, Tensor) or tensor.dtype == torch.uint8
    grey = tensor.dtype == torch.uint8 and tensor.ndim - leading == 2
    tensor = _as_floats(tensor)
    if grey:
        return tensor.unsqueeze(leading)
    if image and tensor.ndim - leading == 3 and tensor.shape[leading] not in CHANNELS:
        return tensor.movedim(-1, leading) if tensor.shape[-1] in CHANNELS else tensor
    return tensor


def _as_floats(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint8:
        return tensor.to(torch.get_default_dtype()) / 255
    if tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
        return tensor.to(torch.get_default_dtype())
    return tensor if tensor.is_complex() else tensor.long()


def _as_target(value: Any) -> Tensor:
    # The values of a picture are the classes of its pixels, whatever colours its palette gives them.
    tensor = as_tensor(numpy.array(value) if is_picture(value) else value)
    if tensor.is_complex():
        return tensor
    return tensor.to(torch.get_default_dtype() if tensor.dtype.is_floating_point else torch.int64)


def _stack(name: str, what: str, tensors: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    first = tensors[0]
    for i, tensor in zip(places, tensors, strict=True):
        if tensor.shape != first.shape:
            raise LabError(
                f"the {what} of {name} have different shapes, {tuple(first.shape)} (item {places[0]}) and "
                f"{tuple(tensor.shape)} (item {i}); let the data set give them one shape."
            )
    with failing(f"making a batch of the {what} of {name}"):
        return torch.stack(list(tensors))


def not_finite(batch: Batch) -> tuple[int, str] | None:
    """The first row of a batch that holds NaN or infinity, and where it is; None if none does."""
    for what, tensor in zip(PARTS, batch, strict=True):
        fine = tensor.isfinite().flatten(1).all(1) if tensor.ndim > 1 else tensor.isfinite()
        if not fine.all():
            row = int(fine.logical_not().nonzero()[0])
            nan = bool(tensor[row].isnan().any())
            return row, f"{'NaN' if nan else 'infinity'} in its {what[:-1]}"
    return None
