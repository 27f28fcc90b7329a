"""How many bytes an optimizer keeps and needs, known before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steprule.engine import foreach, runners, storage
from steprule.engine.fields import Slot, scalar_dtype
from steprule.engine.reference import compute_dtype
from steprule.engine.rule import RuleOptimizer


@dataclass(frozen=True)
class MemoryRow:
    """One state entry of one group. `torch_bytes` is what it would take in the parameter's own dtype."""

    group: int
    entry: str
    kept_as: str
    bytes: int
    torch_bytes: int


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of state per entry and group, and the most that a step needs besides; prints as a table."""

    rows: tuple[MemoryRow, ...]
    parameter_bytes: int
    parameters: int
    transient_bytes: int

    @property
    def state_bytes(self) -> int:
        """All state together."""
        return sum(row.bytes for row in self.rows)

    @property
    def torch_state_bytes(self) -> int:
        """The same state in the parameters' own dtypes, as torch.optim keeps it."""
        return sum(row.torch_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'group':>5}  {'entry':<24}{'kept as':<18}{'bytes':>16}{'as torch':>16}"]
        lines += [
            f"{row.group:>5}  {row.entry:<24}{row.kept_as:<18}{row.bytes:>16,}{row.torch_bytes:>16,}"
            for row in self.rows
        ]
        per_number = self.state_bytes / max(1, self.parameters)
        lines.append(f"{'':>5}  {'state':<42}{self.state_bytes:>16,}{self.torch_state_bytes:>16,}")
        lines.append(f"{'':>5}  {'parameters':<42}{self.parameter_bytes:>16,}")
        lines.append(f"{'':>5}  {'a step needs besides, at most':<42}{self.transient_bytes:>16,}")
        lines.append(f"{per_number:.3f} bytes of state per parameter")
        return "\n".join(lines)


def memory_report(optimizer: RuleOptimizer) -> MemoryReport:
    """What the state of every trainable parameter takes, whether or not it exists yet, against torch's.

    When: before a run, to see what `state_dtype` and `low_precision` save.
    """
    rows: list[MemoryRow] = []
    numbers = parameter_bytes = transient = 0
    for index, group in enumerate(optimizer.param_groups):
        params: list[Tensor] = [p for p in group["params"] if p.requires_grad]
        numbers += sum(p.numel() for p in params)
        parameter_bytes += sum(p.numel() * p.element_size() for p in params)
        transient = max(transient, _transient(optimizer, group, params))
        sizes: dict[tuple[str, str], list[int]] = {}
        for param in params:
            for entry, kept_as, size, torch_size in _entries(optimizer, param, group):
                total = sizes.setdefault((entry, kept_as), [0, 0])
                total[0] += size
                total[1] += torch_size
        rows += [MemoryRow(index, *names, *total) for names, total in sizes.items()]
    return MemoryReport(tuple(rows), parameter_bytes, numbers, transient)


def _entries(optimizer: RuleOptimizer, param: Tensor, group: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """(entry, dtype, bytes, bytes as torch) of one parameter, from its shape alone."""
    shadow = torch.empty_like(param, device="meta")
    found: list[tuple[str, str, int, int]] = []
    state: dict[str, Any] = {}
    if optimizer.counts(group):
        size = scalar_dtype().itemsize
        found.append(("step", str(scalar_dtype()), size, size))
    for slot in optimizer.slots.values():
        if not slot.exists(group):
            continue
        made = storage.create(slot, shadow, group)
        state |= made
        found += [(k, str(v.dtype), _size(v), _torch_size(slot, k, v, shadow)) for k, v in made.items()]
    extra = storage.create_for_parameter(shadow, group, state, 0)
    return found + [(k, str(v.dtype), _size(v), 0) for k, v in extra.items()]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _torch_size(slot: Slot, key: str, kept: Tensor, param: Tensor) -> int:
    if key != slot.key:
        return 0
    return _size(kept) if slot.per_tensor else kept.numel() * param.element_size()


def _transient(optimizer: RuleOptimizer, group: dict[str, Any], params: list[Tensor]) -> int:
    """The most bytes of temporaries at one time, by the runner that will run."""
    runner = runners.choose(type(optimizer), group).runner
    if runner.endswith("kernel") or not params:
        return 0
    largest = max(p.numel() * compute_dtype(p).itemsize for p in params)
    if not optimizer.traced:
        return 4 * largest
    if runner == "foreach":
        program = optimizer.program(group)
        half = any(p.dtype in storage.HALF for p in params)
        alive = foreach.most_alive(program, program.inputs if half else ())
        whole = sum(p.numel() * compute_dtype(p).itemsize for p in params)
        return min(foreach.BUCKET_BYTES, alive * whole)
    return len(optimizer.program(group).instructions) * largest
