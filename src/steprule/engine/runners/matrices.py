"""Carries out words on whole matrices between the sweeps of a step: on all equal matrices at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from steprule import matrix_errors
from steprule.engine.program.program import (
    Instruction,
    Program,
    Reduction,
    Register,
    Scalar,
    Stage,
    Step,
    WholeInstruction,
)
from steprule.engine.runners.eager import Eager, Lined
from steprule.engine.views import View

# What words on whole matrices are given at a time, in bytes.
BYTES = 1 << 28
# The same on a CPU, where what several words read and write stays in the cache, and is made in memory that the
# process has just freed: to get memory from the system takes longer than to fill it.
CACHED = 1 << 22

States = Sequence[Mapping[str, Any]]
# What registers hold for all parameters of one shape.
Values = dict[Register, Any]
# The scalars of each parameter of one shape.
Scalars = Sequence[Sequence[float]]


def most_at_once(device: torch.device) -> int:
    """How many bytes words on whole matrices are given at a time on a device."""
    return CACHED if device.type == "cpu" else BYTES


def from_sweeps(program: Program) -> set[str]:
    """The names of the arrays that go from sweeps to words on whole matrices."""
    return {name for stage in program.stages if stage is not None for name in stage.takes if name != "g"}


def dtypes_of(program: Program, computed: torch.dtype) -> dict[str, torch.dtype]:
    """The precision of each array that goes from a sweep to words on whole matrices, or back."""
    stages = [stage for stage in program.stages if stage is not None]
    steps = [step for stage in stages for step in stage.steps]
    makers = {step.out: step for step in steps}
    taken = {name: x for stage in stages for name, x in stage.takes.items() if name != "g"}
    given = {name: x for stage in stages for name, x in stage.gives.items()}
    found = {name: _narrow([x for x in steps if r in x.reads], computed) for name, r in taken.items()}
    return found | {name: _narrow([makers[r]], computed) for name, r in given.items()}


def _narrow(steps: Sequence[Step], computed: torch.dtype) -> torch.dtype:
    """The precision that these all work in, if it is one of its own; steps in double have no other."""
    kinds = {x.word.dtype if isinstance(x, WholeInstruction) else None for x in steps}
    (kind, *others) = kinds
    if others or kind is None or computed == torch.float64:
        return computed
    return cast(torch.dtype, getattr(torch, kind))


class _Equal:
    """Parameters of one shape, whose matrices lie in them in the same way."""

    def __init__(self, places: list[int], shape: Sequence[int], view: View, device: torch.device):
        self.places = places
        self.shape = (len(places), *shape)
        self.device = device
        self.view = view
        # Between sweeps: a tensor for all parameters by name, and what registers hold.
        self.arrays: dict[str, Tensor] = {}
        self.values: Values = {}

    def at(self, places: list[int]) -> _Equal:
        """Parameters of the same kind at other places."""
        made = copy(self)
        made.places, made.shape = places, (len(places), *self.shape[1:])
        made.arrays, made.values = {}, {}
        return made

    def make(self, name: str, dtype: torch.dtype) -> Tensor:
        """Make an array."""
        self.arrays[name] = made = torch.empty(self.shape, dtype=dtype, device=self.device)
        return made

    def matrices(self, stacked: Tensor) -> Tensor:
        """The matrices of all parameters; a single one as the loop over parameters sees it."""
        found = self.view.matrices(stacked, leading=1)
        return found[0] if self.alone else found

    @property
    def alone(self) -> bool:
        """Whether there is a single matrix."""
        return len(self.places) == 1 and len(self.view.shape(self.shape[1:])) == 2

    def keep(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        """Keep what words have made of the matrices, in the order of the parameters' elements."""
        if self.view.plain and value.dtype == dtype and value.is_contiguous():
            self.arrays[name] = value.view(self.shape)
        else:
            self.arrays[name] = self.view.back(value, self.shape, leading=1).to(dtype).contiguous()


