"""Data sets of the usual kinds become the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from steprule.lab.data import Data, as_batches
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
