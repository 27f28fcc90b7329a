"""accelerate: prepared optimizers, accumulation, clipping, mixed precision, saved states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Network, assert_close, assert_same, each_optimizer, examples, needs, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import steprule

pytestmark = [trainer, needs("accelerate")]


@pytest.fixture(autouse=True)
def another_accelerator() -> Iterator[None]:
    """A process has one precision, unless it is made to forget it, as accelerate's own tests do."""
    yield
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def run(
    make: Any, epochs: int, save: Path | None = None, load: Path | None = None, precision: str = "no"
) -> nn.Module:
    """A loop as accelerate's examples have it."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = Network()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = DataLoader(TensorDataset(*examples()), batch_size=8)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    if load:
        accelerator.load_state(load)
    for _ in range(epochs):
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    if save:
        accelerator.save_state(save)
    return accelerator.unwrap_model(model)


def test_the_numbers_of_torch() -> None:
    assert_close(*(weights(run(rule, 4)) for rule in (steprule.AdamW, torch.optim.AdamW)))


@each_optimizer
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run(make: Any, precision: str, tmp_path: Path) -> None:
    straight = run(make, 4, precision=precision)
    run(make, 2, save=tmp_path, precision=precision)
    assert_same(weights(run(make, 2, load=tmp_path, precision=precision)), weights(straight))
