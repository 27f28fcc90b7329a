"""How the tensors of a launch are cut into chunks, one for each of its programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steprule.engine import blocks, lines
from steprule.engine.blocks import Region
from steprule.engine.program import exact
from steprule.engine.program.program import Program
from steprule.engine.runners.kernels.chunks import chunks, first_chunks
from steprule.engine.runners.kernels.gpu.line_memory import pieces_of
from steprule.engine.runners.kernels.gpu.printer import added_in, needs_on_gpu
from steprule.engine.runners.kernels.gpu.rooms import Rooms
from steprule.engine.runners.kernels.places import EVEN, Laid, laid, of_chunks, pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

# Blocks have so many lanes, or fewer if all their elements fit: lanes without an element are lost time.
LANES = (32, 64, blocks.BLOCK)


class Part(NamedTuple):
    """Chunks that one launch goes through.

    lanes: how many a block has. programs: how many chunks there are. chunks: the table of them. placed: where
    the tensors and the chunks are in whole tensors, if that matters. rooms: where each stores sums of blocks.
    """

    lanes: int
    programs: int
    chunks: Tensor
    placed: list[Tensor]
    rooms: list[Tensor]


class Work:
    """The chunks of tensors of these shapes.

    cut: (tensor, first element, number of elements) of each chunk. parts: the launches that go through them.
    bounds: which chunks are whose. even: whether each chunk begins where 16 bytes can be loaded at a time.
    added: how many sums of blocks each pass of the program stores. rooms: where.
    """

    def __init__(
        self,
        program: Program,
        dtypes: Mapping[str, torch.dtype],
        shapes: Sequence[Sequence[int]],
        regions: Sequence[Region],
        chunk: int,
        send: Callable[..., Tensor],
    ):
        sizes = np.array(list(map(math.prod, shapes)), dtype=np.int64)
        needs = needs_on_gpu(program, dtypes)
        columns = [0] * len(shapes)
        if program.lined:
            columns = [lines.fact(shape, "columns", stacked=False) for shape in shapes]
        tensors = [laid(x, needs, own) for x, own in zip(regions, columns, strict=True)] if any(needs) else []
        if program.lined:
            self.cut = chunks(sizes, pieces_of(program, shapes, chunk))
        else:
            self.cut = pieces(tensors, chunk) if tensors else chunks(sizes, chunk)
        places = of_chunks(tensors, self.cut)
        self.even = not np.bitwise_or.reduce(self.cut[:, 1], initial=0) % EVEN
        self.bounds = send(first_chunks(self.cut, len(sizes)))
        self.added = [len(added_in(program, sweep)) for sweep in program.passes]
        self.rooms: Rooms | None = None
        if any(self.added):
            form = exact.form_of(torch.float64 in dtypes.values())
            self.rooms = Rooms(tensors, self.cut, places, max(self.added), form, send)
        layouts = [send(np.array([x.table for x in tensors], dtype=np.int64))] if tensors else []
        # What is taken within chunks is found by their numbers, so these all go together.
        taken = sum(len(sweep.reductions) for sweep in program.passes) - sum(self.added)
        apart = not (program.lined or taken)
        self.parts: list[Part] = []
        for lanes, rows in _by_lanes(tensors if apart else [], self.cut).items():
            placed = [*layouts, send(places[rows])] if tensors else []
            rooms = [] if self.rooms is None else [send(self.rooms.firsts[rows]), self.rooms.memory]
            self.parts.append(Part(lanes, len(self.cut[rows]), send(self.cut[rows]), placed, rooms))


def _by_lanes(tensors: Sequence[Laid], cut: NDArray[np.int64]) -> dict[int, NDArray[np.bool_]]:
    """How many lanes blocks have, and which chunks are of tensors with such blocks."""
    if not tensors:
        return {blocks.BLOCK: np.ones(len(cut), dtype=np.bool_)}
    strips = np.array([x.strip for x in tensors], dtype=np.int64)
    lanes = np.array(LANES)[np.searchsorted(LANES[:-1], strips)][cut[:, 0]]
    return {int(x): lanes == x for x in np.unique(lanes)}
