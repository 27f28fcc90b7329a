"""One fused kernel for all parameters of a group: what is kept between steps.

A plan holds which places of a group step together, the addresses and forms of their tensors, and how the
work is cut up. At every step it is compared with what the group holds now: its options, which
parameters have gradients, and the addresses and forms of parameters, gradients and state. If anything
differs (a loaded state, a swapped parameter, a moved device), a new plan is made. A plan keeps no parameter,
gradient or slot alive, goes into no checkpoint, and is not copied with its optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine import plans, storage
from steprule.engine.fields import Field, counts_on_device
from steprule.engine.program import phases, sums
from steprule.engine.program.phases import Going, Part
from steprule.engine.program.program import Program
from steprule.engine.program.sums import Partial
from steprule.engine.runners.kernels import printing
from steprule.engine.runners.kernels.addresses import Addresses
from steprule.engine.runners.kernels.cache import NoKernel
from steprule.engine.runners.kernels.counters import KINDS, Counters, keys_of
from steprule.engine.runners.kernels.forms import Forms
from steprule.engine.runners.kernels.runner import Kernels
from steprule.engine.runners.runner import Prepared

_OWN_DISPATCH = cast(Any, Tensor).__torch_dispatch__
PLAIN = {Tensor, torch.nn.Parameter}

# Options of a group that no program knows and no state shows, yet a plan depends on.
OPTIONS = ("state_dtype", "low_precision", "capturable", "fused")

_numel: Callable[[Tensor], int] = Tensor.numel


def prepare(
    optimizer: Any, group: dict[str, Any], program: Program, after: dict[str, float], kernels: Kernels
) -> Prepared:
    """Prepare a step of every parameter of the group that the kernel can take; what it returns runs it.

    program: the group's. after: gets the new values of slots that parameters share, when the step is taken.
    kernels: for the device that the parameters are on.

    Returns what runs it, and the other parameters that have gradients, which the reference runner steps.
    Nothing changes before that runs. Raises whatever the gradients or the hyper-parameters raise.
    """
    values = _hyperparameters(optimizer, group)
    values |= {x: float(group[slot.key]) for x, slot in program.scalar_slots.items() if slot.shared}
    own = plans.of(optimizer)
    # Kept alive until the kernel has read them, whatever other threads do.
    gradients: list[Tensor | None] = [param.grad for param in group["params"]]
    plan: Plan | None = own.of(group)
    found = plan and plan.look(optimizer.state, group, program, gradients)
    if plan is None or found is None:
        gradients = list(map(_resolved, gradients))
        found = plan and plan.look(optimizer.state, group, program, gradients)
    if plan is None or found is None:
        plan = Plan(optimizer, group, program, gradients, kernels)
        own.keep(plan, group, optimizer.param_groups)
        found = plan.look(optimizer.state, group, program, gradients)
        if found is None:
            raise AssertionError("a new plan must fit what it was made for")
    # Set by a gradient scaler for the length of a step.
    scaler = [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]
    scaler = scaler if scaler != [None, None] else []
    left = [group["params"][place] for place, _ in plan.refused]
    batches = plan.batches
    for batch in batches:
        batch.prepare(values)
    shared = any(slot.shared for slot in program.scalar_slots.values())
    if all(len(own.scalars) == 1 for own in program.kinds):

        def run() -> None:
            for batch, written in zip(batches, found, strict=True):
                scaling = batch.step(written, *scaler)
                if shared and not (scaling and scaling[0][1]):
                    after.update(batch.counters.shared())
            gradients.clear()

        return [Part(run)], left
    keys = phases.keys_of(program, group)
    steps = [
        partial(_sweeps, batch, written, scaler, group, gradients, after)
        for batch, written in zip(batches, found, strict=True)
    ]
    return [Part(step if keys else partial(_to_the_end, step), keys) for step in steps], left


def _to_the_end(step: Callable[[], Going]) -> None:
    for _ in step():
        raise AssertionError("no sum over several tensors was asked for")


def _sweeps(
    batch: Batch,
    written: Iterable[Tensor],
    scaler: list[Tensor | None],
    group: dict[str, Any],
    gradients: list[Tensor | None],
    after: dict[str, float],
) -> Going:
    """A step of a batch whose scalars depend on sums: sweep by sweep.

    gradients: held until the step is over, since other batches of the group may still read theirs.
    """
    program = batch.program
    scaling = batch.begin(written, scaler)
    reduced: dict[int, Any] = {}
    for number, sweep in enumerate(program.passes):
        if number:
            batch.counters.add(number, reduced)
        table = batch.scalars if batch.counters.table is None else batch.counters.table
        found = batch.launch.run(table, batch.counters.rows, *scaling, sweep=number)
        asked: dict[Any, tuple[str, Partial]] = {}
        for reduction, shares in zip(sweep.reductions, found, strict=True):
            if not reduction.shared:
                reduced[reduction.index] = batch.launch.finished(reduction.word, shares)
            else:
                asked[phases.key_in(group, reduction)] = reduction.word, batch.together(reduction.word, shares)
        if asked:
            known = yield asked
            for x in sweep.reductions:
                if x.shared:
                    reduced[x.index] = known[phases.key_in(group, x)]
    for number in range(len(program.passes), len(program.scalars)):
        batch.counters.add(number, reduced)
    batch.end(scaling)
    if not scaling or not scaling[0][1]:  # a gradient scaler skips the step otherwise
        after.update(batch.counters.shared())


def _resolved(gradient: Tensor | None) -> Tensor | None:
    """The gradient, without the lazy minus sign that a kernel would not see."""
    return gradient.resolve_neg() if gradient is not None and gradient.is_neg() else gradient


def _hyperparameters(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """The group's options as a program's scalars take them: a tensor stays one, without its tape."""
    fields: dict[str, Field] = optimizer.composition(group).fields
    return {name: _detached(group[name]) for name, field in fields.items() if name in group and not field.free}


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().reshape(())
    return tuple(map(_detached, cast(tuple[Any, ...], value))) if isinstance(value, tuple) else value


def reasons(optimizer: Any, group: dict[str, Any]) -> dict[str, str]:
    """Of the last step: why which parameters were left to the reference runner, by name."""
    plan: Plan | None = plans.of(optimizer).of(group)
    if plan is None or not plan.refused:
        return {}
    names = optimizer.names_in(group)
    return {names[place]: why for place, why in plan.refused if place < len(names)}


def explain(optimizer: Any, group: dict[str, Any]) -> list[str]:
    """Of the last step: where the kernels can be read, what the reference runner stepped, and why."""
    plan: Plan | None = plans.of(optimizer).of(group)
    kernels = [line for batch in plan.batches for line in batch.launch.explain()] if plan else []
    left = reasons(optimizer, group).items()
    return [*dict.fromkeys(kernels), *(f"{name} by the reference: {reason}" for name, reason in left)]


def why_not(param: Tensor, gradient: Tensor, slots: Mapping[str, Tensor]) -> str | None:
    """Why the kernel cannot step this parameter with this gradient and these slots, or None."""
    tensors = {"the parameter": param, "its gradient": gradient}
    tensors |= {f"its state '{key}'": value for key, value in slots.items()}
    for name, tensor in tensors.items():
        if _wrapped(tensor):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.layout != torch.strided:
            return f"{name} is sparse"
        if tensor.is_neg() or tensor.is_conj():
            return f"{name} has a lazy sign (is_neg, is_conj)"
        if tensor.device != param.device:
            return f"{name} is on {tensor.device}"
        if tensor.shape != param.shape:
            return f"{name} has another shape than the parameter"
        contiguous = tensor.is_contiguous() and param.is_contiguous()
        if not contiguous and tensor.stride() != param.stride():
            return f"{name} has another memory layout than the parameter"
        if tensor.numel() and not tensor.data_ptr():
            return f"{name} has no memory of its own"
    if any(x.dtype in printing.CODED for x in slots.values()) and not param.is_contiguous():
        return "the neighbours that share a scale are not neighbours in memory"
    if not _dense(param):
        return "the parameter's elements have gaps between them in memory"
    return printing.why_not({name: tensor.dtype for name, tensor in tensors.items()})


def _no_count(keys: Sequence[str], state: Mapping[str, Any]) -> str | None:
    """Why what is kept once per tensor cannot be read and written as memory, or None."""
    for key in keys:
        count = state[key]
        if not isinstance(count, Tensor) or count.numel() != 1 or count.dtype not in KINDS:
            return f"its state '{key}' is not a single float32 or float64"
        if _wrapped(count) or count.is_neg() or count.data_ptr() % count.itemsize:
            return f"its state '{key}' has no plain memory of its own"
    return None


def _odd_storage(param: Tensor, state: Mapping[str, Any]) -> str | None:
    """Why what is kept next to the slots cannot be used as it is, or None."""
    for key, value in state.items():
        if key in storage.EXTRA_KEYS or key.endswith("_scale"):
            if _wrapped(value) or value.is_neg():
                return f"its state '{key}' has no plain memory of its own"
            if key in ("compensation", "low_bits") and (value.shape, value.stride()) != (
                param.shape,
                param.stride(),
            ):
                return f"its state '{key}' has another memory layout than the parameter"
            if key.endswith("_scale") and not value.is_contiguous():
                return f"its state '{key}' is not contiguous"
    return None


def _counts_on_device(program: Program, group: dict[str, Any]) -> bool:
    """Whether what is kept once per tensor is on the device: if asked for, or if it is made of sums there."""
    own = {letter for letter, slot in program.scalar_slots.items() if slot.per_tensor}
    return counts_on_device(group) or any(own & set(stage.slots) for stage in program.scalars[1:])


def _wrapped(tensor: Tensor) -> bool:
    """Whether the tensor's operations are not torch's own, as a DTensor's are."""
    kind: Any = type(tensor)
    return kind.__torch_dispatch__ is not _OWN_DISPATCH


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


