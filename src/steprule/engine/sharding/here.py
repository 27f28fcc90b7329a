"""A step of sharded parameters, as one process sees it: local parts, and the wholes that it owns.

Rules of elements step the local parts; sums are taken over all processes. So do rules on matrices, except for
words on whole matrices, which the owner of a parameter carries out. Rules that need rows or columns step the
whole of a parameter, in the process that owns it, and so does what no kernel steps. What runs either are the
runners of plain tensors. Only kernels on the CPU can take part in sums over one parameter: others step the
whole, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, compress, repeat
from operator import is_not
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from steprule import errors, process_errors
from steprule.engine import pieces, plans, settled, stand_in, views
from steprule.engine.blocks import Region
from steprule.engine.program import phases
from steprule.engine.program.phases import BEFORE_STORING, OnMatrices, Part
from steprule.engine.program.program import Program
from steprule.engine.runners.kernels.runner import FLOATS, Kernels
from steprule.engine.sharding import exchange, owners, parts
from steprule.engine.sharding.kept import Kept
from steprule.engine.sharding.operands import Operands, Where
from steprule.engine.sharding.owners import Routes
from steprule.engine.sharding.parts import PartState
from steprule.engine.stand_in import StandIn
from steprule.engine.views import View


def needs_whole(program: Program, param: Any, runner: Any, view: View) -> bool:
    """Whether a step of a parameter with this program needs all of it in one process.

    Kernels can step parts of matrices, and take part in sums over one parameter. view: how the matrices lie in
    it. Unequal ones are stepped as parameters of their own, for which all has to be there.
    """
    in_order = isinstance(runner, Kernels) and param.is_contiguous() and param.dtype in FLOATS
    takes_part = in_order and not isinstance(view.split, tuple)
    return (_adds_up(program) and not in_order) or any(
        own.lined or (own.needs_matrices and not takes_part) for own in program.choices
    )


def explain(optimizer: Any, group: dict[str, Any], runner: Any) -> list[str]:
    """How a group with sharded parameters steps, and what its last step sent."""
    here: Here | None = plans.of(optimizer).here
    program, params = optimizer.program(group), group["params"]
    split = [(i, p) for i, p in enumerate(params) if parts.split(p)]
    left = [p for i, p in split if not needs_whole(program.of(p), p, runner, views.at(group, i))]
    matrices = sum(_on_matrices(program.of(p)) for p in left)
    whole, elements = len(split) - len(left), len(left) - matrices
    meshes = [p.device_mesh.mesh.numel() for p in params if parts.sharded(p)]
    how = {
        "stepped as parts": elements,
        "as parts, except for words on matrices": matrices,
        "as a whole, by the process that owns it": whole,
    }
    said = [f"{errors.counted(count, 'parameter')} {text}" for text, count in how.items() if count]
    over = f"{max(meshes)} process{'es' * (max(meshes) > 1)}"
    lines = [f"sharded over {over}: {', '.join(said) or 'each has all of them'}"]
    return lines if here is None else lines + here.told(group, runner, bool(whole or matrices))


def begin(optimizer: Any) -> Here:
    """Check every gradient of an optimizer with sharded parameters, and bring here what its step needs.

    Raises: what a gradient or a state raises, in all processes alike, before anything is sent.
    """
    own = plans.of(optimizer)
    if own.here is None:
        own.here = Here()
    try:
        own.here.collect(optimizer)
    except BaseException:
        own.here.leave(finished=False, failed=False)
        raise
    return own.here


class _Checked(NamedTuple):
    """What was found out about the parameters of a group that have gradients, and from what.

    seen: from what. places: theirs in the group. whole: whether each has to be stepped as a whole. regions:
    where its part is; None if all of it is here. counts: whether this process counts it in sums: of what is
    repeated, one process does.
    """

    seen: list[Any]
    places: list[int]
    whole: list[bool]
    regions: list[Region | None]
    counts: list[bool]
    names: list[str]


class _Taken(NamedTuple):
    """A tensor that is stepped here: its place in the group, itself, and whether this process counts it."""

    place: int
    tensor: Tensor
    counts: bool


class Here(StandIn):
    """What runners are given in place of the optimizer, with groups of plain tensors in place of its groups."""

    def __init__(self) -> None:
        super().__init__()
        # For each group of the optimizer, that of the parts which this process counts in sums, and the rest.
        self._groups: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._checked: dict[int, _Checked] = {}
        # By mesh, which is kept so that no other one gets its id, and by ranks.
        self._meshes: dict[int, tuple[Any, exchange.Processes]] = {}
        self._processes: dict[tuple[int, ...], exchange.Processes] = {}
        self._together: exchange.Processes | None = None
        self._routes: dict[tuple[int, ...], Routes] = {}
        # Who owns which of the entries below.
        self._owner: dict[tuple[int, ...], list[int]] = {}
        self._operands = Operands()
        # Of whole parameters, in one step: how many this process owns, and how many bytes it sends.
        self._owned = self._sent = 0
        self._brought: dict[int, int] = {}
        self._kept: list[Kept] = []
        self._words: dict[Any, str] = {}
        self._clear()

    # What collects a step

    def collect(self, optimizer: Any) -> None:
        """Check all gradients and states of an optimizer, and take the parts of them that are here."""
        groups: list[dict[str, Any]] = optimizer.param_groups
        given = [optimizer.gradients_of(group["params"]) for group in groups]
        self._operands.begin(optimizer.elsewhere)
        if self._begin_again(optimizer, given):
            return
        self._clear()
        self._optimizer = optimizer
        with torch.no_grad():
            self._find_processes()
            self._check(list(zip(groups, given, strict=True)))
            # Before the first byte is sent, all processes have the same to say.
            if optimizer._preparation is not None:
                optimizer._preparation.begin()
            mine = [self._take(group, own) for group, own in zip(groups, given, strict=True)]
            self._take_wholes(groups, given, mine)
            self._share_matrices(groups)
            self.param_groups = []
            for group, taken in zip(groups, mine, strict=True):
                pair = self._groups.setdefault(id(group), ({}, {}))
                for counted, own in zip((True, False), pair, strict=True):
                    self._fill(own, group, [x for x in taken if x.counts == counted])
            self._words = self._words_of(groups, given)
            self.sums = self._sums()
            if not self._entries:
                rows = zip(groups, given, strict=True)
                self._kept = [Kept(settled.of_group(optimizer, x), x, g, optimizer.state) for x, g in rows]

    def _begin_again(self, optimizer: Any, given: Sequence[Sequence[Any]]) -> bool:
        """Begin a step with what the last one took, if all is where it was."""
        groups: list[dict[str, Any]] = optimizer.param_groups
        if len(self._kept) != len(groups):
            return False
        found: list[tuple[Tensor, Tensor]] = []
        for known, group, gradients in zip(self._kept, groups, given, strict=True):
            pairs = known.again(settled.of_group(optimizer, group), group, gradients, optimizer.state)
            if pairs is None or id(group) not in self._groups:
                return False
            found += pairs
        if optimizer._preparation is not None:
            optimizer._preparation.begin()
        self._optimizer = optimizer
        self._gradients = {id(part): gradient for part, gradient in found}
        for group, gradients in zip(groups, given, strict=True):
            present = map(is_not, gradients, repeat(None))
            self._moved += compress(group["params"], present)
        for own in self.param_groups:
            own.update({**own[phases.PART_OF], **self._own[id(own)]})
        self.sums = self._sums()
        return True

    def _find_processes(self) -> None:
        """The processes that hold the parameters, by mesh; the largest of these sets takes sums together."""
        groups = self._optimizer.param_groups
        specs = [p._spec for group in groups for p in group["params"] if parts.sharded(p)]
        for mesh in {id(x.mesh): x.mesh for x in specs}.values():
            if id(mesh) in self._meshes:
                continue
            ranks = exchange.ranks_of(mesh)
            if ranks not in self._processes:
                self._processes[ranks] = exchange.Processes(mesh)
            self._meshes[id(mesh)] = mesh, self._processes[ranks]
        self._together = max(self._processes.values(), key=len, default=None)

    def _processes_of(self, param: Any) -> exchange.Processes:
        return self._meshes[id(param.device_mesh)][1]

    def _check(self, pairs: Sequence[tuple[dict[str, Any], Sequence[Any]]]) -> None:
        """Check gradients and states, unless all is as it was when they were checked before."""
        optimizer = self._optimizer
        new = [(group, given) for group, given in pairs if not self._as_before(group, given)]
        for group, given in new:
            optimizer.check_storage(group)
            for param, gradient in zip(group["params"], given, strict=True):
                if gradient is not None:
                    optimizer.check_gradient(param, gradient, group)
        for group, given in new:
            names, program = optimizer.names_in(group), optimizer.program(group)
            runner = settled.of_group(optimizer, group).runner
            found = _Checked([], [], [], [], [], [])
            for place, (param, gradient) in enumerate(zip(group["params"], given, strict=True)):
                if gradient is not None:
                    optimizer.state_of(param, group)
                    region = parts.region_of(param) if parts.split(param) else None
                    found.places.append(place)
                    found.regions.append(region)
                    own, view = program.of(param), views.at(group, place)
                    whole = region is not None and needs_whole(own, param, runner, view)
                    found.whole.append(whole)
                    found.counts.append(self._counts(param))
                    found.names.append(names[place])
            found.seen.extend(self._seen(group, given))
            self._checked[id(group)] = found

    def _as_before(self, group: dict[str, Any], given: Sequence[Any]) -> bool:
        known = self._checked.get(id(group))
        return known is not None and known.seen == self._seen(group, given)

    def _seen(self, group: dict[str, Any], given: Sequence[Any]) -> list[Any]:
        """What a check depends on: options, parameters, gradients and states."""
        states = map(self._optimizer.state.get, group["params"])
        entries = chain.from_iterable(() if state is None else state.values() for state in states)
        return [
            id(settled.of_group(self._optimizer, group)),
            *map(id, group["params"]),
            *map(_form_of, group["params"]),
            *map(_form_of, given),
            *map(id, entries),
        ]

    def _counts(self, param: Any) -> bool:
        together = self._together
        if together is None:
            return True
        if not parts.sharded(param):
            return together.here == 0
        # Of a mesh that has only some of the processes, others have copies.
        return not parts.repeated(param) and together.ranks[0] in self._processes_of(param).ranks

    def _take(self, group: dict[str, Any], given: Sequence[Any]) -> list[_Taken]:
        """The parts of a group's parameters that are stepped as parts."""
        known, params, states = self._checked[id(group)], group["params"], self._optimizer.state
        # Not parts.local: of many small tensors, the calls would take longer than the step.
        dtensor, found, brought = parts.kind(), list[_Taken](), 0
        for place, whole, region, counts in zip(*known[1:5], strict=True):
            if whole:
                continue
            param, gradient = params[place], given[place]
            entries = states[param].items()
            state = PartState({k: x._local_tensor if type(x) is dtensor else x for k, x in entries})
            state.region = region
            if type(param) is dtensor:
                state.source = states[param]
                self._moved.append(param)
                if type(gradient) is dtensor and gradient._spec is not param._spec:
                    there, gradient = gradient, exchange.arranged(param, gradient)
                    brought += gradient is not there
                part = param._local_tensor
            else:
                part = param
                self._plain.append((states[param], state))
            self.state[part] = state
            self._gradients[id(part)] = gradient if type(gradient) is Tensor else parts.local(gradient)
            found.append(_Taken(place, part, counts))
        self._brought[id(group)] = brought
        return found

    def _take_wholes(
        self, groups: Sequence[dict[str, Any]], given: Sequence[Sequence[Any]], mine: Sequence[list[_Taken]]
    ) -> None:
        """The parameters that this process owns, of those that are stepped as a whole."""
        known = [self._checked[id(group)] for group in groups]
        where = [(i, place) for i, x in enumerate(known) for place in compress(x.places, x.whole)]
        origin: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for index, place in where:
            param = groups[index]["params"][place]
            ranks = self._processes_of(param).ranks
            state = self._optimizer.state[param]
            entries = {f"state.{key}": x for key, x in state.items() if isinstance(x, Tensor)}
            entries = {"p": param, "g": exchange.arranged(param, given[index][place])} | entries
            self._entries.setdefault(ranks, []).append(entries)
            origin.setdefault(ranks, []).append((index, place))
            self._moved.append(param)
        self._owned = self._sent = 0
        for ranks, own in sorted(self._entries.items()):
            with exchange.others_wait():
                wholes = self._wholes[ranks] = self._collected(ranks, own)
            self._owned += len(wholes)
            for number, whole in wholes.items():
                index, place = origin[ranks][number]
                param, part = groups[index]["params"][place], whole["p"]
                state = self._optimizer.state[param]
                self.state[part] = PartState((key, whole.get(f"state.{key}", x)) for key, x in state.items())
                self._gradients[id(part)] = whole["g"]
                together = cast(exchange.Processes, self._together)
                mine[index].append(_Taken(place, part, together.ranks[0] in ranks))
                mine[index].sort(key=lambda x: x.place)

    def _collected(self, ranks: tuple[int, ...], own: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """All of what this process owns of these entries, brought here."""
        processes = self._processes[ranks]
        owner = owners.owners([x["p"].shape for x in own], owners.turns(own[0]["p"], ranks))
        back: list[dict[str, Any]] = []
        out: list[dict[str, Any]] = []
        for x in own:
            # The gradient stays where it is, and what every process has of a replica, everywhere.
            replica = self._replica(x["p"]) is not None
            back.append({key: value for key, value in x.items() if key != "g" and not (replica and key == "p")})
            out.append(back[-1] if replica else back[-1] | {"g": x["p"]})
        if ranks not in self._routes or not self._routes[ranks].hold(owner, out, back):
            self._routes[ranks] = Routes(processes, owner, out, back)
        self._owner[ranks] = owner
        mine = [number for number, process in enumerate(owner) if process == processes.here]
        wholes = {number: self._room(own[number]) for number in mine}
        self._sent += self._routes[ranks].collect(own, wholes).end()
        return wholes

    def _room(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Memory for all of these entries; of a replica, a copy of the parameter, and its gradient."""
        replica = self._replica(entries["p"])
        if replica is None:
            return {key: owners.room_for(x) for key, x in entries.items()}
        found = {key: owners.room_for(x) for key, x in entries.items() if key != "g"}
        # A copy, since another process may still fail.
        found["p"].copy_(replica.detach())
        return found | {"g": parts.in_order(replica.grad.detach(), found["p"])}

    def _replica(self, param: Any) -> Any:
        elsewhere = self._optimizer.elsewhere
        return None if elsewhere is None else elsewhere.replica(param)

    def _share_matrices(self, groups: Sequence[dict[str, Any]]) -> None:
        """Decide who carries out words on whole matrices of parameters that are stepped as parts."""
        found: dict[Where, Any] = {}
        for group in groups:
            known, params, program = self._checked[id(group)], group["params"], self.program(group)
            for place, whole, region in zip(known.places, known.whole, known.regions, strict=True):
                own = program.of(params[place])
                if region is not None and not whole and _on_matrices(own):
                    param = params[place]
                    given = self._processes_of(param), own, param, self._optimizer.state[param]
                    found[id(group), place] = given
        self._operands.share(found)

    def _fill(self, own: dict[str, Any], group: dict[str, Any], taken: Sequence[_Taken]) -> None:
        """Make a group of tensors that are stepped here."""
        fixed: dict[str, Any] = {phases.PART_OF: group, phases.PLACES: [x.place for x in taken]}
        fixed[phases.OPERANDS] = self._operands
        fixed["params"] = [x.tensor for x in taken]
        for key in ("param_names", views.KEY):
            if group.get(key) is not None:
                fixed[key] = [group[key][x.place] for x in taken]
        own.clear()
        own.update({**group, **fixed})
        self._own[id(own)] = fixed
        known = self._checked[id(group)]
        names = dict(zip(known.places, known.names, strict=True))
        self._names[id(own)] = [names[x.place] for x in taken]
        self.param_groups.append(own)

    def told(self, group: dict[str, Any], runner: Any, owned: bool) -> list[str]:
        """Of the last step of a group: what was sent, gradients that lay elsewhere, and kernels.

        owned: whether any parameter of the group has an owner.
        """
        lines: list[str] = []
        if owned:
            count = errors.counted(self._owned + self._operands.owned, "parameter")
            sent = self._sent + self._operands.sent
            lines.append(f"this process owns {count}, and sends {sent:,} bytes per step")
        if self._brought.get(id(group)):
            count = errors.counted(self._brought[id(group)], "gradient")
            lines.append(f"{count} brought to where the parameter is")
        counted, _ = self._groups.get(id(group), ({}, {}))
        return [*lines, *(runner.explain(self, counted) if counted else [])]

    # What a step of it needs

    def prepare(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        """Prepare a step of what is here of a group."""
        counted, repeated = self._groups[id(group)]
        found = self._prepare(counted, after)
        if repeated["params"]:
            found += [part._replace(counts=False) for part in self._prepare(repeated, after)]
        return found

    def _prepare(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        prepare = pieces.prepare if pieces.unequal(group) else stand_in.prepared
        made, left = prepare(self, group, after)
        for param in left:
            state, own = self.state.get(param), self.program(group).of(param)
            if state is not None and state.region is not None and (_adds_up(own) or _on_matrices(own)):
                name = self.name_of(param)
                from steprule.engine.runners.kernels import fused  # which needs numpy

                reason = fused.reasons(self, group).get(name, "no kernel can step it")
                raise process_errors.not_as_part(self._optimizer.who(group), name, reason)
        return made

    def _words_of(self, groups: Sequence[dict[str, Any]], given: Sequence[Sequence[Any]]) -> dict[Any, str]:
        """What the processes ask each other for in this step."""
        together = self._together
        if together is None or len(together) == 1:
            return {}
        words: dict[Any, str] = {}
        for group, gradients in zip(groups, given, strict=True):
            if any(x is not None for x in gradients):
                for program in self.program(group).kinds:
                    words |= {phases.key_in(group, x): x.word for x in program.reductions if x.shared}
                    words |= {BEFORE_STORING: ""} if program.may_raise else {}
                known, whole = self._checked[id(group)], self.program(group)
                for place, stepped_whole, region in zip(known.places, known.whole, known.regions, strict=True):
                    if region is not None and not stepped_whole:
                        for program in whole.of(group["params"][place]).choices:
                            alone = [x for x in program.reductions if not x.shared]
                            words |= {phases.keys_of(group, x, [place])[0]: x.word for x in alone}
                            words |= dict.fromkeys(phases.matrices_elsewhere(program), "")
        other = next((x for x in self._processes if not set(x) <= set(together.ranks)), None)
        if other and (words or self._entries):
            raise process_errors.other_processes(type(self._optimizer).__name__, together.ranks, other)
        return words

    def _sums(self) -> exchange.Sums | None:
        """What the processes exchange in this step, or None if that is nothing."""
        together = self._together
        if together is None or len(together) == 1 or not (self._words or self._entries):
            return None
        who, operands = type(self._optimizer).__name__, self._operands
        asked = [key for key in self._words if isinstance(key, OnMatrices)]
        then = {key: partial(operands.exchange, key.number) for key in asked}
        return exchange.Sums(who, together, self._words, bool(self._entries), then)

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
            if finished and self._kept:
                self._rest()
            else:
                self._clear()

    def _finish(self) -> None:
        for ranks, own in sorted(self._entries.items()):
            for whole in self._wholes[ranks].values():
                made = self.state[whole["p"]]
                whole |= {f"state.{key}": x for key, x in made.items() if isinstance(x, Tensor)}
            with exchange.others_wait():
                self._sent += self._routes[ranks].give_back(self._wholes[ranks], own).end()
                self._sent += self._routes[ranks].pass_on(own)
            for number, owner in enumerate(self._owner[ranks]):
                if self._replica(own[number]["p"]) is not None:
                    new = self._wholes[ranks][number]["p"] if number in self._wholes[ranks] else None
                    self._optimizer.elsewhere.owned(own[number]["p"], owner, new)
        for entries, made in self._plain:
            entries.update(made)  # a count may be a plain number
        torch.autograd.graph.increment_version(self._moved)

    def _rest(self) -> None:
        # Only while it takes a step: else neither would ever be freed.
        self._optimizer = None
        self._gradients = {}
        self._moved: list[Tensor] = []
        self.sums: exchange.Sums | None = None

    def _clear(self) -> None:
        self._rest()
        self._kept = []
        self.state = {}
        # What groups of parts have besides what their groups have.
        self._own: dict[int, dict[str, Any]] = {}
        self._plain: list[tuple[dict[str, Any], PartState]] = []
        # By the ranks that hold them: tensors by key, and the wholes that this process owns by number.
        self._entries: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        self._wholes: dict[tuple[int, ...], dict[int, dict[str, Any]]] = {}
        for own in self.param_groups:
            own["params"] = []


def _adds_up(program: Program) -> bool:
    """Whether a step takes sums over one parameter."""
    return any(not x.shared for own in program.choices for x in own.reductions)


def _on_matrices(program: Program) -> bool:
    """Whether a step has words on whole matrices, or on rows and columns together with them."""
    return any(any(own.stages) for own in program.choices)


def _form_of(tensor: Any) -> Any:
    """What is checked about a parameter or a gradient."""
    if tensor is None:
        return None
    spec = getattr(tensor, "_spec", None)
    return (tensor.shape, tensor.dtype, tensor.layout, tensor.device) if spec is None else spec
