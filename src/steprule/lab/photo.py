"""The task `photo`: a small network learns one photograph, from pixel position to colour."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steprule.lab.tasks import Score, Task

__all__ = ["task"]

SPLIT_SEED = 0
WAVES, SHORTEST, WIDTH = 128, 1 / 64, 128

psnr = Score(
    "PSNR",
    "dB",
    nn.functional.mse_loss,
    lambda error: -10 * math.log10(error) if error > 0 else math.inf,
)


def task() -> Task:
    """Position to colour: scikit-learn's china.jpg at half size, a tenth each for validation and test."""
    datasets: Any = importlib.import_module("sklearn.datasets")
    full = torch.tensor(datasets.load_sample_image("china.jpg")).float() / 255
    photo = nn.functional.avg_pool2d(full.permute(2, 0, 1), 2).permute(1, 2, 0)
    height, width, _ = photo.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = (torch.stack([columns, rows], dim=-1).reshape(-1, 2) + 0.5) * (2 / width) - 1
    colours = photo.reshape(-1, 3)

    shuffled = torch.randperm(len(places), generator=torch.Generator().manual_seed(SPLIT_SEED))
    tenth = len(places) // 10
    sizes = [tenth, tenth, len(places) - 2 * tenth]
    test, validation, train = torch.split(shuffled, sizes)

    def part(index: Tensor) -> tuple[Tensor, Tensor]:
        return places[index], colours[index]

    def finish(model: nn.Module, folder: Path) -> None:
        with torch.no_grad():
            fitted = torch.cat([model(some) for some in torch.split(places, 1 << 14)]).view_as(photo)
        _save_beside(photo, fitted, folder / "picture.png")

    return Task(
        model=FourierNetwork(),
        train=part(train),
        validation=part(validation),
        test=part(test),
        loss=nn.functional.mse_loss,
        score=psnr,
        epochs=25,
        batch_size=512,
        threads=1,
        loss_label="mean squared error (colours 0 to 1)",
        finish=finish,
        facts={"data": "china.jpg of scikit-learn, CC BY 2.0"},
    )


class FourierNetwork(nn.Module):
    """A position, encoded as waves of random direction and length, then three hidden layers to a colour."""

    waves: Tensor

    def __init__(self) -> None:
        super().__init__()
        direction = torch.rand(WAVES) * 2 * math.pi
        length = SHORTEST ** torch.rand(WAVES)
        waves = torch.stack([direction.cos(), direction.sin()]) * math.pi / length
        self.register_buffer("waves", waves)
        self.network = nn.Sequential(
            nn.Linear(2 * WAVES, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 3),
            nn.Sigmoid(),
        )

    def forward(self, places: Tensor) -> Tensor:
        """(…, 2) positions from -1 to 1, to (…, 3) colours from 0 to 1."""
        angles = places @ self.waves
        return self.network(torch.cat([angles.sin(), angles.cos()], dim=-1))


def _save_beside(original: Tensor, fitted: Tensor, file: Path) -> None:
    """Write one PNG: the photograph on the left, the network's version on the right."""
    image: Any = importlib.import_module("PIL.Image")
    gap = torch.ones(original.shape[0], 8, 3)
    pixels = (torch.cat([original, gap, fitted], dim=1) * 255).round().to(torch.uint8)
    image.fromarray(pixels.numpy()).save(file)
