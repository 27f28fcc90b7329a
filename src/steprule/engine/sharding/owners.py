"""Whole parameters at their owners, for rules that need all of one at once: one exchange each way.

Each process knows from shapes, meshes and placements alone who owns what, and who sends what to whom. Of the
processes that hold the same part, the one that agrees with the owner wherever parts are repeated sends it. What
comes back it passes on to the others, or else the owner would have to send all of it to each of them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steprule.engine import blocks
from steprule.engine.blocks import Region
from steprule.engine.sharding import parts
from steprule.engine.sharding.exchange import Passing, Processes

# Of one parameter, the tensors that belong to it by key.
Entries = Mapping[str, Any]


def owners(shapes: Sequence[Sequence[int]], processes: Sequence[int]) -> list[int]:
    """Who owns each of these: the most work first, to the process that has least so far.

    processes: in the order in which they get their first one.
    """
    least = [(0, turn) for turn in range(len(processes))]
    found = [0] * len(shapes)
    work = list(map(_work, shapes))
    for place in sorted(range(len(shapes)), key=lambda i: (-work[i], i)):
        load, turn = least[0]
        found[place] = processes[turn]
        heapq.heapreplace(least, (load + work[place], turn))
    return found


def turns(tensor: Any, ranks: Sequence[int]) -> list[int]:
    """The processes of a DTensor's mesh, such that those with the same part follow each other.

    Then the owners are spread over all copies, and with them what is passed on to the other copies.
    """
    mesh = tensor.device_mesh.mesh
    repeated = [d for d, x in enumerate(tensor.placements) if x.is_replicate()]
    split = [d for d in range(mesh.ndim) if d not in repeated]
    numbers = {rank: number for number, rank in enumerate(ranks)}
    return [numbers[x] for x in mesh.permute(*split, *repeated).flatten().tolist()]


def _work(shape: Sequence[int]) -> int:
    """What a product of a matrix with its transpose takes; of a stack, of all matrices."""
    count = torch.Size(shape).numel()
    return count * min(shape[-2:]) if len(shape) > 1 else count


class _Piece(NamedTuple):
    """What one process sends to another: of which parameter, under which key, and which part."""

    place: int
    key: str
    region: Region


class _Route(NamedTuple):
    """What this process gives to each other one, and what it gets from each."""

    given: list[list[_Piece]]
    wanted: list[list[_Piece]]


class Routes:
    """How what belongs to parameters gets to the processes that own these, and what they make of it back.

    owner: of each parameter, the number of a process. out, back: of each parameter, by key, a tensor that is
    laid out as what goes to the owner, and as what comes back.
    """

    def __init__(
        self, processes: Processes, owner: Sequence[int], out: Sequence[Entries], back: Sequence[Entries]
    ):
        self._processes = processes
        self._owner = owner
        self._layout = _layout(out, back)
        self._out = self._route(out, self._outward)
        self._home = self._route(back, self._homeward)
        repeats = any(_repeated(x) for own in back for x in own.values())
        self._onward = self._route(back, self._to_others) if repeats else None

    def hold(self, owner: Sequence[int], out: Sequence[Entries], back: Sequence[Entries]) -> bool:
        """Whether these are laid out in the same way."""
        (keys, specs), (known, before) = _layout(out, back), self._layout
        return owner == self._owner and keys == known and all(map(is_, specs, before))

    def collect(self, entries: Sequence[Entries], wholes: Mapping[int, Entries]) -> Passing:
        """Begin to give the owners what belongs to their parameters.

        entries: the parts that are here. wholes: by place, the memory of what this process owns.
        """
        return self._move(self._out, lambda piece: entries[piece.place], lambda piece: wholes[piece.place])

    def give_back(self, wholes: Mapping[int, Entries], entries: Sequence[Entries]) -> Passing:
        """Begin to give everybody the parts of what the owners have made; `pass_on` then does the rest."""
        return self._move(self._home, lambda piece: wholes[piece.place], lambda piece: entries[piece.place])

    def pass_on(self, entries: Sequence[Entries]) -> int:
        """Give what has come back to those that have the same parts. Returns how many bytes that sends."""
        if self._onward is None:
            return 0
        here: Callable[[_Piece], Entries] = lambda piece: entries[piece.place]  # noqa: E731
        return self._move(self._onward, here, here).end()

    def _outward(self, place: int, key: str, tensor: Any) -> Iterable[tuple[int, int, Region]]:
        """Who sends which part to the owner: its number, the owner's, and the part."""
        owner = self._owner[place]
        if parts.sharded(tensor):
            at = self._coordinate(tensor, owner)
            for process, coordinate, region in self._holders(tensor):
                if _agrees(tensor, coordinate, at):
                    yield process, owner, region

    def _homeward(self, place: int, key: str, tensor: Any) -> Iterable[tuple[int, int, Region]]:
        """What the owner sends to whom."""
        owner = self._owner[place]
        if parts.sharded(tensor):
            for process, _, region in self._outward(place, key, tensor):
                yield owner, process, region
        else:
            for process in range(len(self._processes)):
                yield owner, process, blocks.whole(tensor.shape)

    def _to_others(self, place: int, key: str, tensor: Any) -> Iterable[tuple[int, int, Region]]:
        """Who sends a part on to those that hold the same one: the process that got it from the owner."""
        if not parts.sharded(tensor):
            return
        owner = self._coordinate(tensor, self._owner[place])
        holders = list(self._holders(tensor))
        numbers = {at: process for process, at, _ in holders}
        for process, at, region in holders:
            if not _agrees(tensor, at, owner):
                yield numbers[_nearest(tensor, at, owner)], process, region

    def _route(
        self,
        entries: Sequence[Entries],
        who: Callable[[int, str, Any], Iterable[tuple[int, int, Region]]],
    ) -> _Route:
        here, count = self._processes.here, len(self._processes)
        route = _Route([[] for _ in range(count)], [[] for _ in range(count)])
        for place, own in enumerate(entries):
            for key, tensor in own.items():
                for sender, receiver, region in who(place, key, tensor):
                    if not region.empty:
                        piece = _Piece(place, key, region)
                        if sender == here:
                            route.given[receiver].append(piece)
                        if receiver == here:
                            route.wanted[sender].append(piece)
        return route

    def _move(
        self,
        route: _Route,
        source: Callable[[_Piece], Entries],
        target: Callable[[_Piece], Entries],
    ) -> Passing:
        """Begin to move pieces between processes."""
        given = [[_cut(source(x)[x.key], x.region) for x in own] for own in route.given]
        wanted = [[_cut(target(x)[x.key], x.region) for x in own] for own in route.wanted]
        return self._processes.passing(given, wanted)

    def _holders(self, tensor: Any) -> Iterable[tuple[int, tuple[int, ...], Region]]:
        """Each process that holds a part of a DTensor: its number, where in the mesh it is, and which part."""
        mesh = tensor.device_mesh
        for at in itertools.product(*map(range, mesh.shape)):
            yield self._processes.ranks.index(int(mesh.mesh[at])), at, parts.region_of(tensor, at)

    def _coordinate(self, tensor: Any, process: int) -> tuple[int, ...]:
        """Where a process is in the mesh of a DTensor."""
        where = (tensor.device_mesh.mesh == self._processes.ranks[process]).nonzero()
        return tuple(where[0].tolist())


