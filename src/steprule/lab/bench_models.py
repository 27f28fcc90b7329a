"""What the step is measured on: parameter shapes of known models, or of a user's own model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.nn.parameter import is_lazy

from steprule.lab import tasks
from steprule.lab.errors import LabError, did_you_mean

__all__ = ["MODELS", "BenchModel", "load_model", "mlp"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BenchModel:
    """The shapes of a model's parameters."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def numbers(self) -> int:
        """How many elements the parameters have together."""
        return sum(map(prod, self.shapes))

    def __str__(self) -> str:
        return f"{self.name}, {len(self.shapes)} tensors, {self.numbers:,} elements"


def gpt2() -> list[Shape]:
    """GPT-2 small: 12 blocks of width 768; the output shares its matrix with the embedding."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = [*norm, *attention, *norm, *feed_forward]
    return [(50257, width), (1024, width), *(block * 12), *norm]


def resnet18() -> list[Shape]:
    """ResNet-18 for 1,000 classes: convolutions and the scales and shifts of their batch normalizations."""

    def convolution(inputs: int, outputs: int, size: int) -> list[Shape]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    shapes = convolution(3, 64, 7)
    inputs = 64
    for outputs in (64, 128, 256, 512):
        shapes += convolution(inputs, outputs, 3) + convolution(outputs, outputs, 3)
        if inputs != outputs:
            shapes += convolution(inputs, outputs, 1)
        shapes += convolution(outputs, outputs, 3) * 2
        inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]


def many_small() -> list[Shape]:
    """400 small tensors, where the cost per tensor matters and not the memory's speed."""
    return [(64, 64), (64,)] * 200


def mlp() -> list[Shape]:
    """Four square matrices: the network whose training iterations are measured."""
    return [(1024, 1024)] * 4


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "gpt2": gpt2,
    "resnet18": resnet18,
    "many-small": many_small,
    "mlp": mlp,
}


def load_model(name: str) -> BenchModel:
    """The shapes of the model called `name`, or of what FILE.py:function returns.

    Raises `LabError` if there is no such model or file, or if the function does not return a model.
    """
    if name in MODELS:
        return BenchModel(name, tuple(MODELS[name]()))
    file, colon, function = name.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            raise LabError(f"--model {name} does not say which function: give {name}:FUNCTION.")
        raise LabError(
            f"no model '{name}'. {did_you_mean(name, MODELS)} A model of your own is given as FILE.py:FUNCTION."
        )
    return BenchModel(f"{Path(file).stem}-{function}", _own_shapes(Path(file), function))


def _own_shapes(file: Path, function: str) -> tuple[Shape, ...]:
    made = tasks.made_by(file, function, "a model")
    lazy = [name for name, x in made.named_parameters() if is_lazy(x)] if isinstance(made, nn.Module) else []
    if lazy:
        raise LabError(
            f"{file.name}:{function}() returned a model in which '{lazy[0]}' has no shape yet. Pass an input "
            "through the model before you return it."
        )
    shapes = _shapes_of(made)
    if shapes is None:
        raise LabError(
            f"{file.name}:{function}() returned {_kind(made)}; it must return a torch.nn.Module, or a list of "
            "shapes such as [(64, 64), (64,)]."
        )
    if not sum(map(prod, shapes)):
        raise LabError(f"{file.name}:{function}() returned a model without parameters to train.")
    return shapes


def _shapes_of(made: object) -> tuple[Shape, ...] | None:
    if isinstance(made, nn.Module):
        return tuple(tuple(x.shape) for x in made.parameters() if x.requires_grad)
    if not isinstance(made, (list, tuple)):
        return None
    shapes: list[Shape] = []
    for entry in cast(Iterable[Any], made):
        if not isinstance(entry, (list, tuple)):
            return None
        sizes = tuple(cast(Iterable[Any], entry))
        if not all(type(size) is int and size >= 0 for size in sizes):
            return None
        shapes.append(sizes)
    return tuple(shapes)


def _kind(made: object) -> str:
    kind = type(made).__name__
    return f"a {kind} that holds other things" if kind in ("list", "tuple") else f"a {kind}"
