"""Runs the kernels of a program over a set of tensors: where they are, and how threads share the work.

What depends only on the tensors' sizes is made once; their addresses are passed in at every step.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steprule.engine import storage
from steprule.engine.program.program import Program
from steprule.engine.runners.kernels import cache as kernel_cache
from steprule.engine.runners.kernels.cpu import kernel as cpu_kernel
from steprule.engine.runners.kernels.cpu import threads as cpu_threads
from steprule.engine.runners.kernels.printing import CODED, arrays_of

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

# A chunk is long enough that its overhead does not matter, and short enough to share tensors evenly.
CHUNK = 1 << 14
# What starting a chunk costs, in elements.
CHUNK_COST = 256


class Launch:
    """One program over tensors of these shapes and dtypes, ready to run.

    dtypes: of 'p', 'g' and every slot letter, and of what is stored with them (see `cpu.kernel.sources`).
    """

    def __init__(self, program: Program, dtypes: Mapping[str, torch.dtype], shapes: Sequence[Sequence[int]]):
        self._inputs = arrays_of(program, dtypes)
        self._texts = cpu_kernel.sources(program, dtypes)
        self._kernels = [cpu_threads.Kernel(kernel_cache.address_of(*text)) for text in self._texts]
        self._reductions = [list(sweep.reductions) for sweep in program.passes]
        self.sweeps = len(self._reductions)
        lengths = list(map(math.prod, shapes))
        self.bytes = sum(lengths) * sum(dtypes[name].itemsize for name in program.inputs)
        self._lengths = np.array(lengths, dtype=np.int64)
        self._chunks = _chunks(self._lengths)
        self._pointers = np.zeros((len(self._inputs), len(lengths)), dtype=np.int64)
        self._codes = sum(dtype in CODED for dtype in dtypes.values())
        self._scratch = np.zeros(0, dtype=np.float32)
        self._rows = np.zeros(len(lengths), dtype=np.int64)
        self._given_rows: Sequence[int] = ()
        widest = max(len(words) for words in self._reductions)
        self._partials = np.zeros(len(self._chunks) * widest)
        self._order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._bounds: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._job = cpu_threads.Job(tensors=len(lengths))
        self._job_address = ctypes.addressof(self._job)
        self._scalars = np.zeros((0, program.scalar_count))
        self._fill("chunks", self._chunks)
        self._fill("pointers", self._pointers)
        self._fill("rows", self._rows)
        self._fill("partials", self._partials)

    def explain(self) -> list[str]:
        """Where the kernels can be read, and why they do not use torch's threads if they do not."""
        files = [kernel_cache.source_of(*text) for text in self._texts]
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
        if len(scalars) != len(self._scalars):
            self._scalars = np.zeros((len(scalars), self._scalars.shape[1]))
            self._fill("scalars", self._scalars)
        width = len(scalars[0]) if len(scalars) else 0
        self._scalars[:, :width] = scalars
        if rows is not self._given_rows:
            self._given_rows = rows
            self._rows[:] = np.multiply(rows, self._scalars.shape[1])
        number = cpu_threads.threads(self.bytes)
        self._share(number)
        self._kernels[sweep].run(self._job_address, number)
        words = self._reductions[sweep]
        taken = self._partials[: len(self._chunks) * len(words)].reshape(-1, max(1, len(words)))
        return [self._combine(step.word, taken[:, place]) for place, step in enumerate(words)]

    def finished(self, word: str, shares: Any) -> Any:
        """What a reduction comes to over each tensor."""
        if word == "mean":
            return shares / np.maximum(self._lengths, 1)
        return np.sqrt(shares) if word == "norm" else shares

    def _fill(self, name: str, table: NDArray[Any]) -> None:
        setattr(self._job, name, table.ctypes.data)

    def _share(self, number: int) -> None:
        """Split the chunks into one share per thread, each of about the same work.

        Each thread gets the same part of every tensor as in torch's own kernels, so that what it worked on
        there is still in its caches and on its side of the machine.
        """
        if len(self._bounds) == number + 1:
            return
        tensors, starts, lengths = self._chunks.T
        order = np.argsort((starts + lengths / 2) / self._lengths[tensors], kind="stable")
        work = np.concatenate(([0], np.cumsum(lengths[order] + CHUNK_COST)))
        ends = np.arange(number + 1) * work[-1] // number
        self._bounds = np.array(np.searchsorted(work, ends), dtype=np.int64)
        parts = zip(self._bounds[:-1], self._bounds[1:], strict=True)
        self._order = np.concatenate([np.sort(order[first:last]) for first, last in parts])
        self._fill("order", self._order)
        self._fill("bounds", self._bounds)
        self._job.shares = number
        self._scratch = _aligned(number * self._codes * storage.BLOCK)
        self._fill("scratch", self._scratch)
        openmp = cpu_threads.openmp() if number > 1 else None
        for name in ("thread_number", "thread_count"):
            setattr(self._job, name, getattr(openmp, name, 0))

    def _combine(self, word: str, partials: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a reduction came to over each tensor, before it is finished, from its chunks in order."""
        counts = -(-self._lengths // CHUNK)
        starts = (np.cumsum(counts) - counts)[counts > 0]
        result = np.full(len(counts), -np.inf if word == "largest" else 0.0)
        combine = np.maximum if word == "largest" else np.add
        result[counts > 0] = combine.reduceat(partials, starts)
        return result


def _aligned(count: int) -> NDArray[np.float32]:
    """Zeros that begin at a cache line, so that no two threads share one.

    Without that, a step in 8 bits took up to twice as long.
    """
    line = 128 // 4  # processors fetch lines in pairs
    room = np.zeros(count + line, dtype=np.float32)
    start = -(room.ctypes.data // 4) % line
    return room[start : start + count]


def _chunks(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(tensor, first element, number of elements) of each chunk, tensor after tensor."""
    counts = -(-lengths // CHUNK)
    tensors = np.repeat(np.arange(len(lengths)), counts)
    starts = (np.arange(len(tensors)) - np.repeat(np.cumsum(counts) - counts, counts)) * CHUNK
    return np.stack((tensors, starts, np.minimum(CHUNK, lengths[tensors] - starts)), axis=1)
