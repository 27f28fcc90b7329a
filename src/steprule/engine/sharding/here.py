"""A step of sharded parameters, as one process sees it: local parts, and the wholes that it owns.

Rules of elements step the local parts. Rules that need rows, columns, whole matrices or a sum over one
parameter step the whole of it, in the process that owns it. Sums over several parameters are taken over all
processes. What runs either are the runners of plain tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steprule import process_errors
from steprule.engine import plans, views
from steprule.engine.blocks import Region
from steprule.engine.composition import Composition
from steprule.engine.program import phases
from steprule.engine.program.phases import BEFORE_STORING, Part
from steprule.engine.program.program import Program
from steprule.engine.runners import choice, one_by_one
from steprule.engine.runners.reference import Work
from steprule.engine.settled import Settled
from steprule.engine.sharding import exchange, parts
from steprule.engine.sharding.owners import Wholes


def needs_whole(program: Program) -> bool:
    """Whether a step of a parameter with this program needs all of it in one process."""
    alone = any(not x.shared for own in program.kinds for x in own.reductions)
    return alone or any(own.lined or own.needs_matrices for own in program.kinds)


def begin(optimizer: Any) -> Here:
    """Check every gradient of an optimizer with sharded parameters, and bring here what its step needs.

    Raises: what a gradient or a state raises, in all processes alike, before anything is sent.
    """
    own = plans.of(optimizer)
    if own.here is None:
        own.here = Here()
    own.here.collect(optimizer)
    return own.here


class Here:
    """What runners are given in place of the optimizer, with groups of plain tensors in place of its groups."""

    def __init__(self) -> None:
        # For each group of the optimizer, that of the parts which this process counts in sums, and the rest.
        self._groups: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._regions: dict[int, tuple[Any, Region]] = {}
        self._processes: exchange.Processes | None = None
        self._mesh: Any = None
        self.param_groups: list[dict[str, Any]] = []
        self._clear()

    # What collects a step

    def collect(self, optimizer: Any) -> None:
        """Check all gradients and states of an optimizer, and take the parts of them that are here."""
        self._clear()
        self._optimizer = optimizer
        found: list[tuple[dict[str, Any], int, Any, Any, dict[str, Any], bool]] = []
        with torch.no_grad():
            for group in optimizer.param_groups:
                optimizer.check_storage(group)
                given = optimizer.gradients_of(group["params"])
                for param, gradient in zip(group["params"], given, strict=True):
                    if gradient is not None:
                        optimizer.check_gradient(param, gradient, group)
            for group in optimizer.param_groups:
                given = optimizer.gradients_of(group["params"])
                program = optimizer.program(group)
                for place, (param, gradient) in enumerate(zip(group["params"], given, strict=True)):
                    if gradient is not None:
                        whole = needs_whole(program.of(param)) and self._region(param) is not None
                        found.append((group, place, param, gradient, optimizer.state_of(param, group), whole))
            self._find_processes([x[2] for x in found], optimizer)
            arranged = exchange.arranged([x[2] for x in found], [x[3] for x in found])
            self._take(optimizer, found, arranged)
            self.sums = self._sums()

    def _find_processes(self, params: Sequence[Any], optimizer: Any) -> None:
        """The processes that hold the parameters, which must be the same for all of them."""
        meshes = list({id(p.device_mesh): p.device_mesh for p in params if parts.sharded(p)}.values())
        if not meshes or (self._mesh is not None and all(mesh is self._mesh for mesh in meshes)):
            return
        ranks = {tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes}
        if len(ranks) > 1:
            raise process_errors.other_processes(type(optimizer).__name__, sorted(ranks))
        self._mesh = meshes[0]
        self._processes = exchange.Processes(self._mesh)

    def _take(self, optimizer: Any, found: Sequence[Any], arranged: Sequence[Any]) -> None:
        mine: dict[int, list[tuple[int, Tensor, bool]]] = {}
        entries: list[dict[str, Any]] = []
        owned: list[Any] = []
        for (group, place, param, _, state, whole), gradient in zip(found, arranged, strict=True):
            mine.setdefault(id(group), [])
            if whole:
                entries.append({"p": param, "g": gradient} | _tensors(state))
                owned.append((group, place, state))
            else:
                counts = self._counts(param)
                part = self._add(param, gradient, state, self._region(param))
                mine[id(group)].append((place, part, counts))
        if owned:
            self._owned = Wholes(cast(exchange.Processes, self._processes), entries)
            self._wholes = self._owned.collect()
            for number, whole in self._wholes.items():
                group, place, state = owned[number]
                entries_here = {key: whole.get(f"state.{key}", x) for key, x in state.items()}
                part = self._add(whole["p"], whole["g"], entries_here, None)
                mine[id(group)].append((place, part, True))
        self.param_groups = []
        for group in optimizer.param_groups:
            pair = self._groups.setdefault(id(group), ({}, {}))
            names = optimizer.names_in(group)
            for counted, own in zip((True, False), pair, strict=True):
                chosen = sorted((x for x in mine.get(id(group), []) if x[2] == counted), key=lambda x: x[0])
                self._fill(own, group, [(place, part) for place, part, _ in chosen], names)
                self.param_groups.append(own)

    def _add(self, param: Any, gradient: Any, state: Mapping[str, Any], region: Region | None) -> Tensor:
        part = parts.local(param).detach() if parts.sharded(param) else param
        own = parts.PartState((key, parts.local(x)) for key, x in state.items())
        if region is not None:
            own.region = region
        self.state[part] = own
        self._gradients[id(part)] = parts.local(gradient)
        if parts.sharded(param):
            self._moved.append(param)
        return part

    def _fill(
        self, own: dict[str, Any], group: dict[str, Any], chosen: Sequence[tuple[int, Tensor]], names: list[str]
    ) -> None:
        own.clear()
        own.update(group)
        own[phases.PART_OF] = group
        own["params"] = [part for _, part in chosen]
        for key in ("param_names", views.KEY):
            if group.get(key) is not None:
                own[key] = [group[key][place] for place, _ in chosen]
        self._names |= {id(part): names[place] for place, part in chosen}

    def _region(self, param: Any) -> Region | None:
        """Where the part of a parameter is; None if all of it is here."""
        if not parts.sharded(param):
            return None
        spec = param._spec
        known = self._regions.get(id(param))
        if known is None or known[0] is not spec:
            known = self._regions[id(param)] = (spec, parts.region_of(param))
        return None if _everywhere(param) else known[1]

    def _counts(self, param: Any) -> bool:
        """Whether this process counts a parameter in sums: of what is repeated, one process does."""
        if self._processes is None:
            return True
        if not parts.sharded(param):
            return self._processes.here == 0
        return not parts.repeated(param)

    # What a step of it needs

    def prepare(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        """Prepare a step of what is here of a group."""
        counted, repeated = self._groups[id(group)]
        found = self._prepare(counted, after)
        if repeated["params"]:
            found += [part._replace(counts=False) for part in self._prepare(repeated, {})]
        return found

    def _prepare(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        settled = self._settle(group)
        made, left = settled.runner.prepare(self, group, settled.program, after)
        return [*made, one_by_one.prepare_some(self, left, group, after)] if left else made

    def _settle(self, group: dict[str, Any]) -> Settled:
        """What the group's options decide, found again only if they have changed."""
        own_plans = self.plans_now()
        known = own_plans.settled.get(id(group))
        if known is None or not known.holds(group):
            own = self.composition(group)
            runner = choice.choose(own, group).runner
            known = Settled(group, own, runner, self.program(group) if runner.plans else None)
            own_plans.settle(known, group, self.param_groups)
        return known

    def _sums(self) -> exchange.Sums | None:
        """What the processes exchange in this step, or None if that is nothing."""
        if self._processes is None or len(self._processes) == 1:
            return None
        optimizer, words = self._optimizer, dict[Any, str]()
        for group in optimizer.param_groups:
            if any(x is not None for x in optimizer.gradients_of(group["params"])):
                for program in self.program(group).kinds:
                    words |= {phases.key_in(group, x): x.word for x in program.reductions if x.shared}
                    words |= {BEFORE_STORING: ""} if program.may_raise else {}
        if not (words or self._owned):
            return None
        return exchange.Sums(type(optimizer).__name__, self._processes, words, waits=self._owned is not None)

    def leave(self, finished: bool, failed: bool) -> None:
        """End a step, after which nothing is kept alive.

        finished: give back what was made of the wholes, and tell autograd what has changed. failed: tell the
        other processes.
        """
        try:
            if failed and self.sums is not None:
                self.sums.fail()
            elif finished:
                self._finish()
        finally:
            self._clear()

    def _finish(self) -> None:
        if self._owned is not None:
            wholes = {
                place: _given_back(whole, self.state[whole["p"]]) for place, whole in self._wholes.items()
            }
            self._owned.return_(wholes)
        torch.autograd.graph.increment_version(self._moved)

    def _clear(self) -> None:
        # Only while it takes a step: else neither would ever be freed.
        self._optimizer: Any = None
        self.state: dict[Tensor, parts.PartState] = {}
        self._gradients: dict[int, Tensor] = {}
        self._names: dict[int, str] = {}
        self._moved: list[Tensor] = []
        self._owned: Wholes | None = None
        self._wholes: dict[int, dict[str, Any]] = {}
        self.sums: exchange.Sums | None = None
        for own in self.param_groups:
            own["params"] = []

    # What runners ask of an optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

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
        """What a step of these parts is taken with."""
        return list(map(self._gradients.get, map(id, params)))

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a part, which was checked and completed with that of the whole."""
        return self.state[param]

    def check_storage(self, group: dict[str, Any]) -> None:
        """Nothing: it was checked for all processes alike."""

    def check_gradient(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Nothing: it was checked for all processes alike."""

    def checked(self, params: Sequence[Tensor], group: dict[str, Any]) -> list[Work]:
        """These parts with their gradients and states."""
        return [(x, self._gradients[id(x)], self.state[x]) for x in params]

    def names_in(self, group: dict[str, Any]) -> list[str]:
        """How messages refer to the parts of a group."""
        return [self._names[id(x)] for x in group["params"]]

    def name_of(self, param: Tensor) -> str:
        """How messages refer to a part."""
        return self._names[id(param)]


def _everywhere(param: Any) -> bool:
    """Whether all processes hold all of a parameter."""
    pairs = zip(param.device_mesh.shape, param.placements, strict=True)
    return all(number == 1 or placement.is_replicate() for number, placement in pairs)


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {f"state.{key}": x for key, x in state.items() if isinstance(x, Tensor)}


def _given_back(whole: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """What an owner has made of a whole parameter."""
    return {key: state.get(key.removeprefix("state."), x) for key, x in whole.items()}