class Plan:
    """Which parameters of a group step together, and which the kernel leaves to the reference runner.

    Parameters are known by their places in the group.
    """

    def __init__(
        self,
        optimizer: Any,
        group: dict[str, Any],
        program: Program,
        gradients: Sequence[Tensor | None],
        kernels: Kernels,
    ):
        params: list[Tensor] = group["params"]
        self.program = program
        self.options = _options(group)
        self.absent = [gradient is None for gradient in gradients]
        self.present = [place for place, gradient in enumerate(gradients) if gradient is not None]
        self.refused: list[tuple[int, str]] = []
        self._for_now: list[int] = []
        together: dict[Any, list[int]] = {}
        shared = _sharing_memory(params)
        optimizer.check_storage(group)
        # All gradients first: a state that was made for some would outlive the error about another.
        for place in self.present:
            optimizer.check_gradient(params[place], params[place].grad, group)
        states = {place: optimizer.state_of(params[place], group) for place in self.present}
        twice = sharing_state(states)
        for place, state in states.items():
            reason, kind = self._fit(params[place], gradients[place], state, group)
            if reason is not None:
                self._for_now.append(place)
            elif place in shared:
                reason = "it shares memory with another parameter"
            elif place in twice:
                reason = "it shares a tensor of its state with another parameter"
            if reason is not None:
                self.refused.append((place, reason))
            else:
                together.setdefault(kind, []).append(place)
        self._run = _run_of(optimizer.state, [params[place] for place in self.present])
        self.batches: list[Batch] = []
        for places in together.values():
            states = [optimizer.state[params[place]] for place in places]
            try:
                own = program.of(params[places[0]])
                self.batches.append(Batch(own, places, group, gradients, states, kernels))
            except NoKernel as missing:
                self.refused += [(place, str(missing)) for place in places]
        self._rows = self._rows_of()

    def _fit(
        self, param: Tensor, gradient: Any, state: dict[str, Any], group: dict[str, Any]
    ) -> tuple[str | None, Any]:
        """Why the kernel cannot take a parameter, or None; and what those have in common that step together."""
        program = self.program.of(param)
        slots, keys = _slots(program, state), keys_of(program, state)
        reason = why_not(param, gradient, slots) or _no_count(keys, state) or _odd_storage(param, state)
        if reason is not None:
            return reason, None
        where = param.device if _counts_on_device(program, group) else torch.device("cpu")
        for key in keys:
            if state[key].device != where:
                state[key] = state[key].to(where)
        dtypes = (x.dtype for x in (param, gradient, *slots.values(), *(state[key] for key in keys)))
        return None, (
            program is self.program,
            param.device,
            tuple(_beside(program, state)),
            tuple(keys),
            *dtypes,
        )

    def _rows_of(self) -> list[list[int] | None]:
        """For each batch, the places of its parameters among those with gradients; None: it has them all."""
        rows = {place: row for row, place in enumerate(self.present)}
        found = [[rows[place] for place in batch.places] for batch in self.batches]
        return [None if len(x) == len(self.present) else x for x in found]

    def look(
        self,
        state: Mapping[Tensor, Any],
        group: dict[str, Any],
        program: Program,
        gradients: Sequence[Tensor | None],
    ) -> list[Iterable[Tensor]] | None:
        """For each batch the tensors that it writes, or None unless all is as it was when the plan was made.

        Records the gradients' addresses.
        """
        params: list[Tensor] = group["params"]
        if program is not self.program or _options(group) != self.options:
            return None
        if list(map(is_, gradients, repeat(None))) != self.absent:
            return None
        if len(self.present) < len(params):
            params = [params[place] for place in self.present]
            gradients = [gradients[place] for place in self.present]
        states = self._states(state, params)
        if states is None or any(
            self._acceptable(x, state.get(x, {})) for x in (group["params"][i] for i in self._for_now)
        ):
            return None
        found: list[Iterable[Tensor]] = []
        for batch, rows in zip(self.batches, self._rows, strict=True):
            columns: list[Any] = [params, gradients, states]
            if rows is not None:
                columns = [[column[row] for row in rows] for column in columns]
            written = batch.look(*columns)
            if written is None:
                return None
            found.append(written)
        return found

    def _states(self, state: Mapping[Tensor, Any], params: Sequence[Tensor]) -> list[Any] | None:
        """The states of these parameters, if each has one."""
        if self._run is not None:
            keys = list(state)[self._run]
            if len(keys) == len(params) and all(map(is_, keys, params)):
                return list(state.values())[self._run]
        states = list(map(state.get, params))
        return None if any(x is None for x in states) else states

    def _acceptable(self, param: Any, state: dict[str, Any]) -> bool:
        """Whether what was refused before could be taken now."""
        try:
            program = self.program.of(param)
            reason = why_not(param, _resolved(param.grad), _slots(program, state))  # type: ignore[arg-type]
            reason = reason or _no_count(keys_of(program, state), state)
            return (reason or _odd_storage(param, state)) is None
        except (AttributeError, KeyError):
            return True


