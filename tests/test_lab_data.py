"""Data sets of the usual kinds become the same batches."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import scipy.sparse
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from steprule.lab.data import Data, as_batches
from steprule.lab.errors import LabError
from steprule.lab.randomness import order_of_epoch

COLOURS = numpy.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=numpy.uint8)
EXPECTED = torch.tensor(COLOURS).permute(0, 3, 1, 2).float() / 255
LABELS = [4, 1]


class OneAtATime:
    """Items by number, no slices, as Hugging Face data sets and torchvision's give them."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        assert type(index) is int
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield 1.0, 0

    def __len__(self) -> int:
        return 1


def pictures() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in COLOURS]


def data_of_every_kind() -> Iterator[Any]:
    yield "two arrays", (COLOURS, numpy.array(LABELS))
    yield "two tensors", (EXPECTED, torch.tensor(LABELS))
    yield "two tensors in a list", [EXPECTED, torch.tensor(LABELS)]
    yield "bytes, channel first", (torch.tensor(COLOURS).permute(0, 3, 1, 2), torch.tensor(LABELS))
    yield "doubles", (EXPECTED.double(), torch.tensor(LABELS, dtype=torch.int32))
    yield "torch", TensorDataset(EXPECTED, torch.tensor(LABELS))
    yield "list of tuples", [*zip(EXPECTED, LABELS, strict=True)]
    yield "pictures", OneAtATime([*zip(pictures(), LABELS, strict=True)])
    yield "arrays", OneAtATime([*zip(COLOURS, LABELS, strict=True)])
    yield "float arrays", OneAtATime([*zip(COLOURS / 255, LABELS, strict=True)])
    for given in ("image", "img", "pixel_values", "x"):
        for target in ("label", "labels", "y"):
            items = [{given: p, target: n} for p, n in zip(pictures(), LABELS, strict=True)]
            yield f"{given} and {target}", OneAtATime(items)


@pytest.mark.parametrize(("kind", "data"), [*data_of_every_kind()])
def test_all_kinds_of_data_give_the_same_batch(kind: str, data: Data) -> None:
    batches = as_batches("train", data)
    assert len(batches) == 2
    inputs, targets = batches.fetch(torch.tensor([1, 0]))
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    torch.testing.assert_close(inputs, EXPECTED.flip(0))
    assert targets.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Image.new("L", (4, 3), 51), torch.full((1, 3, 4), 0.2)),
        (Image.new("RGBA", (4, 3), (51, 51, 51, 51)), torch.full((4, 3, 4), 0.2)),
        (Image.new("P", (4, 3)), torch.zeros(3, 3, 4)),
        (numpy.full((3, 4), 51, dtype=numpy.uint8), torch.full((1, 3, 4), 0.2)),
        (numpy.full((6, 5, 1), 51, dtype=numpy.uint8), torch.full((1, 6, 5), 0.2)),
        (torch.full((6, 5, 3), 0.2), torch.full((6, 5, 3), 0.2)),
        (numpy.ones((6, 5)), torch.ones(6, 5)),
        ([1.0, 2.0], torch.tensor([1.0, 2.0])),
        (torch.tensor([1, 2]), torch.tensor([1, 2])),
        (torch.tensor([True, False]), torch.tensor([1.0, 0.0])),
        (3.5, torch.tensor(3.5)),
    ],
)
def test_one_input(given: Any, expected: torch.Tensor) -> None:
    inputs, _ = as_batches("train", [(given, 0)]).fetch(torch.tensor([0]))
    torch.testing.assert_close(inputs, expected[None])


class OnlySlices:
    """As an array in an HDF5 file: rows by number, and no others."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, (int, slice)):
            raise TypeError("Indexing elements must be in increasing order")
        return self.array[key]


class Frame:
    """As a DataFrame: [] selects columns."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.columns = array, array.shape, ["a", "b"]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, key: Any) -> Any:
        raise KeyError(key)

    def to_numpy(self) -> Any:
        return self.array


class Series(Frame):
    """As a Series whose index is not 0, 1, 2, …: [] selects labels."""

    def __getitem__(self, key: Any) -> Any:
        return self.array[numpy.asarray(key) - 100]


