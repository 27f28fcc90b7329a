"""A small model with its data, and what every trainer has to get right with an optimizer of steprule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steprule

# Of each kind of state one: torch's slots, codes with scales, groups of two rules, and slots beside parameters.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": partial(steprule.AdamW, lr=0.01),
    "AdamW in int8": partial(steprule.AdamW, lr=0.01, state_dtype="int8"),
    "Muon": partial(steprule.Muon, lr=0.01),
    "Prodigy": steprule.Prodigy,
    "AdamW with an average": partial(steprule.AdamW, lr=0.01, modifiers=[steprule.EMA(0.9)]),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
# Trainers warn about what they find, or do not find, on a machine.
trainer = pytest.mark.filterwarnings("ignore")


def needs(package: str) -> pytest.MarkDecorator:
    """Skips tests of a package that is not installed; it is imported only where they run."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


class Network(nn.Module):
    """A classifier of eight numbers in three classes, large enough for codes of 8 bits."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        # No biases, so that every rule can step every parameter.
        self.layers = nn.Sequential(nn.Linear(8, 520, bias=False), nn.Tanh(), nn.Linear(520, 3, bias=False)).to(
            dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.layers(x)


def examples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """64 inputs and their classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    return x.to(dtype), (x @ torch.randn(8, 3, generator=generator)).argmax(1)


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_same(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    """Whether all are equal, to the bit."""
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


def assert_close(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    """Whether all are equal except for the last bits, and not as they were at first."""
    for x, y, first in zip(found, wanted, Network().parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(x, first.to(x.dtype), rtol=1e-3)
