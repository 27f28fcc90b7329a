"""What is kept once per tensor: mainly step counts, a rule's own numbers, and keys of random rounding.

Each stays the tensor that it is in the state, wherever its memory is, so that everything else that holds it
(another process, a checkpoint being restored) sees every change. They are read and written as plain memory: a
torch operation on each would cost more than everything else here.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from steprule.engine import storage
from steprule.engine.fields import scalar_dtype
from steprule.engine.program.program import Program
from steprule.plain import DOUBLE_WORDS

KINDS = {torch.float32: "f", torch.float64: "d"}


def keys_of(program: Program, state: Mapping[str, Any]) -> list[str]:
    """The keys of what a state keeps once per tensor: the step count, then the rule's own."""
    keys = [slot.key for slot in program.scalar_slots.values() if not slot.shared]
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
        """Put these numbers there, infinite where they are out of range."""
        with np.errstate(over="ignore"):
            self._memory[self._places] = numbers


class Counters:
    """The counts of tensors that step together. Tensors with equal counts share one row of scalars.

    facts: what the program asks about each tensor, which has to be equal, too. counts: for each of `keys`,
    which `keys_of` gave, their counts, of which only the addresses are kept.
    """

    def __init__(
        self,
        program: Program,
        facts: Sequence[Mapping[str, float]],
        keys: Sequence[str],
        counts: Sequence[Sequence[Tensor]],
    ):
        self._program = program
        self._counting = list(keys[:1]) == ["step"]
        # Of the slots that parameters share, the groups hold the values.
        self._letters = [letter for letter, slot in program.scalar_slots.items() if not slot.shared]
        self._cells = [Cells(list(map(Tensor.data_ptr, x)), KINDS[x[0].dtype]) for x in counts]
        self._counts: list[Any] = []
        self._after: list[list[float]] = []
        self._new: dict[str, Any] = {}
        self._first: list[int] = []
        self._handed_on: list[Any] = []
        self._each = list(range(len(facts)))
        self._facts = facts
        self.table: Any = None
        self.row_of: list[int] = []
        self._group([cells.read() for cells in self._cells])
        self._later = [vectorized(stage.source) for stage in program.scalars[1:]]

    def next(self, values: Mapping[str, Any]) -> Any:
        """The rows of scalars of the next step's first sweep; `rows` says whose each is. Counts nothing.

        values: the hyper-parameters, and the slots that parameters share by letter. Raises whatever the rule's
        arithmetic on them raises.
        """
        counts = [cells.read() for cells in self._cells]
        if not all(map(np.array_equal, counts, self._counts)):
            self._group(counts)
        stage = self._program.scalars[0]
        rows: list[list[float]] = []
        handed_on: list[Any] = []
        self._after, self._new = [], {}
        for first in self._first:
            now = [float(column[first]) for column in counts]
            t = math.nan
            if self._counting:
                # In the count's own precision, where the largest ones no longer grow.
                t = self._cells[0].rounded(now[0] + 1)
                now[0] = t if self._program.counts else now[0]
            own: dict[str, Any] = dict(self._facts[first])
            if self._letters:
                own |= zip(self._letters, now[-len(self._letters) :], strict=True)
            operands, new, *rest = stage.function(values, t, {**values, **own} if own else values)
            for letter, value in zip(stage.slots, new, strict=True):
                self._note(letter, value, now)
            rows.append([float(x) for x in operands])
            handed_on += rest
            self._after.append(now)
        if not self._later:
            return rows
        self._handed_on = [np.array(x, dtype=np.float64)[self.row_of] for x in zip(*handed_on, strict=True)]
        self.table = np.zeros((len(self._each), self._program.scalar_count))
        self.table[:, : stage.count] = np.array(rows)[self.row_of]
        return self.table

    def _note(self, letter: str, value: Any, now: list[float]) -> None:
        """Keep the new value of a coarse slot for the end of the step."""
        if letter in self._letters:
            now[self._letters.index(letter) - len(self._letters)] = float(value)
        else:
            self._new[letter] = float(value)

    @property
    def rows(self) -> list[int]:
        """For each tensor, which row of scalars is its own."""
        return self._each if self._later else self.row_of

    def add(self, stage: int, reduced: Mapping[int, Any]) -> None:
        """Complete the rows with the scalars that are made of finished reductions.

        reduced: what each came to, for every tensor or for all of them.
        """
        operands, new = self._later[stage - 1](self._handed_on, reduced)
        first = self._program.scalars[stage].first
        for place, value in enumerate(operands):
            self.table[:, first + place] = value
        self._new |= dict(zip(self._program.scalars[stage].slots, new, strict=True))

    def count(self) -> None:
        """Count the step that `next` prepared, and keep the new values of the tensors' own slots."""
        self._counts = []
        changed = False
        for place, cells in enumerate(self._cells):
            column = [row[place] for row in self._after]
            cells.write(column[0] if len(column) == 1 else [column[row] for row in self.row_of])
            letter = (["step"] * self._counting + self._letters)[place]
            if letter in self._new:
                cells.write(self._new[letter])
                changed = True
            self._counts.append(cells.read())
        if changed:
            self._group(self._counts)

    def shared(self) -> dict[str, float]:
        """The new values of the slots that parameters share, by key."""
        slots = self._program.scalar_slots
        # A vector holds the same number for every tensor.
        return {slots[x].key: float(np.ravel(value)[0]) for x, value in self._new.items() if slots[x].shared}

    def _group(self, counts: list[Any]) -> None:
        """Give tensors with equal counts and facts one row."""
        rows: dict[Any, int] = {}
        self._first = []
        keys: list[Any] = list(zip(*(column.tolist() for column in counts), strict=True)) or [()] * len(
            self._each
        )
        if self._program.facts:
            keys = [(key, *facts.values()) for key, facts in zip(keys, self._facts, strict=True)]
        for place, key in enumerate(keys):
            if key not in rows:
                rows[key] = len(rows)
                self._first.append(place)
        self.row_of = [rows[key] for key in keys]
        self._counts = counts


