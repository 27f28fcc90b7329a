"""What a step of sharded parameters finds as the last one left it: then nothing is checked or taken again.

Of many small tensors, to check them and to take their parts takes longer than the step itself. All comparisons
here are loops in C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not
from typing import Any

from torch import Tensor

from steprule.engine.sharding import parts

_local, _spec = attrgetter("_local_tensor"), attrgetter("_spec")
_NONE: dict[str, Any] = {}


class Kept:
    """The parameters, gradients and states of one group, as a step found them.

    decided: what the group's options decide. given: the gradients. states: by parameter.
    """

    def __init__(self, decided: Any, group: Mapping[str, Any], given: Sequence[Any], states: Mapping[Any, Any]):
        self._decided = decided
        self._params = list(map(id, group["params"]))
        self._present = [x is not None for x in given]
        params, gradients = self._with_gradients(group["params"], given)
        entries = [x for p in params for x in states[p].values()]
        sharded = parts.kind()
        # A plain number is another object after each step.
        self._lasts = all(type(x) is sharded for x in (*params, *gradients)) and all(
            isinstance(x, Tensor) for x in entries
        )
        if self._lasts:
            self._specs = list(map(_spec, gradients))
            self._lasts = self._specs == list(map(_spec, params))
            self._parts = list(map(_local, params))
            self._entries = list(map(id, entries))
            self._cut = [type(x) is sharded for x in entries]
            self._locals = list(map(_local, compress(entries, self._cut)))

    def again(
        self, decided: Any, group: Mapping[str, Any], given: Sequence[Any], states: Mapping[Any, Any]
    ) -> list[tuple[Tensor, Tensor]] | None:
        """The part of each parameter that has a gradient, and that of the gradient.

        None if anything besides the gradients' elements is not as it was.
        """
        if not self._lasts or decided is not self._decided:
            return None
        if list(map(id, group["params"])) != self._params:
            return None
        if list(map(is_not, given, repeat(None))) != self._present:
            return None
        params, gradients = self._with_gradients(group["params"], given)
        try:
            own: list[dict[str, Any]] = list(map(states.get, params, repeat(_NONE)))
            entries = [*chain.from_iterable(x.values() for x in own)]
            now = map(_local, compress(entries, self._cut))
            if (
                list(map(_spec, gradients)) != self._specs
                or not all(map(is_, map(_local, params), self._parts))
                or list(map(id, entries)) != self._entries
                or not all(map(is_, now, self._locals))
            ):
                return None
            found = list(map(_local, gradients))
        except (AttributeError, KeyError):  # not a DTensor, or no state
            return None
        # What a collective is still filling has another type.
        return None if set(map(type, found)) - {Tensor} else list(zip(self._parts, found, strict=True))

    def _with_gradients(self, params: Sequence[Any], given: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return list(compress(params, self._present)), list(compress(given, self._present))
