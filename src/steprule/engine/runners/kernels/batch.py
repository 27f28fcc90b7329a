"""Parameters that one launch of the kernels steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat, zip_longest
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine import blocks, storage, views
from steprule.engine.fields import counts_on_device
from steprule.engine.program.phases import OPERANDS, PART_OF, PLACES
from steprule.engine.program.program import Program, Reduction
from steprule.engine.runners import reference
from steprule.engine.runners.kernels.addresses import Addresses
from steprule.engine.runners.kernels.counters import Counters, keys_of
from steprule.engine.runners.kernels.forms import Forms
from steprule.engine.runners.kernels.runner import Kernels
from steprule.engine.runners.matrices import MatrixWork, bytes_of, most_at_once
from steprule.engine.sharding.operands import MatrixParts
from steprule.engine.sharding.parts import is_piece, region_in, shape_of
from steprule.engine.views import View

_numel: Callable[[Tensor], int] = Tensor.numel


def counts_there(program: Program, group: dict[str, Any]) -> bool:
    """Whether what is kept once per tensor is on the device: if asked for, or if it is made of sums there."""
    own = {letter for letter, slot in program.scalar_slots.items() if slot.per_tensor}
    return counts_on_device(group) or any(own & set(stage.slots) for stage in program.scalars[1:])


def beside(program: Program, state: Mapping[str, Any]) -> dict[str, str]:
    """What `storage` keeps next to the slots: its name in the kernel, and its key in the state."""
    scales = {f"{letter}_scale": f"{slot.key}_scale" for letter, slot in program.slots.items()}
    found = {name: key for name, key in scales.items() if key in state}
    return found | {key: key for key in storage.EXTRA_KEYS if key in state}


class Batch:
    """Parameters of one group whose tensors have the same dtypes: one launch of the kernel."""

    def __init__(
        self,
        program: Program,
        places: list[int],
        group: dict[str, Any],
        gradients: Sequence[Tensor | None],
        states: Sequence[dict[str, Any]],
        kernels: Kernels,
    ):
        self.program = program
        self.places = places
        self._split = region_in(states[0]) is not None and not is_piece(states[0])
        params: list[Tensor] = [group["params"][i] for i in places]
        own = cast(list[Tensor], [gradients[i] for i in places])
        slots = program.slots.items()
        self.keys = {letter: storage.entry_of(states[0], slot.key) for letter, slot in slots}
        self.keys |= beside(program, states[0])
        self.counted = keys_of(program, states[0])
        dtypes = {letter: states[0][key].dtype for letter, key in self.keys.items()}
        dtypes |= {"p": params[0].dtype, "g": own[0].dtype}
        pairs = list(zip(states, params, strict=True))
        wholes: list[Sequence[int]] = [shape_of(p, x) for x, p in pairs]
        self.work: MatrixWork | MatrixParts | None = None
        if program.matrices is not None:
            found = [views.at(group, place) for place in places]
            self.work = self._matrix_work(params, states, found, wholes)
            dtypes |= self.work.dtypes
            wholes = [view.shape(shape) for view, shape in zip(found, wholes, strict=True)]
        self.lengths = list(map(_numel, params))
        there = counts_there(program, group)
        shapes = [x.shape for x in params]
        regions = [region_in(x) or blocks.whole(blocks.in_memory(p).shape) for x, p in pairs]
        ready = kernels.ready(program, dtypes, states, shapes, wholes, regions, params[0].device, there)
        self.launch, self.counters, self.rounding = ready
        self.scalars: Any = None
        self.on_host = isinstance(self.counters, Counters)
        self.sizes = list(map(len, states))
        self.writes = [x for x in ("p", *self.keys) if x in program.outputs or x not in program.inputs]
        columns = self._columns(params, states)
        self.forms = {letter: Forms(column) for letter, column in columns.items()}
        self.forms["g"] = Forms(own)
        swept = {*self.keys.values(), *self.counted}
        others = [key for key, x in states[0].items() if key not in swept and isinstance(x, Tensor)]
        self.wholes = others if program.matrices is not None else []
        self.whole_forms = Forms(self._wholes(states))
        # What batches have in common whose equal matrices may be worked on together.
        kinds = (
            own[0].dtype,
            reference.compute_dtype(params[0]),
            *(states[0][key].dtype for key in self.wholes),
        )
        self.alike = (
            (id(program), params[0].device, *kinds) if self.work is not None and not self._split else None
        )
        self.most = most_at_once(params[0].device)
        self.size = sum(map(bytes_of, repeat(program), params, states))
        self.addresses = {letter: Addresses(column) for letter, column in columns.items()}
        self.addresses["g"] = Addresses(own)
        for letter in ("p", *self.keys):
            self.launch.place(letter, self.addresses[letter].known)

    def _matrix_work(
        self,
        params: list[Tensor],
        states: Sequence[dict[str, Any]],
        found: list[View],
        wholes: Sequence[Sequence[int]],
    ) -> MatrixWork | MatrixParts:
        """What works on whole matrices, as the views have them."""
        computed = reference.compute_dtype(params[0])
        if self._split:
            return MatrixParts(self.program, params, states, found, computed)
        return MatrixWork(self.program, wholes, found, computed, params[0].device)

    def _columns(self, params: list[Tensor], states: Sequence[dict[str, Any]]) -> dict[str, list[Tensor]]:
        """The tensors of each slot, of what is stored next to it, and of each count, by letter or key."""
        columns = {"p": params}
        for letter, key in self.keys.items():
            columns[letter] = list(map(itemgetter(key), states))
        for key in self.counted:
            columns[f"count {key}"] = list(map(itemgetter(key), states))
        return columns

    def split_places(self, group: dict[str, Any]) -> list[int]:
        """The places in the whole group of these parameters, if other processes have their other parts."""
        return [group[PLACES][place] for place in self.places] if self._split else []

    def _wholes(self, states: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The slots that no sweep reads; not all of them are read by every step."""
        return [state[key] for key in self.wholes for state in states]

    def look(
        self, params: list[Tensor], gradients: list[Tensor], states: Sequence[dict[str, Any]]
    ) -> Iterable[Tensor] | None:
        """The tensors that a step writes, or None unless all tensors are where and what they were.

        Records the gradients' addresses.
        """
        if list(map(len, states)) != self.sizes:
            return None
        try:
            columns = self._columns(params, states)
            wholes = self._wholes(states)
        except KeyError:
            return None
        if not self.whole_forms.hold(wholes):
            return None
        # The form first: not every tensor has an address.
        for letter, column in columns.items():
            if not self.forms[letter].hold(column) or not self.addresses[letter].hold(column):
                return None
        if not self.forms["g"].hold(gradients):
            return None
        addresses = self.addresses["g"].of(gradients)
        if 0 in addresses and any(n and not a for n, a in zip(self.lengths, addresses, strict=True)):
            return None
        self.launch.place("g", addresses)
        return chain.from_iterable([columns[x] for x in self.writes])

    def prepare(self, values: Mapping[str, Any]) -> None:
        """Compute the scalars of the next step, from these hyper-parameters."""
        self.launch.check(counts_on_host=self.on_host)
        self.scalars = self.counters.next(values)

    def step(self, written: Iterable[Tensor], *scaler: Tensor | None) -> tuple[Any, ...]:
        """Run the kernel with the scalars that were prepared and with what a gradient scaler says."""
        scaling = self.scaling(scaler)
        self.note(written)
        if not self.program.passes[0].idle:  # an estimate may set only numbers that a tensor has one of
            self.launch.run(self.scalars, self.counters.rows, *scaling)
        self.end(scaling)
        return scaling

    @property
    def rows(self) -> list[Sequence[float]]:
        """The scalars of each parameter, as far as they are computed."""
        return [self._table[row] for row in self.counters.rows]

    @property
    def _table(self) -> Any:
        return self.scalars if self.counters.table is None else self.counters.table

    def offer(
        self, number: int, group: dict[str, Any], gradients: Sequence[Tensor], states: Sequence[dict[str, Any]]
    ) -> bool:
        """Where matrices are split, offer what words on them need before a sweep. Returns whether any do."""
        work = self.work
        if not isinstance(work, MatrixParts) or not work.offer(number, self.rows, gradients, states):
            return False
        group[OPERANDS].offer(number, work, id(group[PART_OF]), self.split_places(group))
        return True

    def run(self, number: int, scaling: tuple[Any, ...]) -> list[tuple[Reduction, Any]]:
        """What comes between two stages of scalars: values per column, and a sweep.

        Returns the reductions that are finished by then, with what each came to over each tensor.
        """
        given = self._table, self.counters.rows, *scaling
        found: list[tuple[Reduction, Any]] = []
        columns = self.program.columns[number] if number < len(self.program.columns) else None
        if columns is not None:
            found += zip(columns.reductions, self.launch.run_columns(*given, stage=number), strict=True)
        if number < len(self.program.passes) and not self.program.passes[number].idle:
            sweep = self.program.passes[number]
            found += zip(sweep.reductions, self.launch.run(*given, sweep=number), strict=True)
        return found

    def scaling(self, scaler: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """What a gradient scaler says, in a table."""
        return (self.counters.scaling(*scaler),) if scaler and not self.on_host else ()

    def note(self, written: Iterable[Tensor]) -> None:
        """Tell autograd what changes."""
        torch.autograd.graph.increment_version(written)

    @property
    def first_stored(self) -> int | None:
        """The first of the numbers that `run` takes at which anything is stored, if anything is."""
        if self.program.matrices is not None:  # other sweeps only make what words on whole matrices are given
            return len(self.program.passes) - 1
        parts = enumerate(zip_longest(self.program.columns, self.program.passes))
        return next((number for number, pair in parts if any(x is not None and x.outputs for x in pair)), None)

    def end(self, scaling: tuple[Any, ...]) -> None:
        """Count the step."""
        self.counters.count(*scaling)
        self.rounding.advance(*scaling)