class MatrixWork:
    """What parameters that are stepped together need for a program's words on whole matrices.

    shapes: theirs. views: how their matrices lie in them.
    """

    def __init__(
        self,
        program: Program,
        shapes: Sequence[Sequence[int]],
        views: Sequence[View],
        computed: torch.dtype,
        device: torch.device,
    ):
        assert program.matrices is not None
        self._program = program
        self._matrices = program.matrices
        self._computed = computed
        self.dtypes = dtypes_of(program, computed)
        self._dead = _dead_after(program)
        together: dict[Any, list[int]] = {}
        for place, (shape, view) in enumerate(zip(shapes, views, strict=True)):
            together.setdefault((tuple(shape), view), []).append(place)
        self._equals = [_Equal(x, shape, view, device) for (shape, view), x in together.items()]

    @classmethod
    def of_all(cls, works: Sequence[MatrixWork]) -> MatrixWork:
        """The work of several batches of one program as one: their parameters one after the other."""
        made, first = copy(works[0]), 0
        together: dict[Any, tuple[_Equal, list[int]]] = {}
        for work in works:
            for equal in work._equals:
                places = together.setdefault((equal.shape[1:], equal.view), (equal, []))[1]
                places += [first + place for place in equal.places]
            first += sum(len(equal.places) for equal in work._equals)
        made._equals = [equal.at(places) for equal, places in together.values()]
        return made

    def begin(self) -> dict[str, list[int]]:
        """Make the arrays that sweeps fill. Returns the addresses by name, one for each parameter."""
        names = from_sweeps(self._program)
        self.make(names)
        return {name: self._addresses(name) for name in names}

    def make(self, names: Collection[str]) -> None:
        """Make arrays of these names."""
        for equal in self._equals:
            for name in names:
                equal.make(name, self.dtypes[name])

    def arrays(self, name: str) -> list[Tensor]:
        """The arrays of a name, one for each parameter."""
        found = {
            place: x for own in self._equals for place, x in zip(own.places, own.arrays[name], strict=True)
        }
        return [found[place] for place in range(len(found))]

    def _addresses(self, name: str) -> list[int]:
        """Where the arrays of a name are, one for each parameter."""
        found = [0] * sum(len(own.places) for own in self._equals)
        for own in self._equals:
            stacked = own.arrays[name]
            first, size = stacked.data_ptr(), stacked.nbytes // len(own.places)
            for number, place in enumerate(own.places):
                found[place] = first + number * size
        return found

    def run(
        self,
        number: int,
        table: Sequence[Sequence[float]],
        rows: Sequence[int],
        gradients: Sequence[Tensor],
        states: States,
    ) -> dict[str, list[int]]:
        """Carry out what comes before this sweep. Returns the addresses of what it makes, as `begin`.

        table, rows: the scalars, and which row of them is each parameter's.
        """
        stage = self._program.stages[number]
        if stage is None:
            return {}
        for equal in self._equals:
            machine = self._machine(equal)
            self._load(stage, equal, machine, gradients, states)
            scalars = _together([table[rows[place]] for place in equal.places])
            *dead, at_last = self._dead[number]
            for step, over in zip(stage.steps, dead, strict=True):
                equal.values[cast(Register, step.out)] = _carry_out(machine, equal, step, scalars)
                for register in over:
                    del equal.values[register]
            for name, register in stage.gives.items():
                equal.keep(name, equal.values[register], self.dtypes[name])
            for register in at_last:
                del equal.values[register]
            for name in stage.takes:
                equal.arrays.pop(name, None)
        return {name: self._addresses(name) for name in stage.gives}

    def store(self, states: States) -> None:
        """Store the new values of slots that have none per element."""
        for equal in self._equals:
            old: list[Tensor] = []
            new: list[Tensor] = []
            for letter, register in self._matrices.outputs.items():
                made = equal.values[register]
                value: Tensor = made.tensor if isinstance(made, Lined) else made
                kept = [states[place][self._matrices.slots[letter].key] for place in equal.places]
                # A value per matrix may be that of all its rows.
                value = value.expand(*value.shape[:-2], *kept[0].shape[-2:])
                old += kept
                new += value.reshape(len(kept), *kept[0].shape)
            if len(equal.places) == 1:
                # Words have read these where they are, and what one keeps may be another's memory.
                memory = set(map(memory_of, old))
                new = [x.clone() if memory_of(x) in memory else x for x in new]
            if old:
                torch._foreach_copy_(old, new)  # pyright: ignore

    def drop(self, names: Collection[str]) -> None:
        """Free these arrays; what words have made of them stays."""
        for equal in self._equals:
            for name in names:
                equal.arrays.pop(name, None)

    def forget(self) -> None:
        """Free what a step has made."""
        for equal in self._equals:
            equal.arrays, equal.values = {}, {}

    def _load(
        self, stage: Stage, equal: _Equal, machine: Eager, gradients: Sequence[Tensor], states: States
    ) -> None:
        """Put into registers what the steps of a stage read."""
        for name, register in stage.takes.items():
            if register in equal.values:
                continue  # an earlier stage has taken it
            if name == "g":
                stacked = _stack([gradients[place] for place in equal.places]).to(self._computed)
            else:
                stacked = equal.arrays[name]
            equal.values[register] = equal.matrices(stacked)
        for letter, register in stage.slots.items():
            if register not in equal.values:
                key = self._matrices.slots[letter].key
                stacked = _stack([states[place][key] for place in equal.places])
                value = stacked[0] if equal.alone else stacked.flatten(0, -3)
                level = register.level
                dtype = machine.dtype if level in ("left", "right") else machine.lined_dtype
                equal.values[register] = Lined(value.to(dtype), level)

    def _machine(self, equal: _Equal) -> Eager:
        shape = equal.view.shape(equal.shape[1:])
        # Several matrices are a stack of them.
        machine = Eager(self._program.rule, self._computed, shape=shape if equal.alone else (1, *shape[-2:]))
        machine.stacked = machine.on_matrices = True
        return machine


