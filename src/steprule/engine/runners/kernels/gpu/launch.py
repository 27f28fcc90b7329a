"""Runs the kernels of a program over a set of tensors on a GPU: one launch for all of them.

What depends only on the tensors' sizes is sent to the device once; their addresses are sent when one of them
has changed, and the scalars at every step. Nothing waits for the device, and nothing is read back from it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from steprule import errors
from steprule.engine import lines
from steprule.engine.blocks import Region
from steprule.engine.program import exact, sums
from steprule.engine.program.program import Program, Reduction
from steprule.engine.program.sums import Partial
from steprule.engine.runners.kernels.cache import NoKernel
from steprule.engine.runners.kernels.chunks import chunks, first_chunks
from steprule.engine.runners.kernels.gpu import kernel as gpu_kernel
from steprule.engine.runners.kernels.gpu.functions import Functions, file_of
from steprule.engine.runners.kernels.gpu.line_memory import Lines, pieces_of
from steprule.engine.runners.kernels.places import EVEN, laid, of_chunks, pieces
from steprule.engine.runners.kernels.printing import arrays_of, needs_of

# How many elements one program of the launch processes, and how many it holds in registers at a time.
CHUNK = 1 << 13
BLOCK = 1 << 10


class Launch:
    """One program over tensors of these shapes and dtypes on one device, ready to run.

    dtypes: of 'p', 'g' and every slot letter, and of what is stored with them (see `cpu.kernel.sources`).
    shapes: those that rows and columns are taken of. regions: which parts of whole tensors they are.

    Raises: NoKernel if it cannot be compiled here.
    """

    def __init__(
        self,
        program: Program,
        dtypes: Mapping[str, torch.dtype],
        shapes: Sequence[Sequence[int]],
        regions: Sequence[Region],
        device: torch.device,
    ):
        reason = missing(device) or gpu_kernel.why_not(program, dtypes)
        if reason is not None:
            raise NoKernel(reason)
        self.device = device
        self._rule = program.rule
        self._shares = program.shares
        # What scalars are rounded to; values per row or column are made of doubles.
        double = program.lined or torch.float64 in dtypes.values()
        self.dtype = torch.float64 if double else torch.float32
        self._inputs = arrays_of(program, dtypes)
        # The others are read one value at a time.
        self._wide = [not name.endswith(("_scale", "_key")) for name in self._inputs]
        self._texts = gpu_kernel.sources(program, dtypes)
        self._elements = sum(map(math.prod, shapes))
        texts = iter(self._texts)
        self._kernels = [None if sweep.idle else Functions(*next(texts)) for sweep in program.passes]
        sizes = np.array(list(map(math.prod, shapes)), dtype=np.int64)
        needs = needs_of(program, dtypes)._replace(summed=False)
        columns = [0] * len(shapes)
        if program.lined:
            columns = [lines.fact(shape, "columns", stacked=False) for shape in shapes]
        tensors = [laid(x, needs, own) for x, own in zip(regions, columns, strict=True)] if any(needs) else []
        if program.lined:
            cut = chunks(sizes, pieces_of(program, shapes, CHUNK))
        else:
            cut = pieces(tensors, CHUNK) if tensors else chunks(sizes, CHUNK)
        layouts = np.array([x.table for x in tensors], dtype=np.int64)
        self._placed = [self._send(layouts), self._send(of_chunks(tensors, cut))] if tensors else []
        self._programs = len(cut)
        self._chunks = self._send(cut)
        self._even = not np.bitwise_or.reduce(cut[:, 1], initial=0) % EVEN
        self._bounds = self._send(first_chunks(cut, len(sizes)))
        self._lengths = self._send(np.maximum(sizes, 1), torch.float64)
        self._unscaled = self._send(np.array([1.0, 0.0]), torch.float32)
        self._reductions = [list(sweep.reductions) for sweep in program.passes]
        self._partials = self._send(np.zeros(len(cut) * max(map(len, self._reductions))))
        self._pointers = np.zeros((len(sizes), len(self._inputs)), dtype=np.int64)
        self._lines: Lines | None = None
        if program.lined:
            self._lines = Lines(program, dtypes, shapes, cut, self._send)
            self._pointers = np.concatenate((self._pointers, self._lines.places), axis=1)
        self._sent: tuple[Any, Tensor] | None = None
        self._rows: tuple[list[int], Tensor] | None = None
        self._compile()

    def explain(self) -> list[str]:
        """Where the kernels can be read."""
        texts = [*self._texts, *(self._lines.texts if self._lines is not None else ())]
        return [f"kernel: {file_of(*text)}" for text in texts]

    def check(self, counts_on_host: bool) -> None:
        """Raise RuntimeError if a CUDA graph is to repeat what the host has to know."""
        if not _capturing(self.device):
            return
        if counts_on_host:
            raise errors.captured_counts(self._rule)
        if self._shares:
            raise errors.captured_sums(self._rule)

    def place(self, name: str, addresses: Sequence[int]) -> None:
        """Set the address of the first element of each tensor, for one input of the program."""
        self._pointers[:, self._inputs.index(name)] = addresses

    def run(
        self,
        scalars: Sequence[Sequence[float]] | Tensor,
        rows: list[int],
        scaling: Tensor | None = None,
        sweep: int = 0,
    ) -> list[Tensor]:
        """One sweep.

        scalars: rows of what `Program.scalars` have computed so far, or a table of them on the device.
        rows: which of them is each tensor's own. scaling: what `DeviceCounters.scaling` made, if a gradient
        scaler is at work. Returns, for each reduction of the sweep, what it came to over each tensor.
        """
        with _on(self.device):
            found = [self._start(reduction.word) for reduction in self._reductions[sweep]]
            if not self._programs:
                return found
            tables, aligned = self._tables(scalars, rows, scaling), self._aligned()
            return list(self._launch(sweep, tables, aligned))

    def run_columns(
        self,
        scalars: Sequence[Sequence[float]] | Tensor,
        rows: list[int],
        scaling: Tensor | None = None,
        stage: int = 0,
    ) -> list[Tensor]:
        """What is computed for each column before a sweep, or after the last one; as `run`."""
        assert self._lines is not None
        with _on(self.device):
            tables = self._tables(scalars, rows, scaling)
            return list(self._lines.run(stage, [*tables, *self._more()], self._options(self._aligned())))

    def _tables(
        self, scalars: Sequence[Sequence[float]] | Tensor, rows: list[int], scaling: Tensor | None
    ) -> list[Tensor]:
        if not isinstance(scalars, Tensor):
            scalars = self._send(np.array(scalars, dtype=np.float64), self.dtype)
        if self._rows is None or self._rows[0] != rows:
            self._rows = list(rows), self._send(np.array(rows, dtype=np.int64))
        tables = [self._pointer_table(), self._chunks, self._rows[1], scalars.to(self.dtype)]
        return [*tables, self._unscaled if scaling is None else scaling, *self._placed]

    def _more(self) -> list[Tensor]:
        """What kernels on rows and columns are also given: how many there are, and whose chunks are which."""
        return [] if self._lines is None else [*self._lines.tables, self._bounds]

    def _aligned(self) -> bool:
        addresses = self._pointers[:, : len(self._wide)][:, self._wide]
        return self._even and not np.bitwise_or.reduce(addresses, axis=None) & 15

    def finished(self, reduction: Reduction, shares: Tensor) -> Tensor:
        """What a reduction comes to over each tensor."""
        if reduction.word == "mean" and self._lines is not None and reduction.operand.level != "element":
            return shares / self._lines.counts[reduction.operand.level]
        if reduction.word == "mean":
            return shares / self._lengths
        return shares.sqrt() if reduction.word == "norm" else shares

    def together(self, word: str, shares: Tensor) -> Partial:
        """What a reduction comes to over all tensors, before it is finished."""
        values: list[float] = cast(Any, shares).tolist()
        parts = [Partial(x if word == "largest" else exact.of_number(x), 0) for x in values]
        return sums.together(word, parts)._replace(elements=self._elements)

    def _start(self, word: str) -> Tensor:
        start = -math.inf if word == "largest" else 0.0
        return torch.full((len(self._pointers),), start, dtype=torch.float64, device=self.device)

    def _launch(self, sweep: int, tables: list[Tensor], aligned: bool, only_compile: bool = False) -> Any:
        tables, count = [*tables, *self._more()], len(self._reductions[sweep])
        given = tables, self._programs, self._bounds, self._partials, count
        kernel = self._kernels[sweep]
        return () if kernel is None else kernel.run(*given, self._options(aligned, only_compile))

    def _options(self, aligned: bool, only_compile: bool = False) -> dict[str, Any]:
        return {"ALIGNED": aligned, "BLOCK": BLOCK, "warmup": only_compile}

    def _compile(self) -> None:
        """Compile the kernels, or find those that an earlier process compiled."""
        integers, numbers = self._chunks, self._lengths.to(self.dtype)
        try:
            with _on(self.device):
                tables = [integers, integers, integers, numbers, self._unscaled, *self._placed]
                for sweep in range(len(self._kernels)):
                    self._launch(sweep, tables, aligned=True, only_compile=True)
                if self._lines is not None:
                    self._lines.compile([*tables, *self._more()], self._options(True, only_compile=True))
        except Exception as error:
            raise NoKernel(f"no kernel could be made ({type(error).__name__}: {error})") from error

    def _pointer_table(self) -> Tensor:
        """The addresses on the device, sent again if one has changed."""
        if _capturing(self.device):
            # A CUDA graph sends the table again whenever it is replayed, so it must have one of its own.
            table = self._send(self._pointers)
            _captured.append((self, table))
            return table
        if self._sent is None or not np.array_equal(self._sent[0], self._pointers):
            self._sent = self._pointers.copy(), self._send(self._pointers)
        return self._sent[1]

    def _send(self, array: Any, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of the array on the device, made without waiting for the device."""
        host = torch.as_tensor(array, device="cpu").to(dtype)
        if self.device.type == "cpu":
            return host.clone()
        # Pinned memory is read later; torch does not reuse it before that.
        return host.pin_memory().to(self.device, non_blocking=True)


# Launches that a CUDA graph may replay. It reads their tables for as long as it exists, without notice.
_captured: list[Any] = []


def _capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded for a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> Any:
    """A context in which kernels are launched on this device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


@cache
def missing(device: torch.device) -> str | None:
    """Why no kernel can run on this device, or None."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "Triton's kernels run on a CPU only with TRITON_INTERPRET=1"
    if device.type not in ("cuda", "xpu"):
        return f"Triton makes no kernels for {device.type}"
    if device.type == "cuda" and not torch.version.hip:
        found = torch.cuda.get_device_capability(device)
        if found < (7, 0):
            return f"Triton needs compute capability 7.0 or higher, {device} has {found[0]}.{found[1]}"
    return None
