"""What runners are given in place of an optimizer, where other tensors than its parameters are stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from steprule.engine import plans, settled
from steprule.engine.composition import Composition
from steprule.engine.program.phases import Part
from steprule.engine.program.program import Program
from steprule.engine.runners import one_by_one
from steprule.engine.runners.reference import Work
from steprule.engine.sharding.parts import PartState


def prepared(stepping: Any, group: dict[str, Any], after: dict[str, float]) -> tuple[list[Part], list[Tensor]]:
    """The parts of a step of a group, and what its runner has left to the reference.

    stepping: the optimizer, or what stands in for it.
    """
    decided = settled.of_group(stepping, group)
    made, left = decided.runner.prepare(stepping, group, decided.program, after)
    return ([*made, one_by_one.prepare_some(stepping, left, group, after)] if left else made), left


class StandIn:
    """Tensors in place of parameters, with their gradients and states, in groups of their own.

    What it is not asked for itself, the optimizer says. All was checked before, for the parameters.
    """

    def __init__(self) -> None:
        self._optimizer: Any = None
        self.state: dict[Tensor, PartState] = {}
        self.param_groups: list[dict[str, Any]] = []
        self._gradients: dict[int, Tensor] = {}
        # How messages refer to the tensors of a group, by the group's id.
        self._names: dict[int, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def prepared(self, group: dict[str, Any], after: dict[str, float]) -> tuple[list[Part], list[Tensor]]:
        """The parts of a step of one of its groups, and what the runner has left to the reference."""
        return prepared(self, group, after)

    def plans_now(self) -> plans.Plans:
        """The plans for the step that is being prepared."""
        own, resting = plans.of(self), self._optimizer._resting
        return own.resting.setdefault(resting, plans.Plans()) if resting else own

    def composition(self, group: Mapping[str, Any]) -> Composition:
        """The rule of a group with all that the group adds to it."""
        return self._optimizer.composition(group)

    def program(self, group: Mapping[str, Any]) -> Program:
        """The traced step of a group."""
        return self._optimizer.program(group)

    def gradients_of(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """What a step of these tensors is taken with."""
        return list(map(self._gradients.get, map(id, params)))

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a tensor, which was completed with that of the parameter."""
        return self.state[param]

    def check_storage(self, group: dict[str, Any]) -> None:
        """Nothing: it was checked."""

    def check_gradient(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Nothing: it was checked."""

    def checked(self, params: Sequence[Tensor], group: dict[str, Any]) -> list[Work]:
        """These tensors with their gradients and states."""
        return [(x, self._gradients[id(x)], self.state[x]) for x in params]

    def names_in(self, group: dict[str, Any]) -> list[str]:
        """How messages refer to the tensors of a group."""
        return self._names[id(group)]

    def name_of(self, param: Tensor) -> str:
        """How messages refer to one of them."""
        for group in self.param_groups:
            for place, other in enumerate(group["params"]):
                if other is param:
                    return self._names[id(group)][place]
        raise AssertionError("only what is stepped here has a name")
