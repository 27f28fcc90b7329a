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
from steprule.engine import blocks
from steprule.engine.blocks import Region
from steprule.engine.program import exact, sums
from steprule.engine.program.program import Program, Reduction
from steprule.engine.program.sums import Partial
from steprule.engine.runners.kernels.cache import NoKernel
from steprule.engine.runners.kernels.gpu import kernel as gpu_kernel
from steprule.engine.runners.kernels.gpu.functions import Functions, file_of
from steprule.engine.runners.kernels.gpu.line_memory import Lines
from steprule.engine.runners.kernels.gpu.rooms import Sums
from steprule.engine.runners.kernels.gpu.work import Part, Work
from steprule.engine.runners.kernels.printing import arrays_of, is_exact

# How many elements one program of the launch processes, and how many it holds in registers at a time.
CHUNK = 1 << 13
BLOCK = 1 << 10
# And how many at most where it rounds at random or encodes them, which takes more registers.
NARROW = 1 << 9


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
        self._sizes = list(map(math.prod, shapes))
        texts = iter(self._texts)
        self._kernels = [None if sweep.idle else Functions(*next(texts)) for sweep in program.passes]
        self._work = Work(program, dtypes, shapes, regions, CHUNK, self._send)
        self._reductions = [list(sweep.reductions) for sweep in program.passes]
        taken = [len(x) - n for x, n in zip(self._reductions, self._work.added, strict=True)]
        self._partials = self._send(np.zeros(len(self._work.cut) * max(taken)))
        self._lengths = self._send(np.maximum(self._sizes, 1), torch.float64)
        self._unscaled = self._send(np.array([1.0, 0.0]), torch.float32)
        self._pointers = np.zeros((len(shapes), len(self._inputs)), dtype=np.int64)
        self._lines: Lines | None = None
        if program.lined:
            self._lines = Lines(program, dtypes, shapes, self._work.cut, self._send)
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
    ) -> list[Any]:
        """One sweep.

        scalars: rows of what `Program.scalars` have computed so far, or a table of them on the device.
        rows: which of them is each tensor's own. scaling: what `DeviceCounters.scaling` made, if a gradient
        scaler is at work. Returns, for each reduction of the sweep, what it came to over each tensor.
        """
        with _on(self.device):
            tables = self._tables(scalars, rows, scaling)
            return self._launch(sweep, tables, self._options(self._aligned()))

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
            (part,) = self._work.parts
            tables = self._with(part, self._tables(scalars, rows, scaling))
            return list(self._lines.run(stage, tables, self._options(self._aligned())))

    def _tables(
        self, scalars: Sequence[Sequence[float]] | Tensor, rows: list[int], scaling: Tensor | None
    ) -> list[Tensor]:
        """What is the same for all parts of the work."""
        if not isinstance(scalars, Tensor):
            scalars = self._send(np.array(scalars, dtype=np.float64), self.dtype)
        if self._rows is None or self._rows[0] != rows:
            self._rows = list(rows), self._send(np.array(rows, dtype=np.int64))
        scaling = self._unscaled if scaling is None else scaling
        return [self._pointer_table(), self._rows[1], scalars.to(self.dtype), scaling]

    def _with(self, part: Part, tables: list[Tensor]) -> list[Tensor]:
        """What kernels are given; on rows and columns also how many there are, and whose chunks are which."""
        more = [] if self._lines is None else [*self._lines.tables, self._work.bounds]
        return [tables[0], part.chunks, *tables[1:], *part.placed, *more]

    def _aligned(self) -> bool:
        addresses = self._pointers[:, : len(self._wide)][:, self._wide]
        return self._work.even and not np.bitwise_or.reduce(addresses, axis=None) & 15

    def finished(self, reduction: Reduction, shares: Tensor | Sums) -> Tensor:
        """What a reduction comes to over each tensor."""
        shares = shares.rounded if isinstance(shares, Sums) else shares
        if reduction.word == "mean" and self._lines is not None and reduction.operand.level != "element":
            return shares / self._lines.counts[reduction.operand.level]
        if reduction.word == "mean":
            return shares / self._lengths
        return shares.sqrt() if reduction.word == "norm" else shares

    def partials(self, word: str, shares: Any) -> list[Partial]:
        """What a reduction comes to over each tensor, before it is finished; this waits for the device."""
        if isinstance(shares, Sums):
            values: list[Any] = [exact.from_limbs(row) for row in cast(Any, shares.limbs).tolist()]
        else:
            values = [x if word == "largest" else exact.of_number(x) for x in shares.tolist()]
        return [Partial(value, size) for value, size in zip(values, self._sizes, strict=True)]

    def column(self, values: list[float]) -> Tensor:
        """What finished reductions of each tensor are, as `finished` gives them."""
        return self._send(np.array(values, dtype=np.float64))

    def together(self, word: str, shares: Any) -> Partial:
        """What a reduction comes to over all tensors, before it is finished; this waits for the device."""
        if isinstance(shares, Sums):
            limbs: list[int] = cast(Any, shares.limbs.sum(0)).tolist()
            return Partial(exact.from_limbs(limbs), sum(self._sizes))
        return sums.together(word, self.partials(word, shares))

    def _launch(self, sweep: int, tables: list[Tensor], options: dict[str, Any]) -> list[Any]:
        """One sweep, and what each of its reductions comes to over each tensor."""
        kernel, work, added = self._kernels[sweep], self._work, self._work.added[sweep]
        if kernel is None:
            return []
        for part in work.parts:
            given = [*self._with(part, tables), *(part.rooms if added else [])]
            block = min(BLOCK, NARROW) if part.placed and not added else BLOCK
            more = {"BLOCK": block, "SHARING": part.lanes}
            kernel.start(given, part.programs, self._partials, {**options, **more})
        reductions = self._reductions[sweep]
        count = len(reductions) - added
        taken = iter(kernel.combined(work.bounds, self._partials, count, options))
        if not added or work.rooms is None:
            return list(taken)
        exactly = iter(work.rooms.added(added, options["warmup"]))
        return [next(exactly if is_exact(x) else taken) for x in reductions]

    def _options(self, aligned: bool, only_compile: bool = False) -> dict[str, Any]:
        return {"ALIGNED": aligned, "BLOCK": BLOCK, "SHARING": blocks.BLOCK, "warmup": only_compile}

    def _compile(self) -> None:
        """Compile the kernels, or find those that an earlier process compiled."""
        integers, numbers = self._work.bounds, self._lengths.to(self.dtype)
        options = self._options(True, only_compile=True)
        try:
            with _on(self.device):
                tables = [integers, integers, numbers, self._unscaled]
                for sweep in range(len(self._kernels)):
                    self._launch(sweep, tables, options)
                if self._lines is not None:
                    self._lines.compile(self._with(self._work.parts[0], tables), options)
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
