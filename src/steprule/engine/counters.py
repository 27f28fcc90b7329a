"""What is kept once per tensor: step counts above all, a rule's own numbers, and keys of random rounding.

Each stays the tensor that it is in the state, wherever its memory is, so that everything else that holds it
(another process, a checkpoint being restored) sees every change. They are read and written as plain memory: a
torch operation on each would cost more than everything else here.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steprule.engine import storage
from steprule.engine.program import Program

KINDS = {torch.float32: "f", torch.float64: "d"}


def keys_of(program: Program, state: Mapping[str, Any]) -> list[str]:
    """The keys of what a state keeps once per tensor: the step count, then the rule's own."""
    keys = [slot.key for slot in program.scalar_slots.values()]
    return ["step", *keys] if "step" in state else keys


class Cells:
    """Single numbers of one dtype at these addresses, read and written together."""

    def __init__(self, addresses: Sequence[int], kind: str):
        size = np.dtype(kind).itemsize
        first = min(addresses)
        span: Any = (ctypes.c_char * (max(addresses) + size - first)).from_address(first)
        # All memory from the first to the last, of which nothing but the cells is ever touched.
        self._memory = np.frombuffer(span, dtype=kind)
        self._places = (np.array(addresses, dtype=np.int64) - first) // size

    def read(self) -> Any:
        """The numbers, as an array of their dtype."""
        return self._memory[self._places]

    def rounded(self, number: float) -> float:
        """A number as it would be read after it was written."""
        return float(self._memory.dtype.type(number))

    def write(self, numbers: Any) -> None:
        """Put these numbers there."""
        self._memory[self._places] = numbers


class Counters:
    """The counts of tensors that step together. Tensors with equal counts share one row of scalars.

    tensors: how many. counts: for each of `keys`, which `keys_of` gave, their counts, of which only the
    addresses are kept.
    """

    def __init__(self, program: Program, tensors: int, keys: Sequence[str], counts: Sequence[Sequence[Tensor]]):
        self._program = program
        self._counting = list(keys[:1]) == ["step"]
        self._letters = list(program.scalar_slots)
        self._cells = [Cells(list(map(Tensor.data_ptr, x)), KINDS[x[0].dtype]) for x in counts]
        self._counts: list[Any] = []
        self._after: list[list[float]] = []
        self._first: list[int] = []
        self.row_of: list[int] = []
        self._group([cells.read() for cells in self._cells], tensors)

    def next(self, values: Mapping[str, Any]) -> list[list[float]]:
        """The rows of scalars of the next step; `row_of` says whose each is. Counts nothing.

        values: the hyper-parameters. Raises whatever the rule's arithmetic on them raises.
        """
        counts = [cells.read() for cells in self._cells]
        if not all(map(np.array_equal, counts, self._counts)):
            self._group(counts, len(self.row_of))
        rows: list[list[float]] = []
        self._after = []
        for first in self._first:
            now = [float(column[first]) for column in counts]
            t = math.nan
            if self._counting:
                # In the count's own precision, where the largest ones no longer grow.
                now[0] = t = self._cells[0].rounded(now[0] + 1)
            own = dict(zip(self._letters, now[-len(self._letters) :], strict=True)) if self._letters else {}
            operands, new = self._program.scalars(values, t, own)
            for letter, value in zip(self._program.scalar_outputs, new, strict=True):
                now[self._letters.index(letter) - len(self._letters)] = float(value)
            rows.append([float(x) for x in operands])
            self._after.append(now)
        return rows

    def count(self) -> None:
        """Count the step that `next` was asked about."""
        self._counts = []
        for place, cells in enumerate(self._cells):
            column = [row[place] for row in self._after]
            cells.write(column[0] if len(column) == 1 else [column[row] for row in self.row_of])
            self._counts.append(cells.read())

    def _group(self, counts: list[Any], tensors: int) -> None:
        """Give tensors with equal counts one row."""
        rows: dict[Any, int] = {}
        self._first = []
        keys = list(zip(*(column.tolist() for column in counts), strict=True)) or [()] * tensors
        for place, key in enumerate(keys):
            if key not in rows:
                rows[key] = len(rows)
                self._first.append(place)
        self.row_of = [rows[key] for key in keys]
        self._counts = counts


class Keys:
    """The random rounding keys of many tensors.

    columns: for each kind of key, the tensors' keys. Only their addresses are kept.
    """

    def __init__(self, columns: Sequence[Sequence[Tensor]]):
        self._cells = [Cells(list(map(Tensor.data_ptr, column)), "q") for column in columns]

    def advance(self) -> None:
        """New keys for the next step, as `storage.next_keys` makes them."""
        for cells in self._cells:
            cells.write(storage.mix(cells.read() + 1))
