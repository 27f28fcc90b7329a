"""Runs the kernels of a program over a set of tensors: where they are, and how threads share the work.

What depends only on the tensors' sizes is made once; their addresses are passed in at every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steprule.engine import blocks, lines
from steprule.engine.blocks import Region
from steprule.engine.program import exact, sums
from steprule.engine.program.program import Program, Reduction
from steprule.engine.program.sums import Partial
from steprule.engine.runners.kernels import cache as kernel_cache
from steprule.engine.runners.kernels.chunks import chunks
from steprule.engine.runners.kernels.cpu import kernel as cpu_kernel
from steprule.engine.runners.kernels.cpu import threads as cpu_threads
from steprule.engine.runners.kernels.cpu.cut import CHUNK, Cut, Exact, rows_together
from steprule.engine.runners.kernels.places import Needs, laid, pieces
from steprule.engine.runners.kernels.printing import Source, arrays_of, coded, needs_of
from steprule.engine.runners.kernels.turns import kept_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

# How many columns are worked on at a time between sweeps.
COLUMNS = 1 << 11


class Launch:
    """One program over tensors of these shapes and dtypes, ready to run.

    dtypes: of 'p', 'g' and every slot letter, and of what is stored with them (see `cpu.kernel.sources`).
    shapes: those that rows and columns are taken of. regions: which parts of whole tensors they are.
    """

    def __init__(
        self,
        program: Program,
        dtypes: Mapping[str, torch.dtype],
        shapes: Sequence[Sequence[int]],
        regions: Sequence[Region],
    ):
        self._inputs = arrays_of(program, dtypes)
        self._texts = cpu_kernel.sources(program, dtypes)
        texts = iter(self._texts)
        self._kernels = [None if sweep.idle else _compiled(next(texts)) for sweep in program.passes]
        self._reductions = [list(sweep.reductions) for sweep in program.passes]
        self.sweeps = len(self._reductions)
        self._lengths = np.array(list(map(math.prod, shapes)), dtype=np.int64)
        self.bytes = int(self._lengths.sum()) * sum(dtypes[name].itemsize for name in program.inputs)
        self._rows = np.zeros(len(shapes), dtype=np.int64)
        self._given_rows: Sequence[int] = ()
        self._scalars = np.zeros((0, program.scalar_count))
        self._lines = _Lines(program, dtypes, shapes) if program.lined else None
        codes, needs = len(coded(program, dtypes)), needs_of(program, dtypes)
        number = np.float64 if torch.float64 in dtypes.values() else np.float32
        columns = [0] * len(shapes) if self._lines is None else self._lines.columns.tolist()
        tensors = [laid(x, needs, own) for x, own in zip(regions, columns, strict=True)] if any(needs) else []
        if self._lines is not None:
            cut = chunks(self._lengths, self._lines.pieces)
        else:
            cut = pieces(tensors, CHUNK) if tensors else chunks(self._lengths, CHUNK)
        widest = max(map(len, self._reductions))
        self._cut = Cut(self._lengths, cut, widest, tensors, codes, number if needs.summed else None)
        self._cuts = [self._cut]
        self._pointers = np.zeros((len(self._inputs), len(shapes)), dtype=np.int64)
        if self._lines is not None:
            self._pointers = np.concatenate((self._pointers, self._lines.make(self._cut)))
            self._cuts.append(self._lines.cut)
        for cut in self._cuts:
            cut.point(pointers=self._pointers, rows=self._rows)

    def explain(self) -> list[str]:
        """Where the kernels can be read, and why they do not use torch's threads if they do not."""
        texts = [*self._texts, *(self._lines.texts if self._lines is not None else ())]
        files = [kernel_cache.source_of(*text) for text in texts]
        alone = cpu_threads.alone()
        return [f"kernel: {file}" for file in files if file is not None] + (
            [] if alone is None else [f"on the calling thread alone: {alone}"]
        )

    def check(self, counts_on_host: bool) -> None:
        """Nothing can be wrong here; see the launch on a GPU."""

    def place(self, name: str, addresses: Sequence[int]) -> None:
        """Set the address of the first element of each tensor, for one input of the program."""
        self._pointers[self._inputs.index(name)] = addresses

    def run(self, scalars: Sequence[Sequence[float]], rows: Sequence[int], sweep: int = 0) -> list[Any]:
        """One sweep.

        scalars: rows of what `Program.scalars` have computed so far. rows: which of them is each tensor's own.
        Returns, for each reduction of the sweep, what it came to over each tensor.
        """
        kernel = self._kernels[sweep]
        assert kernel is not None
        self._take(scalars, rows)
        return self._cut.run(kernel, cpu_threads.threads(self.bytes), self._reductions[sweep])

    def run_columns(self, scalars: Sequence[Sequence[float]], rows: Sequence[int], stage: int) -> list[Any]:
        """What is computed for each column before a sweep, or after the last one; as `run`."""
        assert self._lines is not None
        self._take(scalars, rows)
        return self._lines.run(stage)

    def _take(self, scalars: Sequence[Sequence[float]], rows: Sequence[int]) -> None:
        if len(scalars) != len(self._scalars):
            self._scalars = np.zeros((len(scalars), self._scalars.shape[1]))
            for cut in self._cuts:
                cut.point(scalars=self._scalars)
        width = len(scalars[0]) if len(scalars) else 0
        self._scalars[:, :width] = scalars
        if rows is not self._given_rows:
            self._given_rows = rows
            self._rows[:] = np.multiply(rows, self._scalars.shape[1])

    def finished(self, reduction: Reduction, shares: Any) -> Any:
        """What a reduction comes to over each tensor."""
        shares = shares.rounded if isinstance(shares, Exact) else shares
        if reduction.word == "mean":
            return shares / np.maximum(self._counts(reduction.operand.level), 1)
        return np.sqrt(shares) if reduction.word == "norm" else shares

    def partials(self, word: str, shares: Any) -> list[Partial]:
        """What a reduction comes to over each tensor, before it is finished."""
        lengths: list[int] = self._lengths.tolist()
        if isinstance(shares, Exact):
            values: list[Any] = [exact.from_limbs(row) for row in shares.limbs.tolist()]
        else:
            values = [x if word == "largest" else exact.of_number(x) for x in shares.tolist()]
        return [Partial(value, length) for value, length in zip(values, lengths, strict=True)]

    def column(self, values: list[float]) -> NDArray[np.float64]:
        """What finished reductions of each tensor are, as `finished` gives them."""
        return np.array(values, dtype=np.float64)

    def together(self, word: str, shares: Any) -> Partial:
        """What a reduction comes to over all tensors, before it is finished."""
        elements = int(self._lengths.sum())
        if isinstance(shares, Exact):
            return Partial(exact.from_limbs(shares.limbs.sum(0).tolist()), elements)
        values: list[float] = shares.tolist()
        parts = [Partial(x if word == "largest" else exact.of_number(x), 0) for x in values]
        return sums.together(word, parts)._replace(elements=elements)

    def _counts(self, level: str) -> NDArray[np.int64]:
        """How many elements, rows or columns each tensor has."""
        if self._lines is None or level == "element":
            return self._lengths
        return self._lines.rows if level == "row" else self._lines.columns


