"""What kernels on rows and columns keep on a device during a step, and what is computed per column there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from steprule.engine import blocks, lines
from steprule.engine.program.program import Program
from steprule.engine.runners.kernels.cache import NoKernel
from steprule.engine.runners.kernels.chunks import chunks, first_chunks
from steprule.engine.runners.kernels.gpu import kernel as gpu_kernel
from steprule.engine.runners.kernels.gpu.functions import Functions
from steprule.engine.runners.kernels.gpu.lines import COLUMNS
from steprule.engine.runners.kernels.places import Needs, laid, of_chunks
from steprule.engine.runners.kernels.printing import is_placed
from steprule.engine.runners.kernels.turns import kept_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

# A program of a launch goes through so many rows at most. With sums of columns it is at least twice as many, so
# that these take little memory, and a tensor has at most `CHUNKS` of them.
ROWS = 16
CHUNKS = 2048
# Positions within a chunk are 32-bit numbers.
LONGEST = 2**31 - 1


def pieces_of(program: Program, shapes: Sequence[Sequence[int]], chunk: int) -> NDArray[np.int64]:
    """How many elements, in whole rows, a chunk of each tensor has.

    chunk: how many it should have. Raises: NoKernel if a row is too long.
    """
    rows, columns = _counts(shapes)
    together = np.clip(chunk // columns, 1, ROWS)
    if program.column_sums:
        together = np.maximum(np.maximum(together, 2 * ROWS), -(-rows // CHUNKS))
    pieces = together * columns
    if pieces.max(initial=0) > LONGEST:
        raise NoKernel(f"its rows have more than {LONGEST:,} elements")
    return pieces


def _counts(shapes: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Stacks are not for kernels, so this holds for all rules.
    found = [[lines.fact(shape, name, stacked=False) for shape in shapes] for name in ("rows", "columns")]
    rows, columns = np.array(found, dtype=np.int64).reshape(2, -1)
    return rows, columns


class Lines:
    """The rows and columns of tensors that are cut into these chunks.

    send: copies an array to the device. places: one address per tensor and array. tables: the numbers of rows
    and of columns. counts: the same, by level, as numbers to divide by.
    """

    def __init__(
        self,
        program: Program,
        dtypes: Mapping[str, torch.dtype],
        shapes: Sequence[Sequence[int]],
        cut: NDArray[np.int64],
        send: Callable[..., Tensor],
    ):
        rows, columns = _counts(shapes)
        self.tables = [send(rows), send(columns)]
        self.counts = {"row": send(rows, torch.float64), "column": send(columns, torch.float64)}
        texts = gpu_kernel.sources_of_columns(program, dtypes)
        self.texts = [text for text in texts if text is not None]
        self._kernels = [None if text is None else Functions(*text) for text in texts]
        self._reductions = [0 if part is None else len(part.reductions) for part in program.columns]
        own = chunks(columns, COLUMNS)
        self._programs = len(own)
        self._chunks, self._bounds = send(own), send(first_chunks(own, len(shapes)))
        self._placed: list[Tensor] = []
        if is_placed(program, dtypes):
            # Slots per column are rounded at random in the blocks that they have as tensors.
            slots = [lines.shape_per(shape, "column", stacked=False) for shape in shapes]
            tensors = [laid(blocks.whole(shape), Needs(rounded=True)) for shape in slots]
            layouts = np.array([x.table for x in tensors], dtype=np.int64)
            self._placed = [send(layouts), send(of_chunks(tensors, own))]
        self._partials = send(np.zeros(len(own) * max([0, *self._reductions])))
        self._memory: list[Tensor] = []
        double = torch.float64 in dtypes.values()
        sums = np.diff(first_chunks(cut, len(shapes))) * columns
        rooms = [self._room(rows, torch.float64) for _ in kept_rows(program)]
        rooms += [self._room(sums, torch.float64) for _ in program.column_sums]
        values = torch.float64 if double else torch.float32
        rooms += [self._room(columns, values) for _ in program.column_values]
        self.places = np.array(rooms, dtype=np.int64).reshape(len(rooms), len(rows)).T

    def _room(self, counts: NDArray[np.int64], dtype: torch.dtype) -> NDArray[np.int64]:
        """Memory for so many numbers of each tensor, and where each begins."""
        device = self.tables[0].device
        room = torch.zeros(int(counts.sum()), dtype=dtype, device=device)
        self._memory.append(room)
        return room.data_ptr() + (np.cumsum(counts) - counts) * room.itemsize

    def run(self, stage: int, tables: Sequence[Tensor], options: Mapping[str, Any]) -> Any:
        """One part of the program's columns. tables: those of a sweep, whose chunks are others."""
        kernel = self._kernels[stage]
        assert kernel is not None
        pointers, _, rows, scalars, scaling, *rest = tables
        rest = rest[len(self._placed) :]
        given = [pointers, self._chunks, rows, scalars, scaling, *self._placed, *rest]
        count = self._reductions[stage]
        kernel.start(given, self._programs, self._partials, options)
        return kernel.combined(self._bounds, self._partials, count, options)

    def compile(self, tables: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        """Compile the kernels of all parts."""
        for stage, kernel in enumerate(self._kernels):
            if kernel is not None:
                self.run(stage, tables, options)
