"""The random number generators: seeding, saving and restoring them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

__all__ = ["order_of_epoch", "random_state", "seed_everything", "set_random_state"]


def order_of_epoch(length: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits its items; it depends only on seed and epoch."""
    # torch's generator uses only the low 32 bits of a seed, so both are mixed there.
    mixed = seed * 1_000_003 + epoch
    return torch.randperm(length, generator=torch.Generator().manual_seed(mixed))


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and the standard library, which a user's own data may draw from."""
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    numpy.random.seed(seed)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of the three global generators in plain numbers and tensors."""
    numpy_state: Any = numpy.random.get_state()
    name, keys, *rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the three global generators to what `random_state()` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    random.setstate(state["python"])
