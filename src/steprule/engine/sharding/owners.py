"""Whole parameters at their owners, for rules that need all of one at once: one exchange each way.

Each process knows from shapes, meshes and placements alone who owns what, and who sends what to whom. Of the
processes that hold the same part, the one that agrees with the owner wherever parts are repeated sends it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steprule.engine import blocks
from steprule.engine.blocks import Region
from steprule.engine.sharding import parts
from steprule.engine.sharding.exchange import Processes


def owners(shapes: Sequence[Sequence[int]], processes: int) -> list[int]:
    """Who owns each of these: the most work first, to the process that has least so far."""
    load = [0] * processes
    found = [0] * len(shapes)
    work = list(map(_work, shapes))
    for place in sorted(range(len(shapes)), key=lambda i: (-work[i], i)):
        found[place] = min(range(processes), key=lambda process: (load[process], process))
        load[found[place]] += work[place]
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


Entries = dict[str, Any]


class Wholes:
    """Parameters of which one process each has the whole, and what that process made of it.

    entries: of each parameter, the tensors that belong to it by key, as they are in this process: DTensors,
    and tensors that are the same in every process.
    """

    def __init__(self, processes: Processes, entries: Sequence[Entries]):
        self._processes = processes
        self._entries = entries
        self.owner = owners([x["p"].shape for x in entries], len(processes))
        # Of the last exchanges, in this process.
        self.sent = 0

    def collect(self) -> dict[int, Entries]:
        """The whole tensors of the parameters that this process owns, by place."""
        here = self._processes.here
        wholes: dict[int, Entries] = {
            place: {key: _whole(x) for key, x in own.items()}
            for place, own in enumerate(self._entries)
            if self.owner[place] == here
        }

        def outward(place: int, key: str, tensor: Any) -> Iterable[tuple[int, int, Region]]:
            """Who sends what to the owner."""
            owner = self.owner[place]
            if parts.sharded(tensor):
                at = self._coordinate(tensor, owner)
                for process, region in self._holders(tensor):
                    if _agrees(tensor, self._coordinate(tensor, process), at):
                        yield process, owner, region

        self.sent = self._move(outward, self._part, lambda piece: wholes[piece.place][piece.key])
        return wholes

    def return_(self, wholes: dict[int, Entries]) -> None:
        """Give everybody the parts of what the owners have made of the wholes. The gradients stay."""

        def homeward(place: int, key: str, tensor: Any) -> Iterable[tuple[int, int, Region]]:
            owner = self.owner[place]
            if key == "g":
                return
            if parts.sharded(tensor):
                for process, region in self._holders(tensor):
                    yield owner, process, region
            else:
                for process in range(len(self._processes)):
                    yield owner, process, blocks.whole(tensor.shape)

        def target(piece: _Piece) -> Tensor:
            return self._part(piece)

        self.sent += self._move(homeward, lambda piece: wholes[piece.place][piece.key], target)

    def _part(self, piece: _Piece) -> Tensor:
        return parts.local(self._entries[piece.place][piece.key]).detach()

    def _move(
        self,
        who: Callable[[int, str, Any], Iterable[tuple[int, int, Region]]],
        source: Callable[[_Piece], Tensor],
        target: Callable[[_Piece], Tensor],
    ) -> int:
        """Move pieces between processes; of a whole tensor its part."""
        here, count = self._processes.here, len(self._processes)
        given: list[list[Tensor]] = [[] for _ in range(count)]
        wanted: list[list[_Piece]] = [[] for _ in range(count)]
        for place, own in enumerate(self._entries):
            for key, tensor in own.items():
                for sender, receiver, region in who(place, key, tensor):
                    if region.empty:
                        continue
                    piece = _Piece(place, key, region)
                    if sender == here:
                        given[receiver].append(_cut(source(piece), region))
                    if receiver == here:
                        wanted[sender].append(piece)
        empty = [[self._like(piece) for piece in pieces] for pieces in wanted]
        sent = self._processes.passed_on(given, empty)
        for pieces, filled in zip(wanted, empty, strict=True):
            for piece, value in zip(pieces, filled, strict=True):
                into = target(piece)
                if tuple(into.shape) == piece.region.shape:
                    into.copy_(value)
                else:
                    into[parts.within(piece.region)] = value
        return sent

    def _like(self, piece: _Piece) -> Tensor:
        like = parts.local(self._entries[piece.place][piece.key])
        return torch.empty(piece.region.shape, dtype=like.dtype, device=like.device)

    def _holders(self, tensor: Any) -> Iterable[tuple[int, Region]]:
        """The number of each process that holds a part of a DTensor, and which part."""
        mesh = tensor.device_mesh
        for at in itertools.product(*map(range, mesh.shape)):
            yield self._processes.ranks.index(int(mesh.mesh[at])), parts.region_of(tensor, at)

    def _coordinate(self, tensor: Any, process: int) -> tuple[int, ...]:
        """Where a process is in the mesh of a DTensor."""
        where = (tensor.device_mesh.mesh == self._processes.ranks[process]).nonzero()
        return tuple(where[0].tolist())


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


def _cut(tensor: Tensor, region: Region) -> Tensor:
    """The part of a whole tensor; what is a part already, as it is."""
    return tensor if tuple(tensor.shape) == region.shape else tensor[parts.within(region)]