def _options(group: dict[str, Any]) -> list[Any]:
    """A copy of what a plan depends on, as a dict of dtypes may be changed in place."""
    given = [group.get(name) for name in OPTIONS]
    return [dict(cast(dict[str, str], x)) if isinstance(x, dict) else x for x in given]


def _slots(program: Program, state: dict[str, Any]) -> dict[str, Tensor]:
    keys = [storage.entry_of(state, slot.key) for slot in program.slots.values()]
    return {key: state[key] for key in keys}


def _run_of(state: Mapping[Tensor, Any], params: Sequence[Tensor]) -> slice | None:
    """Where the parameters' states are consecutive and in order, as is usual; look-ups are slower."""
    # Of many groups each would walk the states of all others.
    if not params or len(state) > 16 * len(params):
        return None
    keys = list(state)
    for start, key in enumerate(keys):
        if key is params[0]:
            found = slice(start, start + len(params))
            return found if all(map(is_, keys[found], params)) else None
    return None


def _beside(program: Program, state: Mapping[str, Any]) -> dict[str, str]:
    """What `storage` keeps next to the slots: its name in the kernel, and its key in the state."""
    scales = {f"{letter}_scale": f"{slot.key}_scale" for letter, slot in program.slots.items()}
    found = {name: key for name, key in scales.items() if key in state}
    return found | {key: key for key in storage.EXTRA_KEYS if key in state}


