"""Words on whole matrices of sharded parameters: their operands go to the owners, and the results come back.

All else of a step is done with the part of a parameter that is in each process, so nothing else is sent. Owners
work in rounds: while one works on the matrices of a round, those of the next one are on their way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steprule import matrix_errors
from steprule.engine.elsewhere import Elsewhere
from steprule.engine.program.program import Program
from steprule.engine.runners import matrices
from steprule.engine.runners.matrices import MatrixWork, States
from steprule.engine.sharding import owners, parts
from steprule.engine.sharding.exchange import Passing, Processes
from steprule.engine.sharding.owners import Routes
from steprule.engine.sharding.parts import shape_of
from steprule.engine.views import View

# A parameter: the id of its group, and its place there.
Where = tuple[int, int]


class Moves(NamedTuple):
    """What moves for the words before one sweep, by name or by the key of a slot.

    takes, read: to the owner, unless it has them from earlier words. gives, stored: back. last: whether
    no words come later.
    """

    takes: tuple[str, ...]
    read: tuple[str, ...]
    gives: tuple[str, ...]
    stored: tuple[str, ...]
    last: bool


def moves_of(program: Program, number: int) -> Moves:
    """What moves for the words of a program before this sweep."""
    stage, own = program.stages[number], program.matrices
    assert stage is not None
    assert own is not None
    earlier = [x for x in program.stages[:number] if x is not None]
    taken = {name for x in earlier for name in x.takes}
    read = {letter for x in earlier for letter in x.slots}
    last = not any(program.stages[number + 1 :])
    return Moves(
        tuple(name for name in stage.takes if name not in taken),
        tuple(own.slots[letter].key for letter in stage.slots if letter not in read),
        tuple(stage.gives),
        tuple(own.slots[letter].key for letter in own.outputs) if last else (),
        last,
    )


class _Given(NamedTuple):
    """What `MatrixWork.run` is given, and what moves. scalars: of each parameter."""

    number: int
    scalars: Sequence[Sequence[float]]
    gradients: Sequence[Tensor]
    states: States
    moves: Moves


class MatrixParts:
    """Stands in for `MatrixWork` where the parameters of a batch are parts, whose matrices others may own.

    params, states: the parts that are here. views: how the matrices lie in whole parameters.
    """

    def __init__(
        self,
        program: Program,
        params: Sequence[Tensor],
        states: States,
        views: Sequence[View],
        computed: torch.dtype,
    ):
        self._program = program
        self._shapes = [tuple(x.shape) for x in params]
        self._device = params[0].device
        self._views, self._computed = views, computed
        self._wholes = [shape_of(p, x) for p, x in zip(params, states, strict=True)]
        self.dtypes = matrices.dtypes_of(program, computed)
        self._works: dict[tuple[int, ...], MatrixWork] = {}
        self.forget()

    def begin(self) -> dict[str, list[int]]:
        """Make the arrays that sweeps fill. Returns the addresses by name, one for each parameter."""
        return self._make(matrices.from_sweeps(self._program))

    def offer(
        self,
        number: int,
        scalars: Sequence[Sequence[float]],
        gradients: Sequence[Tensor],
        states: States,
    ) -> bool:
        """Be ready for the words before this sweep, if there are any: returns whether there are."""
        if number >= len(self._program.stages) or self._program.stages[number] is None:
            return False
        self._given = _Given(number, scalars, gradients, states, moves_of(self._program, number))
        self._make(self.moves.gives)
        return True

    @property
    def moves(self) -> Moves:
        """What moves for the words that are offered."""
        assert self._given is not None
        return self._given.moves

    def run(self, number: int, *given: Any) -> dict[str, list[int]]:
        """What the words before this sweep have made, as `MatrixWork.run`. Raises what they have raised."""
        if self._failure is not None:
            raise self._failure
        stage = self._program.stages[number]
        for name in () if stage is None else stage.takes:
            self._arrays.pop(name, None)
        return {} if stage is None else {name: _addresses(self._arrays[name]) for name in stage.gives}

    def store(self, states: States) -> None:
        """Store the new values of slots that have none per element."""
        for row, new in self._new.items():
            for key, value in new.items():
                states[row][key].copy_(value)

    def forget(self) -> None:
        """Free what a step has made."""
        self._arrays: dict[str, list[Tensor]] = {}
        self._new: dict[int, dict[str, Tensor]] = {}
        self._whole_states: dict[int, dict[str, Tensor]] = {}
        self._given: _Given | None = None
        self._failure: Exception | None = None
        for work in self._works.values():
            work.forget()

    def _make(self, names: Iterable[str]) -> dict[str, list[int]]:
        for name in names:
            dtype = self.dtypes[name]
            made = [torch.empty(shape, dtype=dtype, device=self._device) for shape in self._shapes]
            self._arrays[name] = made
        return {name: _addresses(self._arrays[name]) for name in names}

    # What the exchange asks for

    def given(self, row: int) -> dict[str, Any]:
        """The parts here of what goes to the owner of a parameter."""
        assert self._given is not None
        _, _, gradients, states, moves = self._given
        found = {x: gradients[row] if x == "g" else self._arrays[x][row] for x in moves.takes}
        return found | {f"state.{key}": states[row][key] for key in moves.read}

    def wanted(self, row: int) -> dict[str, Any]:
        """Memory for the parts here of what comes back."""
        assert self._given is not None
        states, moves = self._given.states, self._given.moves
        self._new[row] = {key: torch.empty_like(states[row][key]) for key in moves.stored}
        found = {name: self._arrays[name][row] for name in moves.gives}
        return found | {f"state.{key}": x for key, x in self._new[row].items()}

    def room(
        self, rows: tuple[int, ...], states: Sequence[Mapping[str, Any]], whole_gradients: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """For each of these parameters, which this process owns, memory for all of what comes to it.

        states: theirs, as they are sharded. whole_gradients: all of each gradient, None if it comes in parts.
        """
        if rows not in self._works:
            shapes, views = [self._wholes[row] for row in rows], [self._views[row] for row in rows]
            self._works[rows] = MatrixWork(self._program, shapes, views, self._computed, self._device)
        assert self._given is not None
        gradients, moves, work = self._given.gradients, self._given.moves, self._works[rows]
        names = [name for name in moves.takes if name != "g"]
        work.make(names)
        arrays = {name: work.arrays(name) for name in names}
        found: list[dict[str, Any]] = []
        for place, (row, state) in enumerate(zip(rows, states, strict=True)):
            own = self._whole_states.setdefault(row, {})
            own |= {key: owners.room_for(state[key]) for key in (*moves.read, *moves.stored) if key not in own}
            whole = {name: x[place] for name, x in arrays.items()}
            whole |= {f"state.{key}": own[key] for key in moves.read}
            if "g" in moves.takes:
                there = whole_gradients[place]
                whole["g"] = gradients[row].new_empty(self._wholes[row]) if there is None else there
            found.append(whole)
        return found

    def carry_out(self, rows: tuple[int, ...], wholes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Carry out the words for these parameters. Returns all of what goes back, for each of them.

        wholes: of each, what `room` has made, filled. What is raised is raised by `run`, after all processes
        have sent what the others wait for.
        """
        assert self._given is not None
        number, scalars, _, _, moves = self._given
        work = self._works[rows]
        states = [self._whole_states[row] for row in rows]
        gradients = [x["g"] for x in wholes if "g" in x]
        try:
            own = [scalars[row] for row in rows]
            work.run(number, own, range(len(rows)), gradients, states)
            if moves.stored:
                work.store(states)
        except Exception as failure:
            if isinstance(failure, matrix_errors.WordFailed):
                failure.places = [rows[place] for place in failure.places]
            self._failure = failure
            work.make(moves.gives)
        arrays = {name: work.arrays(name) for name in moves.gives}
        found = [{name: x[place] for name, x in arrays.items()} for place in range(len(rows))]
        for row, own, state in zip(rows, found, states, strict=True):
            own |= {f"state.{key}": state[key] for key in moves.stored}
            if moves.last:
                del self._whole_states[row]
        if moves.last:
            work.forget()
        else:
            work.drop(moves.gives)
        return found