def _layout(out: Sequence[Entries], back: Sequence[Entries]) -> tuple[list[list[str]], list[Any]]:
    """What routes depend on: keys, and how what they stand for is laid out."""
    entries = [*out, *back]
    return list(map(list, entries)), [getattr(x, "_spec", None) for own in entries for x in own.values()]


def _agrees(tensor: Any, process: Sequence[int], owner: Sequence[int]) -> bool:
    """Whether two processes have the same coordinate wherever parts are repeated."""
    rows = zip(tensor.placements, process, owner, strict=True)
    return all(a == b for placement, a, b in rows if placement.is_replicate())


def _nearest(tensor: Any, process: Sequence[int], owner: Sequence[int]) -> tuple[int, ...]:
    """The coordinate of the process that holds the same part and agrees with the owner."""
    rows = zip(tensor.placements, process, owner, strict=True)
    return tuple(b if placement.is_replicate() else a for placement, a, b in rows)


def _repeated(tensor: Any) -> bool:
    """Whether several processes hold the same part of it."""
    if not parts.sharded(tensor):
        return False
    pairs = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return any(number > 1 and placement.is_replicate() for number, placement in pairs)


def room_for(tensor: Any) -> Tensor:
    """Memory for all of a tensor that may be sharded; what is the same everywhere, as a copy."""
    if not parts.sharded(tensor):
        return tensor.clone()
    like = parts.local(tensor)
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=like.dtype, device=like.device)


def _cut(tensor: Any, region: Region) -> Tensor:
    """The part of a whole tensor; what is a part already, as it is."""
    own: Tensor = parts.local(tensor).detach()
    return own if tuple(own.shape) == region.shape else own[parts.within(region)]
