"""How tensors are cut into chunks, and chunks into shares of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from steprule.engine.blocks import BLOCK
from steprule.engine.program.exact import form_of
from steprule.engine.program.program import Reduction
from steprule.engine.runners.kernels import cache
from steprule.engine.runners.kernels.chunks import first_chunks
from steprule.engine.runners.kernels.cpu import threads
from steprule.engine.runners.kernels.places import STRIP, Laid, of_chunks
from steprule.engine.runners.kernels.printing import is_exact

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

# A chunk is long enough that its overhead does not matter, and short enough to share tensors evenly.
CHUNK = 1 << 14
# What starting a chunk costs, in elements.
CHUNK_COST = 256
# With sums of columns, a chunk has at least so many rows, and a tensor at most so many chunks.
ROWS, CHUNKS = 64, 64


class Exact(NamedTuple):
    """The sum over each tensor: in limbs, and as a double."""

    limbs: NDArray[np.int64]
    rounded: NDArray[np.float64]


# The kernel that runs after a sweep with sums.
COMBINE = """\"\"\"What the chunks of each tensor come to together; written by steprule.\"\"\"

from steprule.engine.runners.kernels.cpu.sums import *
{more}

def kernel(job):
    count, tensors = sums_of_sweep(job), tensors_of_job(job)
    for place in range(count):
        for tensor in range(tensors):
            total = sum_of_tensor(job, place * tensors + tensor)
            clear(total)
            first = first_chunks(job, tensor)
            for chunk in range(first[0], first[1]):
                add_sum(total, sum_of_chunk(job, chunk * count + place))
            result = rounded_sums(job, place * tensors + tensor)
            result[0] = rounded(total, sum_of_tensor(job, count * tensors))
"""

OF_DOUBLES = "from steprule.engine.runners.kernels.cpu.sums_of_doubles import *\n"


class Cut:
    """Chunks of the elements of tensors, or of their columns, and the job of a kernel that goes over them.

    lengths: how many elements, or columns, each tensor has. cut: (tensor, first element, number of elements) of
    each chunk. widest: the most reductions of a kernel. laid: how the kernel goes through each tensor, if that
    matters. codes: how many arrays are written as 8-bit codes. added: the dtype of what is added up exactly, if
    anything is.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        cut: NDArray[np.int64],
        widest: int,
        laid: Sequence[Laid] = (),
        codes: int = 0,
        added: Any = None,
    ):
        self.lengths = lengths
        self.chunks = np.ascontiguousarray(cut)
        self.job = threads.Job(tensors=len(lengths))
        self._address = ctypes.addressof(self.job)
        self._codes = codes
        self._widest = widest
        self._added = added
        form = form_of(added is np.float64)
        self.job.width = self._width = form.width
        self._partials = np.zeros(len(self.chunks) * widest * form.width, dtype=np.int64)
        self._values: NDArray[Any] = np.zeros(0)
        self._order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._bounds: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._scratch = np.zeros(0, dtype=np.float32)
        self.first_chunks = first_chunks(self.chunks, len(lengths))
        self._layouts = np.array([x.table for x in laid], dtype=np.int64)
        self._places = of_chunks(laid, self.chunks) if laid else self._layouts
        self.point(chunks=self.chunks, partials=self._partials, layouts=self._layouts, places=self._places)
        if added is not None:
            text = COMBINE.format(more=OF_DOUBLES if added is np.float64 else "")
            self._add = threads.Kernel(cache.address_of("sums", text))
            self._sums = np.zeros((widest * len(lengths) + 1) * form.width, dtype=np.int64)
            self._rounded = np.zeros(widest * len(lengths))
            self.point(first_chunks=self.first_chunks, sums=self._sums, rounded=self._rounded)

    def point(self, **tables: NDArray[Any]) -> None:
        """Put the addresses of tables, which the caller keeps alive, into the job."""
        for name, table in tables.items():
            setattr(self.job, name, table.ctypes.data)

    def run(self, kernel: threads.Kernel, number: int, reductions: Sequence[Reduction]) -> list[Any]:
        """Run a kernel on so many threads. Returns what each of its reductions came to over each tensor."""
        self._share(number)
        kernel.run(self._address, number)
        count = len(reductions)
        if self._added is not None and any(map(is_exact, reductions)):
            self.job.reductions = count
            self._add.run(self._address, 1)
        return [self._share_of(place, count, x) for place, x in enumerate(reductions)]

    def _share_of(self, place: int, count: int, reduction: Reduction) -> Any:
        """What a reduction came to over each tensor: a double, or a sum in limbs and as a double."""
        if not is_exact(reduction):
            taken = self._partials[: len(self.chunks) * count * self._width].reshape(-1, count, self._width)
            return self._combine(reduction.word, taken[:, place, 0].view(np.float64))
        first, tensors = place * len(self.lengths), len(self.lengths)
        width = self._width
        limbs = self._sums[first * width : (first + tensors) * width].reshape(-1, width)
        return Exact(limbs.copy(), self._rounded[first : first + tensors].copy())

    def _share(self, number: int) -> None:
        """Split the chunks into one share per thread, each of about the same work.

        Each thread gets the same part of every tensor as in torch's own kernels, so that what it worked on
        there is still in its caches and on its side of the machine.
        """
        if len(self._bounds) == number + 1:
            return
        tensors, starts, lengths = self.chunks.T
        order = np.argsort((starts + lengths / 2) / self.lengths[tensors], kind="stable")
        work = np.concatenate(([0], np.cumsum(lengths[order] + CHUNK_COST)))
        ends = np.arange(number + 1) * work[-1] // number
        self._bounds = np.array(np.searchsorted(work, ends), dtype=np.int64)
        parts = zip(self._bounds[:-1], self._bounds[1:], strict=True)
        self._order = np.concatenate([np.sort(order[first:last]) for first, last in parts])
        self._scratch = _aligned(number * self._codes * BLOCK)
        self.point(order=self._order, bounds=self._bounds, scratch=self._scratch)
        self.job.shares = number
        if self._added is not None:
            self.job.room = STRIP
            self._values = np.zeros(number * self._widest * STRIP, dtype=self._added)
            self.point(values=self._values)
        openmp = threads.openmp() if number > 1 else None
        for name in ("thread_number", "thread_count"):
            setattr(self.job, name, getattr(openmp, name, 0))

    def _combine(self, word: str, partials: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a reduction came to over each tensor, before it is finished, from its chunks in order."""
        some = self.first_chunks[1:] > self.first_chunks[:-1]
        result = np.full(len(some), -np.inf if word == "largest" else 0.0)
        combine = np.maximum if word == "largest" else np.add
        result[some] = combine.reduceat(partials, self.first_chunks[:-1][some])
        return result


def rows_together(rows: int, columns: int, with_columns: bool) -> int:
    """How many rows a chunk has.

    with_columns: sums of columns are kept for each chunk, so there must not be too many.
    """
    count = max(1, CHUNK // columns)
    return max(count, ROWS, -(-rows // CHUNKS)) if with_columns else count


def _aligned(count: int) -> NDArray[np.float32]:
    """Zeros that begin at a cache line, so that no two threads share one.

    Without that, a step in 8 bits took up to twice as long.
    """
    line = 128 // 4  # processors fetch lines in pairs
    room = np.zeros(count + line, dtype=np.float32)
    start = -(room.ctypes.data // 4) % line
    return room[start : start + count]
