"""Lightning: automatic and manual optimization, clipping, its precisions, resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import Network, assert_close, assert_same, each_optimizer, examples, needs, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import steprule

pytestmark = [trainer, needs("lightning")]


def run(
    make: Any, epochs: int, folder: Path, load: str | None = None, manual: bool = False, **options: Any
) -> Any:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()
            self.automatic_optimization = not manual

        def training_step(self, batch: Any) -> Any:
            x, y = batch
            loss = nn.functional.cross_entropy(self.network(x.to(self.dtype)).float(), y)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = make(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

        def on_train_epoch_end(self) -> None:
            if manual:
                self.lr_schedulers().step()

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    model = Classifier()
    fitting = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=folder, **{**quiet, **options}
    )
    data = DataLoader(TensorDataset(*examples()), batch_size=16)
    fitting.fit(model, data, ckpt_path=load)
    if fitting.checkpoint_callback:
        fitting.save_checkpoint(folder / "last.ckpt")
    return model.network


def test_the_numbers_of_torch(tmp_path: Path) -> None:
    clip = {"gradient_clip_val": 0.5, "enable_checkpointing": False}
    assert_close(*(weights(run(rule, 3, tmp_path, **clip)) for rule in (steprule.AdamW, torch.optim.AdamW)))


def test_manual_optimization_is_the_same(tmp_path: Path) -> None:
    one, other = (
        run(steprule.AdamW, 2, tmp_path, manual=manual, enable_checkpointing=False) for manual in (False, True)
    )
    assert_same(weights(one), weights(other))


@each_optimizer
def test_a_resumed_run(make: Any, tmp_path: Path) -> None:
    straight = run(make, 4, tmp_path / "straight", enable_checkpointing=False)
    run(make, 2, tmp_path)
    resumed = run(make, 4, tmp_path, load=str(tmp_path / "last.ckpt"))
    assert_same(weights(resumed), weights(straight))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str, tmp_path: Path) -> None:
    options = {"precision": precision, "enable_checkpointing": False}
    first = Network().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    made = [weights(run(rule, 2, tmp_path, **options)) for rule in (steprule.AdamW, torch.optim.AdamW)]
    for x, y, before in zip(*made, first.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=5e-3)
        assert not torch.equal(x.to(before.dtype), before)
