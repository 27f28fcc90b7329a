"""Matrices of unequal sizes in one parameter, as queries, keys and values of grouped attention are.

Each step, every piece stands in for a parameter: rows of it, of its gradient and of its state. So pieces have
their own scalars and are in batches with their equals, like parameters that are stored apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from steprule import group_errors
from steprule.engine import plans, views
from steprule.engine.blocks import Region
from steprule.engine.composition import Composition
from steprule.engine.program import phases
from steprule.engine.program.phases import Part
from steprule.engine.program.program import Program
from steprule.engine.sharding.parts import PartState
from steprule.engine.stand_in import StandIn, prepared
from steprule.engine.views import View


def why_not(own: Composition, program: Program, group: Mapping[str, Any]) -> str | None:
    """Why a rule with its modifiers cannot step the pieces of this group's parameters, or None."""
    for slot in own.slots.values():
        if slot.has_elements and slot.per not in ("element", "row"):
            return f"its state '{slot.key}' is one for the whole weight"
        if slot.per == "row" and any(x and _unequal(x) and x["transpose"] for x in group[views.KEY]):
            return f"its state '{slot.key}' is one per row, and transposed matrices share their rows"
    of_vectors = program.of_vectors.kinds if program.of_vectors else ()
    of_matrices = [kind for kind in program.kinds if not any(kind is x for x in of_vectors)]
    if any(not x.shared for kind in of_matrices for sweep in kind.passes for x in sweep.reductions):
        # Without sums, what is kept once per weight depends on counts alone: all pieces have the same.
        single = [slot.key for slot in own.slots.values() if slot.per_tensor and not slot.shared]
        return f"its state '{single[0]}' is one for the whole weight" if single else None
    return None


def unequal(group: Mapping[str, Any]) -> bool:
    """Whether a parameter of a group has matrices of unequal sizes."""
    given = group.get(views.KEY)
    return given is not None and any(x is not None and _unequal(x) for x in given)


def _unequal(view: Mapping[str, Any]) -> bool:
    return isinstance(view["split"], tuple)


def prepare(stepping: Any, group: dict[str, Any], after: dict[str, float]) -> tuple[list[Part], list[Tensor]]:
    """Prepare a step of a group in pieces.

    stepping: the optimizer, or what stands in for it.
    """
    return of(stepping, group).prepare(stepping, group, after)


def of(stepping: Any, group: dict[str, Any]) -> Pieces:
    """What stands in for a group in its steps."""
    own = plans.of(stepping)
    if id(group) not in own.pieces:
        own.keep_pieces(Pieces(), group, stepping.param_groups)
    return own.pieces[id(group)]


class Pieces(StandIn):
    """The parameters of one group, those with unequal matrices in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self._group: dict[str, Any] = {}
        self._stepping: Any = lambda: None

    @property
    def _optimizer(self) -> Any:
        # The optimizer keeps this for as long as it lives itself.
        return self._stepping()

    @_optimizer.setter
    def _optimizer(self, value: Any) -> None:
        """Nothing: it is set by each step."""

    def prepare(
        self, stepping: Any, group: dict[str, Any], after: dict[str, float]
    ) -> tuple[list[Part], list[Tensor]]:
        """Prepare a step of all pieces that have gradients."""
        self._stepping = weakref.ref(stepping)
        self._group.clear()
        self._group.update(group)
        params: list[Tensor] = group["params"]
        given = stepping.gradients_of(params)
        stepping.check_storage(group)
        for param, gradient in zip(params, given, strict=True):
            if gradient is not None:
                stepping.check_gradient(param, gradient, group)
        pieces: list[tuple[int, Tensor, View, str]] = []
        for place, (param, gradient, name) in enumerate(
            zip(params, given, stepping.names_in(group), strict=True)
        ):
            if gradient is not None:
                state = stepping.state_of(param, group)
                pieces += self._cut(place, param, gradient, state, views.at(group, place), name)
        self._group[phases.PART_OF] = group.get(phases.PART_OF, group)
        places = group.get(phases.PLACES, range(len(params)))
        self._group[phases.PLACES] = [places[place] for place, *_ in pieces]
        self._group["params"] = [piece for _, piece, _, _ in pieces]
        self._group[views.KEY] = [asdict(view) for _, _, view, _ in pieces]
        if "param_names" in group:
            self._group["param_names"] = [name for *_, name in pieces]
        self._names = {id(self._group): [name for *_, name in pieces]}
        self.param_groups = [self._group]
        found = prepared(self, self._group, after)
        self.state, self._gradients = {}, {}  # a step that is prepared has what it needs
        return found

    def explain(self, runner: Any) -> list[str]:
        """What the runner says of the last step."""
        return runner.explain(self, self._group) if self._group else []

    def _cut(
        self, place: int, param: Tensor, gradient: Tensor, state: dict[str, Any], view: View, name: str
    ) -> list[tuple[int, Tensor, View, str]]:
        if not isinstance(view.split, tuple):
            own = PartState(state)
            own.region, own.source = getattr(state, "region", None), state
            self.state[param], self._gradients[id(param)] = own, gradient
            return [(place, param, view, name)]
        ends = list(accumulate(view.split))
        if len(param) != ends[-1] or (param.dim() > 2 and not view.flatten):
            given = f"split={view.split!r}, {ends[-1]} together"
            allowed = f"{len(param)} together, the rows of {name}"
            raise group_errors.wrong_view(self.who(self._group), given, allowed, None)
        found: list[tuple[int, Tensor, View, str]] = []
        for number, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            piece = param.detach()[first:end]
            own = PartState((key, _rows(x, param, first, end, number)) for key, x in state.items())
            shape = tuple(param.shape)
            own.region = Region(shape, tuple(piece.shape), (first, *(0 for _ in shape[1:])))
            own.alone, own.source = True, None if number else state
            self.state[piece], self._gradients[id(piece)] = own, gradient[first:end]
            found.append((place, piece, replace(view, split=1), f"{name}, rows {first} to {end - 1}"))
        return found


def _rows(entry: Any, param: Tensor, first: int, end: int, number: int) -> Any:
    """What of a state entry belongs to these rows. Counts and keys go on once, with the first piece."""
    if not isinstance(entry, Tensor):
        return entry
    if entry.dim() and len(entry) == len(param):
        return entry[first:end]
    return entry.clone() if number else entry
