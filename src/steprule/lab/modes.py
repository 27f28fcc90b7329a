"""Which parts of a model learn: train and eval mode, part by part, as the user left them."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from steprule.lab.data import Batches
from steprule.lab.errors import LabError, at, failing
from steprule.lab.optimizers import switch_weights
from steprule.lab.step import output_of

__all__ = ["Modes", "give_shapes", "parts_in_eval_mode"]


class Modes:
    """The mode that each part of a model was given in, restored after every evaluation.

    A model that is in eval mode as a whole, as pretrained models are, is put into train mode. If only a part is
    in eval mode, that is taken to be on purpose.
    """

    def __init__(self, model: nn.Module) -> None:
        if not any(part.training for part in model.modules()):
            with failing("model.train()"):
                model.train()
        self._model = model
        self._given = [(part, part.training) for part in model.modules()]

    @contextmanager
    def evaluating(self, optimizer: Optimizer) -> Generator[None]:
        """Eval mode and no gradients inside the block."""
        with failing("model.eval()"):
            self._model.eval()
        switch_weights(optimizer, training=False)
        try:
            with torch.no_grad():
                yield
        finally:
            with failing("model.train()"):
                self._put_back()
            switch_weights(optimizer, training=True)

    def _put_back(self) -> None:
        # Call train() rather than set the flag: a model's own train() may do more, such as unmerge weights.
        for part, training in self._given[:1]:
            part.train(training)
        for part, training in self._given:
            if part.training != training:
                part.train(training)


def parts_in_eval_mode(model: nn.Module) -> list[str]:
    """The outermost parts that stay in eval mode inside a model that is in train mode."""
    found: list[str] = []
    for name, part in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        if not part.training and not any(not outer or name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return [name for name in found if name]


def give_shapes(model: nn.Module, data: Batches) -> None:
    """Give lazy modules one item, so that they know the shapes of their parameters.

    Raises `LabError` if some still have no shape.
    """
    if not _without_shape(model):
        return
    modes = [(part, part.training) for part in model.modules()]
    given, _ = data.fetch(torch.tensor([0]))
    model.eval()
    with at(lambda: "item 0 of train"), torch.no_grad():
        output_of(model, given)
    for part, training in modes:
        part.training = training
    missing = _without_shape(model)
    if missing:
        raise LabError(f"{', '.join(missing)} of the model has no shape yet, and forward() does not use it.")


def _without_shape(model: nn.Module) -> list[str]:
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]
