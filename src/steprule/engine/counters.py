"""What is kept once per tensor: step counts above all, and a rule's own numbers such as a running product.

All tensors' counts of one kind lie in one table, of which the states hold views. They are read and written as
plain memory: an operation of torch or numpy on so few numbers costs more than everything else here.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Mapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from steprule.engine.program import Program

KINDS = {torch.float32: "f", torch.float64: "d"}


def keys_of(program: Program, state: Mapping[str, Any]) -> list[str]:
    """The keys of what a state keeps once per tensor: the step count, then the rule's own."""
    keys = [slot.key for slot in program.scalar_slots.values()]
    return ["step", *keys] if "step" in state else keys


class Counters:
    """The counts of tensors that step together. Tensors with equal counts share one row of scalars."""

    def __init__(self, program: Program, states: Sequence[dict[str, Any]]):
        self._program = program
        self._keys = keys_of(program, states[0])
        self._letters = list(program.scalar_slots)
        self._tables = [torch.stack([s[key].reshape(()).cpu() for s in states]) for key in self._keys]
        self._entries = [list(table.unbind()) for table in self._tables]
        for key, entries in zip(self._keys, self._entries, strict=True):
            for state, entry in zip(states, entries, strict=True):
                state[key] = entry
        self._counts: list[list[float]] = []
        self._first: list[int] = []
        self.row_of: list[int] = []
        self._group([_memory(table).tolist() for table in self._tables], len(states))

    def hold(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether the states still hold the views."""
        pairs = zip(self._keys, self._entries, strict=True)
        return all(all(map(is_, map(itemgetter(key), states), entries)) for key, entries in pairs)

    def advance(self, values: Mapping[str, Any]) -> list[list[float]]:
        """Count one step, and return the rows of scalars of that step; `row_of` says whose each is.

        values: the hyper-parameters. Nothing is counted if they make the scalars fail.
        """
        memory = [_memory(table) for table in self._tables]
        counts: list[list[float]] = [entries.tolist() for entries in memory]
        if counts != self._counts:
            self._group(counts, len(self.row_of))
        rows: list[list[float]] = []
        after: list[list[float]] = []
        for first in self._first:
            now = [column[first] for column in counts]
            t = math.nan
            if self._keys[:1] == ["step"]:
                # In the count's own precision, where the largest ones no longer grow.
                now[0] = t = array(memory[0].format, [now[0] + 1])[0]
            own = dict(zip(self._letters, now[-len(self._letters) :], strict=True)) if self._letters else {}
            operands, new = self._program.scalars(values, t, own)
            for letter, value in zip(self._program.scalar_outputs, new, strict=True):
                now[self._letters.index(letter) - len(self._letters)] = float(value)
            rows.append([float(x) for x in operands])
            after.append(now)
        self._counts = []
        for place, entries in enumerate(memory):
            new_counts = [row[place] for row in after]
            entries[:] = array(entries.format, [new_counts[row] for row in self.row_of])
            self._counts.append(entries.tolist())
        return rows

    def _group(self, counts: list[list[float]], tensors: int) -> None:
        """Give tensors with equal counts one row."""
        rows: dict[Any, int] = {}
        keys = list(zip(*counts, strict=True)) or [()] * tensors
        self.row_of = [rows.setdefault(key, len(rows)) for key in keys]
        self._first = [self.row_of.index(row) for row in range(len(rows))]
        self._counts = counts


def _memory(table: Tensor) -> Any:
    """The table's numbers, where they are now."""
    size = table.numel() * table.element_size()
    buffer: Any = (ctypes.c_char * size).from_address(table.data_ptr())
    entries: Any = memoryview(buffer).cast("B")
    return entries.cast(KINDS[table.dtype])
