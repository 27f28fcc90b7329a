"""How tensors are cut into pieces that threads or programs of a launch work on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import


def chunks(lengths: NDArray[np.int64], pieces: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """(tensor, first element, number of elements) of each chunk, tensor after tensor.

    lengths: of the tensors. pieces: how many elements a chunk has.
    """
    counts = -(-lengths // pieces)
    tensors = np.repeat(np.arange(len(lengths)), counts)
    sizes = np.broadcast_to(pieces, lengths.shape)[tensors]
    starts = (np.arange(len(tensors)) - np.repeat(np.cumsum(counts) - counts, counts)) * sizes
    return np.stack((tensors, starts, np.minimum(sizes, lengths[tensors] - starts)), axis=1)


def first_chunks(cut: NDArray[np.int64], tensors: int) -> NDArray[np.int64]:
    """Where the chunks of each tensor begin, and where the last one's end."""
    return np.searchsorted(cut[:, 0], np.arange(tensors + 1)).astype(np.int64)