TABLE = numpy.arange(15.0).reshape(5, 3)
CLASSES = numpy.array([3, 1, 4, 1, 5])


def arrays_of_every_kind() -> Iterator[Any]:
    yield "bytes in memory", memoryview(TABLE), memoryview(CLASSES)
    yield "array", memoryview(TABLE), array("l", CLASSES.tolist())
    yield "list", TABLE, CLASSES.tolist()
    yield "lists beside an array", TABLE.tolist(), CLASSES
    yield "range", TABLE, range(5)
    yield "only slices", OnlySlices(TABLE), OnlySlices(CLASSES)
    yield "data frame", Frame(TABLE), Series(CLASSES)
    yield "objects", TABLE.astype(object), CLASSES.astype(object)
    yield "other byte order", TABLE.astype(">f8"), CLASSES.astype(">i4")
    yield "backwards", TABLE[::-1][::-1], CLASSES[::-1][::-1]
    yield "16 bits without a sign", TABLE.astype(numpy.uint16), CLASSES.astype(numpy.uint16)
    yield "long doubles", TABLE.astype(numpy.longdouble), CLASSES.astype(numpy.uint64)
    yield "half precision", TABLE.astype(numpy.float16), CLASSES.astype(numpy.int8)
    yield "columns first", numpy.asfortranarray(TABLE), CLASSES
    yield "a mask that masks nothing", numpy.ma.masked_array(TABLE), CLASSES
    yield "a tensor that learns", torch.tensor(TABLE, requires_grad=True), torch.tensor(CLASSES)
    yield "torch's 16 bits", torch.tensor(TABLE.astype(numpy.uint16)), torch.tensor(CLASSES).to(torch.uint16)
    for layout in ("csr", "csc", "coo", "lil", "dok", "bsr"):
        yield f"scipy {layout} matrix", getattr(scipy.sparse, f"{layout}_matrix")(TABLE), CLASSES
        yield f"scipy {layout} array", getattr(scipy.sparse, f"{layout}_array")(TABLE), CLASSES
    yield "torch coo", torch.tensor(TABLE).to_sparse(), torch.tensor(CLASSES)


@pytest.mark.parametrize(("kind", "inputs", "targets"), [*arrays_of_every_kind()])
def test_arrays_of_every_kind_are_taken_by_position(kind: str, inputs: Any, targets: Any) -> None:
    batches = as_batches("train", (inputs, targets))
    assert len(batches) == 5
    for rows in ([4, 0, 0, 2], [3]):
        given, target = batches.fetch(torch.tensor(rows))
        whole = "16 bits" in kind
        assert given.dtype == (torch.int64 if whole else torch.float32)
        assert target.dtype == torch.int64
        assert not given.requires_grad
        assert given.tolist() == TABLE[rows].tolist()
        assert target.tolist() == (rows if kind == "range" else CLASSES[rows].tolist())


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ((TABLE, numpy.array(["cat", "dog", "cat", "dog", "cat"])), "targets of train: 'cat' is a string"),
        ((TABLE, ["cat", "dog", "cat", "dog", "cat"]), "numpy.unique(strings, return_inverse=True)[1]"),
        ([(1.0, "cat")], "item 0 of train: 'cat' is a string"),
        (
            (numpy.array([[1.0, None]], object), CLASSES[:1]),
            "the inputs of train: 'None' of type NoneType at [0, 1]",
        ),
        (
            (TABLE, CLASSES.astype("datetime64[D]")),
            "targets of train: values of type datetime64[D] are not numbers",
        ),
        ((numpy.ma.masked_equal(TABLE, 4), CLASSES), "inputs of train: a masked array has masked values"),
        ((TABLE, CLASSES[:4]), "train is (X, y) with 5 inputs but 4 targets"),
        ((numpy.float64(3), CLASSES), "the inputs of train are a single number"),
        ((TABLE[:0], CLASSES[:0]), "train is empty"),
        ((scipy.sparse.csr_array(TABLE), CLASSES[:4]), "5 inputs but 4 targets"),
        (Frame(TABLE), "train is a Frame; give two arrays (X, y), such as (table[inputs].to_numpy()"),
        ({"x": TABLE, "y": CLASSES}, "train is a dict; give one of its parts, or two arrays"),
        (DataLoader(TensorDataset(torch.ones(3))), "train is a DataLoader; give its data set"),
        (Stream(), "train is a Stream; it must be two arrays (X, y) or a data set"),
        ((TABLE.tolist(), CLASSES.tolist()), "item 0 of train: it has 5 parts; it needs (input, target)"),
        ("digits", "train is a str"),
        (TensorDataset(torch.ones(3, 2)), "item 0 of train: it has 1 parts"),
        ([(1.0, 2), None], "item 1 of train: it is of type NoneType"),
        ([([1.0, [2.0]], 0)], "item 0 of train: a list cannot be converted to a tensor"),
    ],
)
def test_what_cannot_be_used_is_named(data: Any, told: str) -> None:
    def fetch_all() -> None:
        batches = as_batches("train", data)
        batches.fetch(torch.arange(len(batches)))

    with pytest.raises(LabError) as error:
        fetch_all()
    assert told in str(error.value)


