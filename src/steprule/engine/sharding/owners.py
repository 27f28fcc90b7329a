"""Whole parameters at their owners, for rules that need all of one at once: one exchange each way.

Each process knows from shapes, meshes and placements alone who owns what, and who sends what to whom. Of the
processes that hold the same part, the one that agrees with the owner wherever parts are repeated sends it.
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
from steprule.engine.sharding.exchange import Processes

# Of one parameter, the tensors that belong to it by key: DTensors, and tensors that are equal everywhere.
Entries = Mapping[str, Any]


def owners(shapes: Sequence[Sequence[int]], processes: int) -> list[int]:
    """Who owns each of these: the most work first, to the process that has least so far."""
    least = [(0, process) for process in range(processes)]
    found = [0] * len(shapes)
    work = list(map(_work, shapes))
    for place in sorted(range(len(shapes)), key=lambda i: (-work[i], i)):
        load, found[place] = least[0]
        heapq.heapreplace(least, (load + work[place], found[place]))
    return found


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


class Wholes:
    """Parameters of which one process each steps the whole.

    entries: of each parameter, as they are in this process. What becomes of them depends on how they are laid
    out, and is kept for as long as that `holds`.
    """

    def __init__(self, processes: Processes, entries: Sequence[Entries]):
        self._processes = processes
        self._laid_out = _laid_out(entries)
        self.owner = owners([x["p"].shape for x in entries], len(processes))
        self._out = self._route(entries, self._outward)
        self._home = self._route(entries, self._homeward)
        # In one step, by this process.
        self.sent = 0

    @property
    def here(self) -> int:
        """The number of this process."""
        return self._processes.here

    def holds(self, entries: Sequence[Entries]) -> bool:
        """Whether these are laid out in the same way."""
        now = _laid_out(entries)
        return len(now) == len(self._laid_out) and all(map(is_, now, self._laid_out))

    def collect(self, entries: Sequence[Entries]) -> dict[int, dict[str, Any]]:
        """The whole tensors of the parameters that this process owns, by place."""
        wholes = {
            place: {key: _whole(x) for key, x in own.items()}
            for place, own in enumerate(entries)
            if self.owner[place] == self._processes.here
        }
        self.sent = self._move(
            self._out, entries, lambda piece: entries[piece.place], lambda piece: wholes[piece.place]
        )
        return wholes

    def give_back(self, wholes: Mapping[int, Entries], entries: Sequence[Entries]) -> None:
        """Give everybody the parts of what the owners have made of the wholes."""
        self.sent += self._move(
            self._home, entries, lambda piece: wholes[piece.place], lambda piece: entries[piece.place]
        )

    def _outward(self, place: int, key: str, tensor: Any) -> Iterable[tuple[int, int, Region]]:
        """Who sends which part to the owner: its number, the owner's, and the part."""
        owner = self.owner[place]
        if parts.sharded(tensor):
            at = self._coordinate(tensor, owner)
            for process, coordinate, region in self._holders(tensor):
                if _agrees(tensor, coordinate, at):
                    yield process, owner, region

    def _homeward(self, place: int, key: str, tensor: Any) -> Iterable[tuple[int, int, Region]]:
        """What the owner sends to whom. Gradients stay where they are."""
        owner = self.owner[place]
        if key == "g":
            return
        if parts.sharded(tensor):
            for process, _, region in self._holders(tensor):
                yield owner, process, region
        else:
            for process in range(len(self._processes)):
                if process != owner:
                    yield owner, process, blocks.whole(tensor.shape)

    def _route(
        self,
        entries: Sequence[Entries],
        who: Callable[[int, str, Any], Iterable[tuple[int, int, Region]]],
    ) -> _Route:
        here, count = self._processes.here, len(self._processes)
        route = _Route([[] for _ in range(count)], [[] for _ in range(count)])
        for place, own in enumerate(entries):
            for key, tensor in own.items():
                # The gradient is laid out as the parameter is.
                for sender, receiver, region in who(place, key, own["p"] if key == "g" else tensor):
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
        entries: Sequence[Entries],
        source: Callable[[_Piece], Entries],
        target: Callable[[_Piece], Entries],
    ) -> int:
        """Move pieces between processes. Returns how many bytes this one sends."""
        given = [[_cut(source(x)[x.key], x.region) for x in own] for own in route.given]
        empty = [[_empty(entries[x.place][x.key], x.region) for x in own] for own in route.wanted]
        sent = self._processes.passed_on(given, empty)
        for pieces, filled in zip(route.wanted, empty, strict=True):
            for piece, value in zip(pieces, filled, strict=True):
                _cut(target(piece)[piece.key], piece.region).copy_(value)
        return sent

    def _holders(self, tensor: Any) -> Iterable[tuple[int, tuple[int, ...], Region]]:
        """Each process that holds a part of a DTensor: its number, where in the mesh it is, and which part."""
        mesh = tensor.device_mesh
        for at in itertools.product(*map(range, mesh.shape)):
            yield self._processes.ranks.index(int(mesh.mesh[at])), at, parts.region_of(tensor, at)

    def _coordinate(self, tensor: Any, process: int) -> tuple[int, ...]:
        """Where a process is in the mesh of a DTensor."""
        where = (tensor.device_mesh.mesh == self._processes.ranks[process]).nonzero()
        return tuple(where[0].tolist())


def _laid_out(entries: Sequence[Entries]) -> list[Any]:
    """What routes depend on. The gradient is laid out as the parameter is."""
    return [x._spec if parts.sharded(x) else key for own in entries for key, x in own.items() if key != "g"]


def _agrees(tensor: Any, process: Sequence[int], owner: Sequence[int]) -> bool:
    """Whether two processes have the same coordinate wherever parts are repeated."""
    rows = zip(tensor.placements, process, owner, strict=True)
    return all(a == b for placement, a, b in rows if placement.is_replicate())


def _whole(tensor: Any) -> Any:
    """Memory for a whole tensor; what is the same everywhere, as it is."""
    if not parts.sharded(tensor):
        return tensor
    like = parts.local(tensor)
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=like.dtype, device=like.device)


def _empty(tensor: Any, region: Region) -> Tensor:
    like = parts.local(tensor)
    return torch.empty(region.shape, dtype=like.dtype, device=like.device)


def _cut(tensor: Any, region: Region) -> Tensor:
    """The part of a whole tensor; what is a part already, as it is."""
    own: Tensor = parts.local(tensor).detach()
    return own if tuple(own.shape) == region.shape else own[parts.within(region)]