def sharing_state(states: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """The places of parameters whose states hold the same tensor, which must be stepped one after the other."""
    first: dict[int, int] = {}
    found: set[int] = set()
    for place, state in states.items():
        for value in state.values():
            other = first.setdefault(id(value), place) if isinstance(value, Tensor) else place
            if other != place:
                found |= {other, place}
    return found


def _sharing_memory(params: Sequence[Tensor]) -> set[int]:
    """The places of parameters that overlap in memory, which must be stepped one after the other."""
    found: set[int] = set()
    spans = sorted(
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), place)
        for place, x in enumerate(params)
        if type(x) in PLAIN and x.numel() and x.layout == torch.strided
    )
    reach, reaching = 0, 0
    for start, end, place in spans:
        if start < reach:
            found |= {reaching, place}
        if end > reach:
            reach, reaching = end, place
    return found


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
        params: list[Tensor] = [group["params"][i] for i in places]
        own = cast(list[Tensor], [gradients[i] for i in places])
        slots = program.slots.items()
        self.keys = {letter: storage.entry_of(states[0], slot.key) for letter, slot in slots}
        self.keys |= _beside(program, states[0])
        self.counted = keys_of(program, states[0])
        dtypes = {letter: states[0][key].dtype for letter, key in self.keys.items()}
        dtypes |= {"p": params[0].dtype, "g": own[0].dtype}
        self.lengths = list(map(_numel, params))
        there = _counts_on_device(program, group)
        ready = kernels.ready(program, dtypes, states, [x.shape for x in params], params[0].device, there)
        self.launch, self.counters, self.rounding = ready
        self.scalars: Any = None
        self.on_host = isinstance(self.counters, Counters)
        self.sizes = list(map(len, states))
        self.writes = [x for x in ("p", *self.keys) if x in program.outputs or x not in program.inputs]
        columns = self._columns(params, states)
        self.forms = {letter: Forms(column) for letter, column in columns.items()}
        self.forms["g"] = Forms(own)
        self.addresses = {letter: Addresses(column) for letter, column in columns.items()}
        self.addresses["g"] = Addresses(own)
        for letter in ("p", *self.keys):
            self.launch.place(letter, self.addresses[letter].known)

    def _columns(self, params: list[Tensor], states: Sequence[dict[str, Any]]) -> dict[str, list[Tensor]]:
        """The tensors of each slot, of what is stored next to it, and of each count, by letter or key."""
        columns = {"p": params}
        for letter, key in self.keys.items():
            columns[letter] = list(map(itemgetter(key), states))
        for key in self.counted:
            columns[f"count {key}"] = list(map(itemgetter(key), states))
        return columns

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
        except KeyError:
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
        scaling = self.begin(written, scaler)
        self.launch.run(self.scalars, self.counters.rows, *scaling)
        self.end(scaling)
        return scaling

    def begin(self, written: Iterable[Tensor], scaler: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Tell autograd what changes, and put into a table what a gradient scaler says."""
        torch.autograd.graph.increment_version(written)
        return (self.counters.scaling(*scaler),) if scaler and not self.on_host else ()

    def end(self, scaling: tuple[Any, ...]) -> None:
        """Count the step."""
        self.counters.count(*scaling)
        self.rounding.advance(*scaling)

    def together(self, word: str, shares: Any) -> Partial:
        """What a reduction comes to over all tensors of the batch, before it is finished."""
        parts = [Partial(x, n) for x, n in zip(shares.tolist(), self.lengths, strict=True)]
        return sums.together(word, parts)
