"""What the options of a group decide: its composition, its runner and its program.

To find them takes as long as a small step, so they are kept between steps, together with all that they were
made from. A schedule changes numbers that decide nothing.
"""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import Tensor

from steprule.engine.composition import Composition
from steprule.engine.program.program import Program
from steprule.engine.runners import choice
from steprule.engine.runners.runner import Runner


class Settled:
    """What was found for a group, and for which options."""

    def __init__(
        self, group: dict[str, Any], composition: Composition, runner: Runner, program: Program | None
    ):
        self.composition = composition
        self.runner = runner
        self.program = program
        self._keys = list(group)
        self._place = self._keys.index("params")
        values = self._of(group)
        # Those can change without another object in their place.
        self._lasts = program is not None and not any(isinstance(x, (Tensor, dict)) for x in values)
        self._values = values if self._lasts else []
        self._first = _first(group)

    def holds(self, group: dict[str, Any]) -> bool:
        """Whether everything that it depends on is as it was."""
        if not self._lasts or list(group) != self._keys or _first(group) != self._first:
            return False
        values = self._of(group)
        if not all(map(is_, values, self._values)):
            pairs = zip(self._keys, values, self._values, strict=True)
            if not all(new is old or self._may_change(key, new, old) for key, new, old in pairs):
                return False
            self._values = values
        return True

    def _of(self, group: dict[str, Any]) -> list[Any]:
        """The values of the options. Parameters must not live longer because of what is kept here."""
        values = list(group.values())
        values[self._place] = None
        return values

    def _may_change(self, key: str, new: Any, old: Any) -> bool:
        # Numbers that are no fields are counts and sums that steps leave in the group, or notes.
        field = self.composition.fields.get(key)
        number = field is None or not (field.static or field.decay)
        return number and type(new) is float and type(old) is float


def of_group(stepping: Any, group: dict[str, Any]) -> Settled:
    """What a group's options decide, found again only if they have changed.

    stepping: the optimizer, or what stands for it in a step of sharded parameters.
    """
    own = stepping.plans_now()
    known = own.settled.get(id(group))
    if known is None or not known.holds(group):
        composition = stepping.composition(group)
        runner = choice.choose(composition, group).runner
        known = Settled(group, composition, runner, stepping.program(group) if runner.plans else None)
        own.settle(known, group, stepping.param_groups)
    return known


def _first(group: dict[str, Any]) -> Any:
    """What the choice of a runner depends on besides the options."""
    params = group["params"]
    return (params[0].dtype, params[0].device) if params else None
