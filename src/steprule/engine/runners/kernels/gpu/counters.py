"""What is kept once per tensor, and the scalars computed from it, if the host must not read them.

A step that is captured in a CUDA graph, or that a gradient scaler may skip, has its step count and its
learning rate on the device. Here the scalars of a program are computed there too: the function that computes
them is plain arithmetic, so it accepts tables with one entry per tensor in place of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine import storage
from steprule.engine.program.program import Program
from steprule.engine.runners.kernels.counters import Counters, keys_of
from steprule.plain import DOUBLE_WORDS, SCALAR_WORDS


class DeviceCounters:
    """What `Counters` is on the host: the counts of tensors that step together, each with its own scalars.

    They are in tables, and the states hold views of these: one operation on the device then counts for all.
    dtype: what the scalars are rounded to. facts: what the program asks about each tensor.
    """

    def __init__(
        self,
        program: Program,
        states: Sequence[dict[str, Any]],
        device: torch.device,
        dtype: torch.dtype,
        facts: Sequence[Mapping[str, float]],
    ):
        self._program = program
        self._device = device
        self._dtype = dtype
        self._keys = keys_of(program, states[0])
        self._tables = [_table(states, key, device) for key in self._keys]
        self._scalars = [scalars_on(device, stage.source) for stage in program.scalars]
        self._after: list[tuple[Tensor, Any]] = []
        self._shared: dict[str, Any] = {}
        self._handed_on: Any = ()
        self.table: Any = None
        self._letters = [letter for letter, slot in program.scalar_slots.items() if not slot.shared]
        self._facts = {
            key: torch.tensor([own[key] for own in facts], dtype=torch.float64, device=device)
            for key in program.facts
        }
        self.rows = list(range(len(states)))

    def next(self, values: Mapping[str, Any]) -> Tensor:
        """The table of scalars of the next step, one row per tensor. Counts nothing.

        values: the hyper-parameters. Raises whatever the rule's arithmetic on them raises.
        """
        counts = [table.double() for table in self._tables]
        counting = self._keys[:1] == ["step"]
        t = counts.pop(0) + 1 if counting else math.nan
        own = dict(zip(self._letters, counts, strict=True)) | self._facts
        hyper = {name: self._as_double(value) for name, value in values.items()}
        operands, new, *rest = self._scalars[0](hyper, t, {**values, **own})
        self._handed_on = rest[0] if rest else ()
        count = self._program.scalar_count
        self.table = torch.empty(len(self.rows), count, dtype=self._dtype, device=self._device)
        self._after, self._shared = [], {}
        self._take(0, operands, new)
        return self.table

    def add(self, stage: int, reduced: Mapping[int, Any]) -> None:
        """Complete the table with the scalars that are made of finished reductions."""
        self._take(stage, *self._scalars[stage](self._handed_on, reduced))

    def _take(self, stage: int, operands: Sequence[Any], new: Sequence[Any]) -> None:
        """Put scalars into the table, and keep new values of coarse slots for the end of the step."""
        first = self._program.scalars[stage].first
        for place, operand in enumerate(operands):
            self.table[:, first + place] = operand
        for letter, value in zip(self._program.scalars[stage].slots, new, strict=True):
            if letter in self._letters:
                counting = self._keys[:1] == ["step"]
                self._after.append((self._tables[self._letters.index(letter) + counting], value))
            else:
                self._shared[self._program.scalar_slots[letter].key] = value

    def shared(self) -> dict[str, float]:
        """The new values of the slots that parameters share, by key."""
        return {key: one_number(value) for key, value in self._shared.items()}

    def count(self, scaling: Tensor | None = None) -> None:
        """Count the step that `next` was asked about.

        scaling: what `scaling` made; a step that it skips is not counted.
        """
        skipped = None if scaling is None else scaling[1] != 0
        if self._program.counts and self._keys[:1] == ["step"]:
            self._tables[0] += 1 if skipped is None else ~skipped
        for table, value in self._after:
            value = as_table(value, self._device)
            table.copy_(value if skipped is None else torch.where(skipped, table.double(), value))

    def scaling(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
        """What a gradient scaler tells a launch: the factor of all gradients, and whether to skip the step.

        The factor is rounded as `GradScaler.unscale_` rounds it.
        """
        table = torch.zeros(2, dtype=torch.float32, device=self._device)
        table[0] = 1.0 if grad_scale is None else grad_scale.double().reciprocal().float().reshape(())
        if found_inf is not None:
            table[1] = (found_inf != 0).reshape(())
        return table

    def _as_double(self, value: Any) -> Any:
        """A hyper-parameter; a tensor on the device is not read by the host."""
        if isinstance(value, tuple):
            return tuple(map(self._as_double, cast(tuple[Any, ...], value)))
        if not isinstance(value, Tensor):
            return value
        return value.double() if value.device == self._device else value.item()


class SentCounters(Counters):
    """Counts on the host, with scalars on the device where they are made of sums over tensors there."""

    def __init__(
        self,
        program: Program,
        facts: Sequence[Mapping[str, float]],
        keys: Sequence[str],
        counts: Sequence[Sequence[Tensor]],
        device: torch.device,
    ):
        super().__init__(program, facts, keys, counts)
        self._device = device
        self._functions = [scalars_on(device, stage.source) for stage in program.scalars]

    def next(self, values: Mapping[str, Any]) -> Any:
        """The rows of scalars of the next step's first sweep. Counts nothing."""
        rows = super().next(values)
        if self.table is not None:
            self.table = self._sent(self.table)
            self._handed_on = [self._sent(x) for x in self._handed_on]
        return rows if self.table is None else self.table

    def _sent(self, array: Any) -> Tensor:
        host = torch.as_tensor(array, device="cpu")
        if self._device.type == "cpu":
            return host.clone()
        return host.pin_memory().to(self._device, non_blocking=True)

    def add(self, stage: int, reduced: Mapping[int, Any]) -> None:
        """Complete the table with the scalars that are made of finished reductions."""
        operands, new = self._functions[stage](self._handed_on, reduced)
        first = self._program.scalars[stage].first
        for place, value in enumerate(operands):
            self.table[:, first + place] = value
        slots = zip(self._program.scalars[stage].slots, new, strict=True)
        self._new |= {letter: self._on_host(value) for letter, value in slots}

    def _on_host(self, value: Any) -> Any:
        """A plain number, or one for every tensor."""
        if not isinstance(value, Tensor):
            return float(value)
        return value.reshape(-1).expand(len(self._each)).cpu().numpy()


