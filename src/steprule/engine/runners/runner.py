"""What every runner is: one way to carry out a step on the tensors of a group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from steprule.engine.composition import Composition
from steprule.engine.program.phases import Part
from steprule.engine.program.program import Program

# What runs a step, and the parameters that are left to the reference.
Prepared = tuple[list[Part], list[Tensor]]


class Runner(ABC):
    """One way to carry out a step. To add one, write a class and put it into `choice.RUNNERS`.

    name: as `explain()` prints it. switch: torch's switch that asks for it. plans: whether it keeps between
    steps what a step needs, so that the group's program is kept, too. unscales: whether its steps can unscale
    gradients and be skipped on the device, as a gradient scaler asks torch's fused optimizers to do.
    """

    name: ClassVar[str]
    switch: ClassVar[str]
    plans: ClassVar[bool] = False
    unscales: ClassVar[bool] = False

    def on(self, device: torch.device) -> bool:
        """Whether it is meant for tensors on this device."""
        return True

    @abstractmethod
    def why_not(self, own: Composition, group: dict[str, Any]) -> str | None:
        """Why it cannot run what this group steps with, or None."""

    @abstractmethod
    def prepare(
        self, optimizer: Any, group: dict[str, Any], program: Program | None, after: dict[str, float]
    ) -> Prepared:
        """Prepare a step of all parameters that it can take, so that nothing in the step raises any more.

        program: the group's, if this runner keeps plans. after: gets the new values of slots that parameters
        share, when the step is taken.
        """

    def explain(self, optimizer: Any, group: dict[str, Any]) -> list[str]:
        """Of the last step: what a reader may want to know."""
        return []


def only_the_reference(rule: Any, group: dict[str, Any]) -> str | None:
    """Why only the reference can run this, whatever the device, or None."""
    if rule.gradients == "rows only":
        return f"{rule.__name__} steps single rows"
    if group.get("differentiable"):
        return "differentiable=True records the step for autograd"
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.requires_grad:
        return "lr requires a gradient"
    return None


@cache
def installed(library: str) -> bool:
    """Whether an optional library can be imported."""
    return find_spec(library) is not None
