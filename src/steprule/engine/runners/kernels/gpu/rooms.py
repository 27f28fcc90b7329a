"""Where the kernels of a sweep store the sums of blocks, and how those become sums over tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steprule.engine.program.exact import Form
from steprule.engine.runners.kernels.chunks import chunks
from steprule.engine.runners.kernels.places import Laid

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

# How many sums of blocks one program of a launch adds up, and how many rows of limbs one rounds.
SUMS, ROWS = 1 << 10, 32


class Sums(NamedTuple):
    """The sum over each tensor: in limbs, and as a double."""

    limbs: Tensor
    rounded: Tensor


class Rooms:
    """Memory for the sums of all blocks of these tensors, which are cut into these chunks.

    places: where each chunk begins (see `of_chunks`). most: how many sums a sweep takes at most. send: copies
    an array to the device.
    """

    def __init__(
        self,
        laid: Sequence[Laid],
        cut: NDArray[np.int64],
        places: NDArray[np.int64],
        most: int,
        form: Form,
        send: Callable[..., Tensor],
    ):
        counts = _of_chunks(laid, cut, places)
        ends = np.cumsum(counts)
        self.firsts = ends - counts
        own = np.bincount(cut[:, 0], weights=counts, minlength=len(laid)).astype(np.int64)
        pieces = chunks(own, SUMS)
        pieces[:, 1] += (np.cumsum(own) - own)[pieces[:, 0]]
        self._pieces, self._programs = send(pieces), len(pieces)
        self._form, self._tensors = form, len(laid)
        self.memory = send(np.zeros(most * int(counts.sum())))
        self._counts = [send(np.array([each * len(laid)])) for each in range(most + 1)]

    def added(self, each: int, only_compile: bool) -> list[Sums]:
        """What the sums of blocks come to over each tensor, for each of so many sums of a sweep."""
        # Only here, since it imports Triton.
        kernels: Any = import_module("steprule.engine.runners.kernels.gpu.sums")
        form, device = self._form, self.memory.device
        limbs = torch.zeros(self._tensors, each, form.width, dtype=torch.int64, device=device)
        rounded = torch.empty(self._tensors, each, dtype=torch.float64, device=device)
        sizes = {"EACH": each, "LIMBS": form.limbs, "SHIFT": form.shift, "END": form.end, "BLOCK": SUMS}
        if self._programs:
            kernels.add.run(
                self._pieces, self.memory, limbs, grid=(self._programs, each), **sizes, warmup=only_compile
            )
        sizes = {"LIMBS": form.limbs, "LOWEST": form.lowest, "BLOCK": ROWS}
        grid = (-(-self._tensors * each // ROWS),)
        kernels.round_rows.run(limbs, rounded, self._counts[each], grid=grid, **sizes, warmup=only_compile)
        return [Sums(limbs[:, place], rounded[:, place]) for place in range(each)]


def _of_chunks(laid: Sequence[Laid], cut: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many sums each chunk stores: one for each block, or of a loose tensor one for each element."""
    tensors, _, lengths = cut.T
    width, strip, block, _, scales, _ = np.array([x.table for x in laid], dtype=np.int64)[tensors].T
    lines = -(-lengths // width)
    across = np.minimum(scales, -(-(places[:, 1] + lengths) // strip))
    loose = np.array(block == 1, dtype=np.int64)
    return loose * lengths + (1 - loose) * lines * across