def one_number(value: Any) -> float:
    """A plain number, or the one that a table holds for every tensor."""
    return float(value.reshape(-1)[0]) if isinstance(value, Tensor) else float(value)


class DeviceKeys:
    """What `Keys` is on the host: the random rounding keys of many tensors, in tables."""

    def __init__(self, states: Sequence[dict[str, Any]], device: torch.device):
        keys = [key for key in storage.KEYS if key in states[0]]
        self._tables = {key: _table(states, key, device) for key in keys}

    def advance(self, scaling: Tensor | None = None) -> None:
        """New keys for the next step, as `storage.next_keys` makes them; a skipped step leaves them."""
        for key, table in self._tables.items():
            new: Tensor = storage.next_key(key, table)
            table.copy_(new if scaling is None else torch.where(scaling[1] == 0, new, table))


def _table(states: Sequence[dict[str, Any]], key: str, device: torch.device) -> Tensor:
    """One table of what the states keep under a key; the states get views of it."""
    # A table made in inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        table = torch.stack([state[key].reshape(()).to(device, non_blocking=True) for state in states])
        for state, entry in zip(states, table.unbind(), strict=True):
            state[key] = entry
    return table


def _sqrt(x: Tensor) -> Tensor:
    return x**0.5


def _as_stored(x: Tensor) -> Tensor:
    return x.float().double()


def _select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition != 0, a, b)


# The words of scalars, where an operand is a table.
WORDS: dict[str, Callable[..., Tensor]] = {
    "sqrt": _sqrt,
    "power": torch.pow,
    "exp": torch.exp,
    "log": torch.log,
    "atan2": torch.atan2,
    "sign": torch.sign,
    "larger": torch.maximum,
    "smaller": torch.minimum,
    "as_stored": _as_stored,
    "select": _select,
}


def as_table(x: Any, device: torch.device) -> Tensor:
    """A plain number as a table with one entry for all tensors; a table unchanged."""
    return x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device)


def scalars_on(device: torch.device, source: str) -> Callable[..., tuple[Any, Any]]:
    """The function that computes the scalars of a program, for tables on this device."""

    def word(name: str) -> Callable[..., Any]:
        def carry_out(*operands: Any) -> Any:
            if not any(isinstance(x, Tensor) for x in operands):
                return (SCALAR_WORDS if name in SCALAR_WORDS else DOUBLE_WORDS)[name](*operands)
            return WORDS[name](*(as_table(x, device) for x in operands))

        return carry_out

    scope: dict[str, Any] = {name: word(name) for name in WORDS}
    exec(compile(source, "<scalars of a step rule>", "exec"), scope)
    return scope["scalars"]
