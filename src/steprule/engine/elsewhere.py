"""Steps with other tensors in the place of the parameters: parts of them, or their copies in main memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

# What the other tensors are wanted for; a step reads gradients, and moves parameters.
Purpose: TypeAlias = Literal["look", "move", "step"]


class Elsewhere:
    """What an optimizer's `elsewhere` is, if something else is stepped in the place of its parameters.

    state_is: where the state is, for messages.
    """

    state_is: ClassVar[str]

    def __init__(self) -> None:
        self._places: Mapping[int, Any] = {}

    def check(self, optimizer: Any, group: dict[str, Any], index: int) -> None:
        """Refuse a group that cannot be stepped so."""
        raise NotImplementedError

    def inside(self, optimizer: Any, to: Purpose = "look") -> AbstractContextManager[None]:
        """In the `with` block, the optimizer has the other tensors."""
        raise NotImplementedError

    def cut_state(self, optimizer: Any) -> None:
        """Inside, make loaded state what it is for the other tensors."""

    def replica(self, other: Tensor) -> Tensor | None:
        """In a step, the parameter in whose place this is, if every process has all of it and its gradient."""
        return None

    def owned(self, other: Tensor, owner: int, new: Tensor | None) -> None:
        """Be told which process has stepped all of a parameter, and in that process, with what result.

        other: what is in the parameter's place.
        """
        raise NotImplementedError

    def told(self, group: dict[str, Any]) -> list[str]:
        """What `explain()` says of it in a group."""
        return []

    def _exchange(self, optimizer: Any, others: Mapping[int, Tensor]) -> None:
        """Put other tensors in the place of those with these ids."""
        for group in optimizer.param_groups:
            group["params"][:] = [others.get(id(x), x) for x in group["params"]]
        kept = ((others.get(id(x), x), state) for x, state in optimizer.state.items())
        optimizer.state = defaultdict(dict, kept)
        optimizer._places, self._places = self._places, optimizer._places