_where = cast(Any, np.where)


def _number_by_number(word: str, operands: int) -> Callable[..., Any]:
    # numpy's own are off by one unit in the last place, now and then.
    call: Any = np.frompyfunc(DOUBLE_WORDS[word], operands, 1)
    return lambda *given: np.asarray(call(*given), dtype=np.float64)


def _sign(x: Any) -> Any:
    return _where(x != 0, np.sign(x), 0.0)


def _larger(a: Any, b: Any) -> Any:
    return _where((a != a) | (a >= b), a, b)


def _smaller(a: Any, b: Any) -> Any:
    return _where((a != a) | (a <= b), a, b)


def _select(condition: Any, a: Any, b: Any) -> Any:
    return _where(np.asarray(condition) != 0, a, b)


def _as_stored(x: Any) -> Any:
    kind = np.float64 if scalar_dtype() == torch.float64 else np.float32
    return np.asarray(x).astype(kind).astype(np.float64)


# The words of scalars on vectors with one number per tensor; the numbers are those of `DOUBLE_WORDS`.
VECTOR_WORDS: dict[str, Callable[..., Any]] = {
    "sqrt": _number_by_number("sqrt", 1),
    "exp": _number_by_number("exp", 1),
    "log": _number_by_number("log", 1),
    "atan2": _number_by_number("atan2", 2),
    "power": _number_by_number("power", 2),
    "sign": _sign,
    "larger": _larger,
    "smaller": _smaller,
    "select": _select,
    "as_stored": _as_stored,
}


def vectorized(source: str) -> Callable[..., tuple[Any, Any]]:
    """The function of a later stage of `Program.scalars`, on vectors."""
    scope: dict[str, Any] = dict(VECTOR_WORDS)
    exec(compile(source, "<scalars of a step rule>", "exec"), scope)

    def quietly(c: Any, r: Any) -> tuple[Any, Any]:
        with np.errstate(all="ignore"):
            return scope["scalars"](c, r)

    return quietly


class Keys:
    """The random rounding keys of many tensors.

    columns: for each kind of key, by its name, the tensors' keys. Only their addresses are kept.
    """

    def __init__(self, columns: Mapping[str, Sequence[Tensor]]):
        self._cells = {name: Cells(list(map(Tensor.data_ptr, x)), "q") for name, x in columns.items()}

    def advance(self) -> None:
        """New keys for the next step, as `storage.next_keys` makes them."""
        for name, cells in self._cells.items():
            cells.write(storage.next_key(name, cells.read()))