def test_a_data_set_whose_length_lies() -> None:
    class Lies(OneAtATime):
        def __len__(self) -> int:
            return 4

    with pytest.raises(LabError, match=r"item 2 of train cannot be read: IndexError"):
        as_batches("train", Lies([(1.0, 0), (2.0, 1)])).fetch(torch.arange(4))


@pytest.mark.parametrize("kind", [Subset, ConcatDataset])
def test_parts_of_torch_data_sets(kind: Any) -> None:
    whole = TensorDataset(torch.arange(6.0)[:, None], torch.arange(6))
    part = Subset(whole, [4, 2]) if kind is Subset else ConcatDataset([whole, whole])
    _, targets = as_batches("train", part).fetch(torch.tensor([1, 0]))
    assert targets.tolist() == ([2, 4] if kind is Subset else [1, 0])


GREY = numpy.array([[0, 255, 256], [1000, 40000, 65535]])


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.fromarray(GREY.astype(numpy.uint16)), GREY[None]),
        (Image.fromarray(GREY.astype(numpy.int32)), GREY[None]),
        (Image.fromarray((GREY / 7).astype(numpy.float32)), (GREY / 7)[None]),
        (Image.frombytes("I;16B", (3, 2), GREY.astype(">u2").tobytes()), GREY[None]),
        (Image.fromarray(GREY > 255), (GREY > 255)[None]),
        (Image.new("LA", (3, 2), (51, 102)), numpy.array([0.2, 0.4])[:, None, None].repeat(2, 1).repeat(3, 2)),
        (
            Image.new("CMYK", (3, 2), (0, 255, 255, 0)),
            numpy.array([1.0, 0, 0])[:, None, None].repeat(2, 1).repeat(3, 2),
        ),
    ],
)
def test_pictures_keep_their_values(picture: Any, expected: Any) -> None:
    inputs, _ = as_batches("train", [(picture, 0)]).fetch(torch.tensor([0]))
    torch.testing.assert_close(inputs[0], torch.tensor(expected, dtype=torch.float32))


def test_a_palette_is_colours_in_an_input_and_classes_in_a_target() -> None:
    picture = Image.new("P", (3, 2), 1)
    picture.putpalette([0, 0, 0, 255, 0, 51])
    inputs, targets = as_batches("train", [(picture, picture)]).fetch(torch.tensor([0]))
    assert inputs[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert targets[0].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_targets_that_are_no_classes_become_floats() -> None:
    _, targets = as_batches("train", (numpy.ones((2, 3)), numpy.array([0.5, 1.5]))).fetch(torch.tensor([1]))
    assert targets.dtype == torch.float32
    assert targets.tolist() == [1.5]


def test_a_read_only_array_is_copied_without_a_warning() -> None:
    pixels = numpy.zeros((4, 4), dtype=numpy.uint8)
    pixels.flags.writeable = False
    inputs, _ = as_batches("train", [(pixels, 0)]).fetch(torch.tensor([0]))
    assert inputs.shape == (1, 1, 4, 4)


def test_the_order_depends_on_seed_and_epoch_and_misses_nothing() -> None:
    orders = {tuple(order_of_epoch(9, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == [*range(9)] for order in orders)
    assert torch.equal(order_of_epoch(9, 2, 3), order_of_epoch(9, 2, 3))
