"""fastai: its one-cycle schedule, saved learners, bfloat16."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from small import Network, assert_close, assert_same, each_optimizer, examples, needs, trainer, weights
from torch import nn
from torch.utils.data import TensorDataset

import steprule

pytestmark = [trainer, needs("fastai")]


def learner(make: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    import fastai.callback.schedule  # noqa: F401 - which adds fit_one_cycle
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    data = DataLoaders(*(DataLoader(TensorDataset(*examples(dtype)), bs=16) for _ in range(2)))
    return Learner(
        data,
        Network(dtype),
        # Not in bfloat16, in which fastai cannot smooth what it prints.
        loss_func=lambda scores, y: nn.functional.cross_entropy(scores.float(), y),
        opt_func=partial(OptimWrapper, opt=make),
        path=folder,
        lr=0.01,
    )


def run(make: Any, folder: Path, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Train with a schedule that writes lr and betas into the groups."""
    made = learner(make, folder, dtype)
    made.fit_one_cycle(3, 0.01)
    return weights(made.model)


def test_the_numbers_of_torch(tmp_path: Path) -> None:
    assert_close(*(run(rule, tmp_path) for rule in (steprule.AdamW, torch.optim.AdamW)))


@each_optimizer
def test_a_resumed_run(make: Any, tmp_path: Path) -> None:
    straight = learner(make, tmp_path)
    straight.fit(4, 0.01)
    first = learner(make, tmp_path)
    first.fit(2, 0.01)
    first.save("half", with_opt=True)
    resumed = learner(make, tmp_path)
    resumed.load("half", with_opt=True)
    resumed.fit(2, 0.01)
    assert_same(weights(resumed.model), weights(straight.model))


def test_parameters_in_bfloat16(tmp_path: Path) -> None:
    made = [run(rule, tmp_path, torch.bfloat16) for rule in (steprule.AdamW, torch.optim.AdamW)]
    for x, y in zip(*made, strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x, y, rtol=0.02, atol=5e-3)