class _Shared(NamedTuple):
    """Parameters that the same processes hold.

    owner: the number of a process for each of them. rounds: which are worked on after which.
    """

    processes: Processes
    params: dict[Where, Any]
    owner: dict[Where, int]
    rounds: list[list[Where]]


class Operands:
    """Takes operands of words on whole matrices to the owners of parameters, and brings back the results."""

    def __init__(self) -> None:
        self._shared: list[_Shared] = []
        self._states: dict[Where, Any] = {}
        self._routes: dict[Any, Routes] = {}
        self.begin(None)

    def begin(self, elsewhere: Elsewhere | None) -> None:
        """Begin a step.

        elsewhere: the optimizer's, which may know that every process has all of a gradient.
        """
        self._elsewhere = elsewhere
        self._offers: dict[int, dict[Where, tuple[MatrixParts, int]]] = {}
        # By this process, in one step.
        self.sent = 0

    def share(self, params: Mapping[Where, tuple[Processes, Program, Any, Any]]) -> None:
        """Decide who owns which parameter: for each the processes that hold it, program, itself and its state.

        What decides is the same in all these processes.
        """
        together: dict[tuple[int, ...], list[Where]] = {}
        for where, (processes, *_) in params.items():
            together.setdefault(processes.ranks, []).append(where)
        self._states = {where: state for where, (_, _, _, state) in params.items()}
        self._shared = []
        for _, places in sorted(together.items()):
            processes, _, first, _ = params[places[0]]
            tensors = {x: params[x][2] for x in places}
            turns = owners.turns(first, processes.ranks)
            owner = dict(zip(places, owners.owners([x.shape for x in tensors.values()], turns), strict=True))
            work = {number: matrices.Shares(matrices.BYTES) for number in owner.values()}
            rounds: list[list[Where]] = []
            for where, (_, program, param, _) in ((x, params[x]) for x in places):
                # By the parameters alone: what is here of their states differs between processes.
                number = work[owner[where]].share_of(program, param, {})
                rounds += [[] for _ in range(number + 1 - len(rounds))]
                rounds[number].append(where)
            self._shared.append(_Shared(processes, tensors, owner, rounds))

    @property
    def owned(self) -> int:
        """How many parameters this process owns."""
        return sum(list(x.owner.values()).count(x.processes.here) for x in self._shared)

    def offer(self, number: int, work: MatrixParts, group: int, places: Sequence[int]) -> None:
        """Have the words before a sweep carried out for these parameters of a group when all are offered."""
        rows = {(group, place): (work, row) for row, place in enumerate(places)}
        self._offers.setdefault(number, {}).update(rows)

    def exchange(self, number: int) -> None:
        """Carry out the words before a sweep for all parameters that were offered, in all processes at once."""
        offers = self._offers.pop(number, {})
        for shared in self._shared:
            rounds = [[where for where in own if where in offers] for own in shared.rounds]
            turns = [self._round(number, shared, own, offers) for own in rounds if own]
            for turn in turns[:1]:
                turn.begin()
            before = None
            for turn, following in zip_longest(turns, turns[1:]):
                if following is not None:
                    following.begin()
                turn.carry_out()
                if before is not None:
                    self.sent += before.end()
                turn.give_back()
                before = turn
            if before is not None:
                self.sent += before.end()

    def _round(
        self, number: int, shared: _Shared, places: Sequence[Where], offers: Mapping[Where, Any]
    ) -> _Round:
        """What is worked on together."""
        out: list[dict[str, Any]] = []
        back: list[dict[str, Any]] = []
        for where in places:
            moves, param, state = offers[where][0].moves, shared.params[where], self._states[where]
            takes = [x for x in moves.takes if x != "g" or self._replica(param) is None]
            out.append(dict.fromkeys(takes, param) | {f"state.{x}": state[x] for x in moves.read})
            back.append(dict.fromkeys(moves.gives, param) | {f"state.{x}": state[x] for x in moves.stored})
        owner = [shared.owner[where] for where in places]
        key = number, shared.processes.ranks, places[0]
        routes = self._routes.get(key)
        if routes is None or not routes.hold(owner, out, back):
            routes = self._routes[key] = Routes(shared.processes, owner, out, back)
        mine = [i for i, x in enumerate(owner) if x == shared.processes.here]
        replicas = {i: self._replica(shared.params[places[i]]) for i in mine}
        gradients = {i: None if x is None else parts.in_order(x.grad.detach(), x) for i, x in replicas.items()}
        owned = {i: (self._states[places[i]], gradients[i]) for i in mine}
        return _Round(routes, [offers[where] for where in places], owned)

    def _replica(self, param: Any) -> Any:
        return None if self._elsewhere is None else self._elsewhere.replica(param)


