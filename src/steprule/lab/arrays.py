"""Converts arrays, numbers and pictures of any library to tensors with the same values."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from numbers import Number
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from steprule.lab.errors import LabError, at, failing

__all__ = ["Rows", "as_tensor", "is_array", "is_picture", "picture_as_tensor", "rows_of"]

Rows = Callable[[Tensor], Any]

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
GREY = ("1", "L", "I", "F")
COLOUR = ("RGB", "RGBA", "LA", "LAB")


def is_array(part: object) -> bool:
    """Whether this is an array of rows, and not one item of a data set."""
    return hasattr(part, "shape") or isinstance(part, (memoryview, array))


def rows_of(name: str, rows: Any) -> tuple[int, Rows]:
    """How many rows an array has, and how to take any of them by position.

    name: what to call it in messages. Raises `LabError` if it has no rows.
    """
    with at(lambda: name), failing("reading them"):
        taken = _in_memory(rows)
        shape = tuple(int(size) for size in taken.shape)
    if not shape:
        raise LabError(f"{name} are a single number; there must be a row for each item.")
    return shape[0], _taker(name, taken, shape)


def _in_memory(given: Any) -> Any:
    """Views, lists and tables as a numpy array; what may be larger than memory stays as it is."""
    rows: Any = given
    if isinstance(given, Tensor):
        return rows
    if hasattr(rows, "tocsr"):  # SciPy's sparse formats
        return rows.tocsr()
    if hasattr(rows, "to_numpy"):  # pandas, polars
        rows = rows.to_numpy()
    elif isinstance(rows, (memoryview, array, list, tuple, range)):
        rows = numpy.asarray(_listed(rows))
    # Objects and strings are checked now, so that unusable values are found before the run.
    if not isinstance(rows, numpy.ndarray):
        return rows
    held = cast("Any", rows)
    odd = held.dtype.kind not in "biufc" or numpy.ma.isMaskedArray(held)
    return _numbers(held) if odd else held


def _taker(name: str, rows: Any, shape: tuple[int, ...]) -> Rows:
    if isinstance(rows, Tensor):
        dense = rows.layout == torch.strided
        # Only the coordinate format can be indexed by rows.
        kept = rows.detach() if dense else rows.detach().to_sparse_coo()
        return lambda index: kept[index] if dense else kept.index_select(0, index).to_dense()
    if isinstance(rows, numpy.ndarray):
        numbers = cast("Any", rows)
        return lambda index: numbers[index.numpy()]
    if hasattr(rows, "tocsr"):
        return lambda index: rows[index.numpy()].toarray()

    def one_by_one(index: Tensor) -> Any:
        # The arrays of files (HDF5, Zarr) have rows by number, but not always by a list of numbers.
        taken = [numpy.asarray(rows[int(i)]) for i in index]
        if taken[0].shape != shape[1:]:
            raise LabError(
                f"{name} are a {type(rows).__name__} whose [0] is not its first row; give a numpy array."
            )
        return numpy.stack(taken)

    return one_by_one


def as_tensor(value: Any) -> Tensor:
    """A number, list, array or tensor as a tensor of the same values. Raises `LabError` if it cannot."""
    if isinstance(value, Tensor):
        tensor = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        return tensor.long() if tensor.dtype in UNSIGNED else tensor
    try:
        return torch.tensor(_numbers(value if hasattr(value, "dtype") else numpy.asarray(_listed(value))))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise LabError(f"a {type(value).__name__} cannot be converted to a tensor: {error}") from error


def _listed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [v.numpy(force=True) if isinstance(v, Tensor) else v for v in cast("list[Any]", value)]
    return value


def _numbers(value: Any) -> Any:
    """The same numbers in a dtype and layout that torch accepts. Raises `LabError` if they are not numbers."""
    if numpy.ma.isMaskedArray(value) and numpy.ma.getmaskarray(value).any():
        raise LabError("a masked array has masked values; fill them first, with .filled(…).")
    numbers = numpy.asarray(value)
    if numbers.dtype == object:
        numbers = numpy.asarray(numbers.tolist())
    kind = numbers.dtype.kind
    if kind == "O":
        _refuse_what_is_no_number(numbers)
    elif kind in "SU":
        raise LabError(
            f"{str(numbers.reshape(-1)[0])!r} is a string. Give classes as numbers: "
            "numpy.unique(strings, return_inverse=True)[1]."
        )
    elif kind not in "biufc":
        raise LabError(f"values of type {numbers.dtype} are not numbers; convert them to floats.")
    if kind == "O" or (kind == "f" and numbers.dtype.itemsize > 8):
        numbers = numbers.astype(numpy.float64)
    elif kind == "u" and numbers.dtype.itemsize > 1:  # torch computes with signed integers only
        numbers = numbers.astype(numpy.int64)
    # Not ascontiguousarray, which gives a single number a dimension.
    return numpy.array(numbers, dtype=numbers.dtype.newbyteorder("="), order="C")


def _refuse_what_is_no_number(objects: Any) -> None:
    for place, found in numpy.ndenumerate(objects):
        if not isinstance(found, Number):
            at = f" at {list(place)}" if place else ""
            raise LabError(
                f"{str(found)[:40]!r} of type {type(found).__name__}{at} cannot be converted to a tensor."
            )


def is_picture(value: object) -> bool:
    """Whether this is one of Pillow's images."""
    return hasattr(value, "convert") and hasattr(value, "mode")


def picture_as_tensor(picture: Any) -> Tensor:
    """Channels first; colours are bytes, grey of more than 8 bits (I, I;16, F) keeps its values as floats.

    Palettes, print colours and the like become red, green and blue, with alpha where they have it.
    """
    mode = str(picture.mode)
    if mode.startswith("I;") or mode in GREY:
        numbers = as_tensor(numpy.array(picture))
        return numbers.unsqueeze(0) if mode == "L" else numbers.to(torch.get_default_dtype()).unsqueeze(0)
    if mode not in COLOUR:
        clear = mode in ("PA", "La", "RGBa") or "transparency" in picture.info
        picture = picture.convert("RGBA" if clear else "RGB")
    return as_tensor(numpy.array(picture)).movedim(-1, 0)
