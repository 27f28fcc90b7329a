"""Ignite: its trainer, its checkpoints, and its schedules of group entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small import Network, assert_close, assert_same, each_optimizer, examples, needs, trainer, weights
from torch import nn

import steprule

pytestmark = [trainer, needs("ignite")]


def run(make: Any, epochs: int, folder: Path | None = None, resume: bool = False) -> nn.Module:
    """Train with Ignite's trainer; save each epoch in a folder, or go on from what is there."""
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.handlers.param_scheduler import LinearCyclicalScheduler

    model = Network()
    optimizer = make(model.parameters())
    engine = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
    schedule = LinearCyclicalScheduler(optimizer, "lr", 0.02, 0.01, cycle_size=16)
    engine.add_event_handler(Events.ITERATION_STARTED, schedule)
    kept = {"model": model, "optimizer": optimizer, "trainer": engine, "schedule": schedule}
    if resume and folder:
        Checkpoint.load_objects(kept, torch.load(next(folder.glob("*.pt"))))
    elif folder:
        saver = Checkpoint(kept, DiskSaver(folder), n_saved=1)
        engine.add_event_handler(Events.EPOCH_COMPLETED, saver)
    x, y = examples()
    engine.run(list(zip(x.split(16), y.split(16), strict=True)), max_epochs=epochs)
    return model


def test_the_numbers_of_torch() -> None:
    assert_close(*(weights(run(rule, 3)) for rule in (steprule.AdamW, torch.optim.AdamW)))


@each_optimizer
def test_a_resumed_run(make: Any, tmp_path: Path) -> None:
    straight = run(make, 4)
    run(make, 2, tmp_path)
    assert_same(weights(run(make, 4, tmp_path, resume=True)), weights(straight))