class _Round:
    """Parameters whose owners work on them at the same time.

    offers: of each, its batch and its place there. owned: the states of those that this process owns, and all
    of their gradients, if these are here.
    """

    def __init__(self, routes: Routes, offers: Sequence[tuple[MatrixParts, int]], owned: Mapping[int, Any]):
        self._routes, self._offers = routes, offers
        batches: dict[int, list[int]] = {}
        for place in owned:
            batches.setdefault(id(offers[place][0]), []).append(place)
        # Of each batch, the places here of what this process owns, their places there, states and gradients.
        self._owned = [
            (
                offers[own[0]][0],
                own,
                tuple(offers[x][1] for x in own),
                *zip(*(owned[x] for x in own), strict=True),
            )
            for own in batches.values()
        ]
        self._wholes: dict[int, dict[str, Any]] = {}
        self._passing: list[Passing] = []
        self._back: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Begin to send operands to the owners."""
        for work, places, rows, states, gradients in self._owned:
            self._wholes |= zip(places, work.room(rows, states, gradients), strict=True)
        given = [work.given(row) for work, row in self._offers]
        self._passing.append(self._routes.collect(given, self._wholes))

    def carry_out(self) -> None:
        """Wait for operands, and carry out the words on matrices that this process owns."""
        self._sent = self._passing.pop().end()
        for work, places, rows, _, _ in self._owned:
            wholes = [self._wholes[place] for place in places]
            self._wholes |= zip(places, work.carry_out(rows, wholes), strict=True)

    def give_back(self) -> None:
        """Begin to send the results."""
        self._back = [work.wanted(row) for work, row in self._offers]
        self._passing.append(self._routes.give_back(self._wholes, self._back))
        self._wholes = {}

    def end(self) -> int:
        """Wait for the results. Returns how many bytes this process has sent."""
        return self._sent + self._passing.pop().end() + self._routes.pass_on(self._back)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]
