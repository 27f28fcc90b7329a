"""The task `digits`: a small convolutional network classifies 1,797 scanned digits."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from steprule.lab.tasks import Task, accuracy

__all__ = ["task"]

SPLIT_SEED = 0
VALIDATION, TEST = 180, 360


def task() -> Task:
    """8 × 8 grey pixels to ten classes, from scikit-learn's copy of the UCI digits."""
    datasets: Any = importlib.import_module("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    digits = torch.tensor(labels)

    # The split is the same for every seed, so that runs of different seeds can be compared.
    shuffled = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SPLIT_SEED))
    sizes = [TEST, VALIDATION, len(digits) - TEST - VALIDATION]
    test, validation, train = torch.split(shuffled, sizes)

    def part(index: Tensor) -> tuple[Tensor, Tensor]:
        return images[index], digits[index]

    return Task(
        model=_network(),
        train=part(train),
        validation=part(validation),
        test=part(test),
        loss=nn.functional.cross_entropy,
        score=accuracy,
        epochs=20,
        batch_size=32,
        threads=1,
        loss_label="cross-entropy (nats)",
        facts={"data": "scikit-learn digits, UCI optical recognition of handwritten digits"},
    )


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
