"""The Trainer of transformers: an optimizer by class, by name, given ready, and from a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from small import Network, assert_close, assert_same, each_optimizer, examples, needs, trainer, weights
from torch import Tensor, nn

import steprule

pytestmark = [trainer, needs("transformers"), needs("accelerate")]


class Model(nn.Module):
    """The network with the loss inside, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.network(x), labels)}


def trained(folder: Path, steps: int, resume: bool = False, given: Any = None, **options: Any) -> Model:
    """The model after some steps; `options` go to the Trainer, `given` makes an optimizer of parameters."""
    import transformers

    model = Model()
    x, y = examples()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        save_steps=6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    if given:
        options["optimizers"] = (given(model.parameters()), None)
    made = transformers.Trainer(model=model, args=arguments, train_dataset=rows, **options)
    made.train(resume_from_checkpoint=resume)
    return model


def test_the_numbers_of_torch(tmp_path: Path) -> None:
    """With the groups that the Trainer makes of a class."""
    made = [
        trained(tmp_path / rule.__module__, 9, optimizer_cls_and_kwargs=(rule, {"lr": 0.01}))
        for rule in (steprule.AdamW, torch.optim.AdamW)
    ]
    assert_close(*map(weights, made))


def test_a_rule_by_its_name(tmp_path: Path) -> None:
    """By the name of the class with the Trainer's groups, and by a name that stands for a rule with modifiers.

    What is no class is called without arguments, then with the model.
    """
    lion = steprule.catalogue()["Lion"], {"lr": 1e-3}
    by_class = trained(tmp_path / "class", 6, optimizer_cls_and_kwargs=lion)
    ready = trained(tmp_path / "ready", 6, given=lambda p: steprule.Lion(p, lr=1e-3, weight_decay=0.1))
    assert_same(weights(by_class), weights(ready))
    for name in ("muon", "adamw+global_norm_clip+ema"):
        factory = lambda name=name: partial(steprule.create, name)  # noqa: E731
        model = trained(tmp_path / name, 6, optimizer_cls_and_kwargs=(factory, {"lr": 0.01}))
        first = Model().network.layers[0].weight
        assert not torch.allclose(model.network.layers[0].weight, first, rtol=1e-3)


@each_optimizer
def test_a_resumed_run(make: Any, tmp_path: Path) -> None:
    straight = trained(tmp_path / "straight", 12, given=make)
    trained(tmp_path, 6, given=make)
    assert_same(weights(trained(tmp_path, 12, resume=True, given=make)), weights(straight))