def _dead_after(program: Program) -> list[list[list[Register]]]:
    """What nothing reads any more after each step of each stage, and after the stage.

    New values of slots stay to the end.
    """
    assert program.matrices is not None
    needed = set(program.matrices.outputs.values())
    found: list[list[list[Register]]] = []
    for stage in reversed(program.stages):
        gives: set[Register] = set() if stage is None else set(stage.gives.values())
        own = [[x for x in gives if x not in needed]]
        needed |= gives
        for step in () if stage is None else reversed(stage.steps):
            own.append([x for x in {*step.reads, cast(Register, step.out)} if x not in needed])
            needed.update(step.reads)
        found.append(own[::-1])
    return found[::-1]


class _Together(NamedTuple):
    """The scalars of parameters of one shape: common ones, or those of each."""

    common: Sequence[float] | None
    each: Scalars


def _together(rows: Scalars) -> _Together:
    first = rows[0]
    return _Together(first if all(row is first for row in rows) else None, rows)


def _carry_out(machine: Eager, equal: _Equal, step: Step, scalars: _Together) -> Any:
    """One step for all parameters of one shape; for each on its own if their scalars differ."""
    used = [x.index for x in step.scalars]
    if not used:
        return _named(equal.places, machine, step, equal.values, {})
    if scalars.common is not None:
        common = {i: float(scalars.common[i]) for i in used}
        return _named(equal.places, machine, step, equal.values, common)
    own = [tuple(float(row[i]) for i in used) for row in scalars.each]
    if len(set(own)) == 1:
        return _named(equal.places, machine, step, equal.values, dict(zip(used, own[0], strict=True)))
    made: list[Any] = []
    for place, numbers in enumerate(own):
        values = {r: _part(x, place, len(own)) for r, x in equal.values.items()}
        mine = [equal.places[place]]
        made.append(_named(mine, machine, step, values, dict(zip(used, numbers, strict=True))))
    if isinstance(made[0], Lined):
        return Lined(torch.cat([x.tensor for x in made]), made[0].level)
    return torch.cat(made)


def bytes_of(program: Program, param: Tensor, state: Mapping[str, Any]) -> int:
    """What words are given of a parameter: as many bytes as the largest operand has; 0 without matrices."""
    if program.matrices is None:
        return 0
    kept = [state[slot.key] for slot in program.matrices.slots.values() if slot.key in state]
    return max(x.numel() * max(4, x.element_size()) for x in (param, *kept))


class Shares:
    """Cuts the work on whole matrices, so that words are given no more than so many bytes at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._number = 0

    def share_of(self, program: Program, param: Tensor, state: Mapping[str, Any]) -> int:
        """Which share of the work a parameter is in, after those before it; one for all without matrices."""
        if program.matrices is None:
            return 0
        size = bytes_of(program, param, state)
        if self._bytes and self._bytes + size > self._most:
            self._bytes, self._number = 0, self._number + 1
        self._bytes += size
        return self._number


def memory_of(x: Tensor) -> int:
    """Which memory a tensor is in, as a whole or in part. Not by its address: fake tensors have none."""
    return cast(Any, x.untyped_storage())._cdata


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _part(value: Any, place: int, count: int) -> Any:
    """What belongs to one of so many parameters."""
    tensor: Tensor = value.tensor if isinstance(value, Lined) else value
    size = len(tensor) // count
    own = tensor[place * size : (place + 1) * size]
    return Lined(own, value.level) if isinstance(value, Lined) else own


def _named(places: Sequence[int], *step: Any) -> Any:
    """Carry out one step for parameters at these places, which are noted in an error."""
    try:
        return _one(*step)
    except matrix_errors.WordFailed as failed:
        failed.places = places
        raise


def _one(machine: Eager, step: Step, values: Values, scalars: Mapping[int, float]) -> Any:
    """Carry out one step."""
    if isinstance(step, Reduction):
        return machine.reduce(step.word, _widened(values[step.operand], machine.dtype), step.over).handle
    operands = [_known(x, values, scalars) for x in step.operands]
    if isinstance(step, Instruction):
        return machine.emit(step.word, *(_widened(x, machine.dtype) for x in operands))
    tensors = [x.tensor if isinstance(x, Lined) else x for x in operands]
    if step.word.dtype is None:
        tensors = [_widened(x, machine.dtype) for x in tensors]
    made: Tensor = step.word.made(tensors, step.out.level, machine.shape)
    return made if step.out.level == "element" else Lined(made.to(machine.dtype), step.out.level)


def _known(x: Any, values: Values, scalars: Mapping[int, float]) -> Any:
    """The value of an operand."""
    if isinstance(x, Register):
        return values[x]
    if isinstance(x, Scalar):
        return scalars[x.index]
    if isinstance(x, tuple):
        return tuple(_known(part, values, scalars) for part in cast("tuple[Any, ...]", x))
    return x


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """What a word has made in fewer bits, for arithmetic."""
    narrow = isinstance(value, Tensor) and value.dtype not in (dtype, torch.bool)
    return value.to(dtype) if narrow else value