class _Lines:
    """The rows and columns of tensors, and the memory for sums and values of them.

    pieces: how many elements a chunk has.
    """

    def __init__(self, program: Program, dtypes: Mapping[str, torch.dtype], shapes: Sequence[Sequence[int]]):
        # Stacks are not for kernels, so this holds for all rules.
        self.rows = np.array([lines.fact(x, "rows", stacked=False) for x in shapes], dtype=np.int64)
        self.columns = np.array([lines.fact(x, "columns", stacked=False) for x in shapes], dtype=np.int64)
        together = [
            rows_together(r, c, bool(program.column_sums))
            for r, c in zip(self.rows.tolist(), self.columns.tolist(), strict=True)
        ]
        self.pieces = np.array(together, dtype=np.int64) * self.columns
        self._program = program
        self._number = np.float64 if torch.float64 in dtypes.values() else np.float32
        texts = cpu_kernel.sources_of_columns(program, dtypes)
        self.texts: list[Source] = [text for text in texts if text is not None]
        self._kernels = [None if text is None else _compiled(text) for text in texts]
        self._reductions = [() if part is None else part.reductions for part in program.columns]
        # Slots per column are rounded at random in the blocks that they have as tensors.
        slots = [lines.shape_per(x, "column", stacked=False) for x in shapes]
        tensors = [laid(blocks.whole(x), Needs(rounded=True)) for x in slots]
        widest = max([0, *map(len, self._reductions)])
        self.cut = Cut(self.columns, chunks(self.columns, COLUMNS), widest, tensors)
        self._memory: list[NDArray[Any]] = []

    def make(self, cut: Cut) -> NDArray[np.int64]:
        """Make the memory for the chunks of a cut. Returns one address per array and tensor."""
        sums = np.diff(cut.first_chunks) * self.columns
        places = [self._room(self.rows, np.float64) for _ in kept_rows(self._program)]
        places += [self._room(sums, np.float64) for _ in self._program.column_sums]
        places += [self._room(self.columns, self._number) for _ in self._program.column_values]
        for each in (cut, self.cut):
            each.point(lines=self.rows, columns=self.columns, first_chunks=cut.first_chunks)
        return np.array(places, dtype=np.int64).reshape(len(places), len(self.rows))

    def _room(self, counts: NDArray[np.int64], dtype: Any) -> NDArray[np.int64]:
        """Memory for so many numbers of each tensor, and where each begins."""
        room = np.zeros(int(counts.sum()), dtype=dtype)
        self._memory.append(room)
        return room.ctypes.data + (np.cumsum(counts) - counts) * room.itemsize

    def run(self, stage: int) -> list[Any]:
        """One part of the program's columns."""
        kernel = self._kernels[stage]
        assert kernel is not None
        number = cpu_threads.threads(sum(x.nbytes for x in self._memory))
        return self.cut.run(kernel, number, self._reductions[stage])


def _compiled(text: Source) -> cpu_threads.Kernel:
    return cpu_threads.Kernel(kernel_cache.address_of(*text))
