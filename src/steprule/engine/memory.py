"""How many bytes an optimizer's state takes and its step needs, known before the first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule import errors
from steprule.engine import storage
from steprule.engine.checkpoint.state_dicts import tensors_in
from steprule.engine.fields import Slot
from steprule.engine.optimizer import CheckedOptimizer
from steprule.engine.rule import RuleOptimizer
from steprule.engine.runners import choice, foreach
from steprule.engine.runners.matrices import BYTES
from steprule.engine.runners.reference import compute_dtype
from steprule.engine.sharding import parts


@dataclass(frozen=True)
class MemoryRow:
    """One state entry of one group. `torch_bytes` is what it would take in the parameter's own dtype.

    name: the group's own name, or an empty text.
    """

    group: int
    entry: str
    kept_as: str
    bytes: int
    torch_bytes: int
    name: str = ""


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of state per entry and group, and the most that a step needs in addition; prints as a table.

    transient_bytes: None if that is not known, as for a step written by hand.
    """

    rows: tuple[MemoryRow, ...]
    parameter_bytes: int
    parameters: int
    transient_bytes: int | None

    @property
    def state_bytes(self) -> int:
        """The size of the whole state."""
        return sum(row.bytes for row in self.rows)

    @property
    def torch_state_bytes(self) -> int:
        """The same state in the parameters' own dtypes, as torch.optim keeps it."""
        return sum(row.torch_bytes for row in self.rows)

    def __str__(self) -> str:
        groups = [f"{row.group} {row.name}".rstrip() for row in self.rows]
        width = max(map(len, ["group", *groups]))
        lines = [f"{'group':>{width}}  {'entry':<24}{'kept as':<18}{'bytes':>16}{'as torch':>16}"]
        lines += [
            f"{group:>{width}}  {row.entry:<24}{row.kept_as:<18}{row.bytes:>16,}{row.torch_bytes:>16,}"
            for group, row in zip(groups, self.rows, strict=True)
        ]
        per_number = self.state_bytes / max(1, self.parameters)
        lines.append(f"{'':>{width}}  {'state':<42}{self.state_bytes:>16,}{self.torch_state_bytes:>16,}")
        lines.append(f"{'':>{width}}  {'parameters':<42}{self.parameter_bytes:>16,}")
        transient = "unknown" if self.transient_bytes is None else f"{self.transient_bytes:,}"
        lines.append(f"{'':>{width}}  {'temporaries of a step, at most':<42}{transient:>16}")
        lines.append(f"{per_number:.3f} bytes of state per parameter")
        return "\n".join(lines)


def memory_report(optimizer: CheckedOptimizer) -> MemoryReport:
    """The memory that the state of the trainable parameters takes, compared with torch's.

    Tensors that exist are counted as they are. What the first step will add is counted too, so the report can
    be read before a run, to see what `state_dtype` and `low_precision` save. Of a DTensor, only the part in
    this process counts.
    """
    if not isinstance(optimizer, CheckedOptimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.not_an_optimizer("memory_report", type(optimizer).__name__)
    rows: list[MemoryRow] = []
    numbers = parameter_bytes = 0
    transient: list[int | None] = []
    for index, group in enumerate(optimizer.param_groups):
        params: list[Tensor] = [p for p in group["params"] if p.requires_grad or p in optimizer.state]
        params = [p for p in params if not is_lazy(p)]
        numbers += sum(_local(p).numel() for p in params)
        parameter_bytes += sum(_size(p) for p in params)
        transient.append(_transient(optimizer, group, params) if isinstance(optimizer, RuleOptimizer) else None)
        sizes: dict[tuple[str, str], list[int]] = {}
        for param in params:
            for entry, kept_as, size, torch_size in _entries(optimizer, param, group):
                total = sizes.setdefault((entry, kept_as), [0, 0])
                total[0] += size
                total[1] += torch_size
        rows += [MemoryRow(index, *names, *total, name=_name(group)) for names, total in sizes.items()]
        rows += _history_to_come(optimizer, index, params, rows)
    most = None if None in transient else max(filter(None, transient), default=0)
    return MemoryReport(tuple(rows), parameter_bytes, numbers, most)


def _entries(
    optimizer: CheckedOptimizer, param: Tensor, group: dict[str, Any]
) -> Iterator[tuple[str, str, int, int]]:
    """(entry, dtype, bytes, bytes as torch) of one parameter: what exists, then what the next step adds."""
    there: dict[str, Any] = dict(optimizer.state.get(param, {}))
    slots = {slot.key: slot for slot in optimizer.composition(group).slots.values()}
    shadow = torch.empty_like(_local(param), device="meta")
    new: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # a rule written by hand may read elements
        new = optimizer.state_to_come(shadow, group, there, 0)
    for key, value in (there | new).items():
        for tensor in tensors_in(value):
            size = _size(tensor)
            yield key, str(tensor.dtype), size, _torch_size(slots, key, tensor, param) if slots else size


def _history_to_come(
    optimizer: CheckedOptimizer, index: int, params: list[Tensor], rows: list[MemoryRow]
) -> list[MemoryRow]:
    """How much a history over all parameters may still grow."""
    each = optimizer.numbers_beside_slots(optimizer.param_groups[index])
    kept = sum(row.bytes for row in rows if row.group == index)
    missing = int(each * sum(_size(p) for p in params)) - kept
    if missing <= 0:
        return []
    return [
        MemoryRow(
            index,
            "history, later (max)",
            str(params[0].dtype),
            missing,
            missing,
            _name(optimizer.param_groups[index]),
        )
    ]


def _name(group: dict[str, Any]) -> str:
    return str(group.get("name") or "")


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if parts.sharded(tensor) else tensor


def _size(tensor: Tensor) -> int:
    tensor = _local(tensor)
    return tensor.numel() * tensor.element_size()


def _torch_size(slots: dict[str, Slot], key: str, kept: Tensor, param: Tensor) -> int:
    """What torch would keep in place of this entry of a declared rule."""
    slot = slots.get(key.removesuffix("_codes"))
    if slot is None:
        return _size(kept) if key == "step" else 0
    return _size(kept) if slot.per_tensor else _local(kept).numel() * param.element_size()


def _transient(optimizer: RuleOptimizer, group: dict[str, Any], params: list[Tensor]) -> int:
    """The most bytes of temporaries at any time, for the runner that will be used."""
    runner = choice.choose(optimizer.composition(group), group).runner
    if not params:
        return 0
    sizes = [p.numel() * compute_dtype(p).itemsize for p in params]
    if runner.plans:
        # What words on whole matrices are given and make, and what they need on the way.
        if not optimizer.rule_of(group).on_matrices:
            return 0
        held = any(x.may_raise for x in optimizer.program(group).kinds)
        return 4 * min(sum(sizes), BYTES) + (sum(sizes) if held else 0)
    largest = max(sizes)
    if runner.name == "foreach":
        program = optimizer.program(group)
        half = any(p.dtype in storage.HALF for p in params)
        alive = max(foreach.most_alive(x, x.inputs if half else ()) for x in program.kinds)
        whole = sum(p.numel() * compute_dtype(p).itemsize for p in params)
        return min(foreach.BUCKET_BYTES, alive * whole)
    return max(len(x.instructions) for x in optimizer.program(group).kinds) * largest
