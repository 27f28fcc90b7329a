"""One fused kernel for all parameters of a group: what is remembered between steps, and what may not be.

A plan remembers which tensors step together and how their work is cut up. At every step it is held against
what the group holds now: the parameters, which of them have gradients, the slots, and where all of them lie
in memory. If anything differs (a loaded state, a swapped parameter, a moved device), the plan is made anew.
It keeps no gradient alive, goes into no checkpoint, and is not copied with its optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine import cpu_kernel, cpu_launch, plans, runners, storage
from steprule.engine.counters import KINDS, Counters, keys_of
from steprule.engine.fields import Field
from steprule.engine.kernel_cache import NoKernel
from steprule.engine.program import Program

_OWN_DISPATCH = cast(Any, Tensor).__torch_dispatch__
PLAIN = {Tensor, torch.nn.Parameter}

_address: Callable[[Tensor], int] = Tensor.data_ptr
_contiguous: Callable[[Tensor], bool] = Tensor.is_contiguous
_numel: Callable[[Tensor], int] = Tensor.numel


def step(optimizer: Any, group: dict[str, Any]) -> list[Tensor]:
    """One step of every parameter of the group that the kernel can take.

    Returns the others that have gradients, untouched: they are for the reference runner.
    """
    program: Program = optimizer.program(group)
    values = _hyperparameters(optimizer, group)
    own = plans.of(optimizer)
    with own.lock:
        # Keeps the gradients alive while the kernel reads them, whatever other threads do.
        gradients: list[Tensor | None] = [param.grad for param in group["params"]]
        plan: Plan | None = own.of(group)
        if plan is None or not plan.holds(optimizer.state, program, gradients):
            plan = Plan(optimizer, group, program, gradients)
            own.keep(plan, optimizer.param_groups)
        # Set by a gradient scaler for the length of a step.
        scaler = [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]
        for batch in plan.batches:
            batch.step(values, *(scaler if scaler != [None, None] else ()))
        return plan.others


def _hyperparameters(optimizer: Any, group: dict[str, Any]) -> dict[str, Any]:
    """The group's options as a program's scalars take them: a tensor stays one, without its tape."""
    fields: dict[str, Field] = cast(Any, type(optimizer)).fields
    return {name: _detached(group[name]) for name in fields if name in group}


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().reshape(())
    return tuple(map(_detached, cast(tuple[Any, ...], value))) if isinstance(value, tuple) else value


def reasons(optimizer: Any, group: dict[str, Any]) -> dict[str, str]:
    """Of the last step: why which parameters were left to the reference runner, by name."""
    plan: Plan | None = plans.of(optimizer).of(group)
    return {} if plan is None else {optimizer.name_of(p): why for p, why in plan.refused}


def explain(optimizer: Any, group: dict[str, Any]) -> list[str]:
    """Of the last step: where the kernels can be read, and who was left to the reference runner and why."""
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
        if tensor.device != param.device:
            return f"{name} is on {tensor.device}"
        if tensor.shape != param.shape:
            return f"{name} has another shape than the parameter"
        contiguous = tensor.is_contiguous() and param.is_contiguous()
        if not contiguous and tensor.stride() != param.stride():
            return f"{name} lies in memory in another order than the parameter"
        if tensor.numel() and not tensor.data_ptr():
            return f"{name} has no memory of its own"
    if any(x.dtype in cpu_kernel.CODED for x in slots.values()) and not param.is_contiguous():
        return "the neighbours that share a scale are not neighbours in memory"
    if not _dense(param):
        return "the parameter's entries have gaps between them in memory"
    return cpu_kernel.why_not({name: tensor.dtype for name, tensor in tensors.items()})


def _no_count(program: Program, state: Mapping[str, Any]) -> str | None:
    """Why what is kept once per tensor cannot lie in a table, or None."""
    for key in keys_of(program, state):
        count = state[key]
        if not isinstance(count, Tensor) or count.numel() != 1 or count.dtype not in KINDS:
            return f"its state '{key}' is no single float32 or float64"
    return None


def _odd_storage(param: Tensor, state: Mapping[str, Any]) -> str | None:
    """Why what is kept beside the numbers cannot be used as it lies, or None."""
    for key, value in state.items():
        if key in ("compensation", "low_bits") and value.stride() != param.stride():
            return f"its state '{key}' lies in memory in another order than the parameter"
        if key.endswith("_scale") and not value.is_contiguous():
            return f"its state '{key}' does not lie in one piece"
    return None


def _wrapped(tensor: Tensor) -> bool:
    """Whether the tensor's operations are not torch's own, as a DTensor's are."""
    kind: Any = type(tensor)
    return kind.__torch_dispatch__ is not _OWN_DISPATCH


def _dense(tensor: Tensor) -> bool:
    """Whether the entries fill one block of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


class Plan:
    """Which parameters of a group step together, and which the kernel leaves to the reference runner."""

    def __init__(
        self,
        optimizer: Any,
        group: dict[str, Any],
        program: Program,
        gradients: Sequence[Tensor | None],
    ):
        self.group = group
        self.program = program
        self.params: list[Tensor] = list(group["params"])
        self.absent = [gradient is None for gradient in gradients]
        self.refused: list[tuple[Tensor, str]] = []
        self._for_now: list[Tensor] = []
        together: dict[Any, list[int]] = {}
        shared = _sharing_memory(self.params)
        for place, (param, gradient) in enumerate(zip(self.params, gradients, strict=True)):
            if gradient is None:
                continue
            optimizer.check_gradient(param, gradient, group)
            state = optimizer.state_of(param, group)
            slots = self._slots(state)
            reason = why_not(param, gradient, slots) or _no_count(program, state)
            reason = reason or _odd_storage(param, state)
            if reason is not None:
                self._for_now.append(param)
            elif place in shared:
                reason = "it shares memory with another parameter"
            if reason is not None:
                self.refused.append((param, reason))
                continue
            counts = [state[key] for key in keys_of(program, state)]
            beside = tuple(_beside(program, state))
            kinds = (param.device, beside, *(x.dtype for x in (param, gradient, *slots.values(), *counts)))
            together.setdefault(kinds, []).append(place)
        self.states = [optimizer.state.get(param) for param in self.params]
        self._run = _run_of(list(optimizer.state.values()), self.states)
        self.batches: list[Batch] = []
        for places in together.values():
            try:
                self.batches.append(Batch(program, places, group, gradients, self.states))
            except NoKernel as missing:
                self.refused += [(self.params[place], str(missing)) for place in places]
        self.others = [param for param, _ in self.refused]

    def holds(self, state: Mapping[Tensor, Any], program: Program, gradients: Sequence[Tensor | None]) -> bool:
        """Whether all is as it was when the plan was made. Notes down where the gradients are."""
        params: list[Tensor] = self.group["params"]
        return (
            program is self.program
            and len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and self._same_states(state)
            and [gradient is None for gradient in gradients] == self.absent
            and all(batch.holds(gradients) for batch in self.batches)
            and not any(self._acceptable(param, state[param]) for param in self._for_now)
        )

    def _same_states(self, state: Mapping[Tensor, Any]) -> bool:
        if self._run is None:
            return all(map(is_, map(state.get, self.params), self.states))
        now = list(state.values())[self._run]
        return len(now) == len(self.states) and all(map(is_, now, self.states))

    def _acceptable(self, param: Any, state: dict[str, Any]) -> bool:
        """Whether what once was refused could be taken now."""
        try:
            reason = why_not(param, param.grad, self._slots(state)) or _no_count(self.program, state)
            return reason is None
        except KeyError:
            return True

    def _slots(self, state: dict[str, Any]) -> dict[str, Tensor]:
        keys = [storage.entry_of(state, slot.key) for slot in self.program.slots.values()]
        return {key: state[key] for key in keys}


def _run_of(everything: Sequence[Any], part: Sequence[Any]) -> slice | None:
    """Where the part stands in one piece, in order, as it mostly does: a look-up by parameter costs more."""
    for start, entry in enumerate(everything):
        if part and entry is part[0]:
            found = slice(start, start + len(part))
            return found if all(map(is_, everything[found], part)) else None
    return None


def _beside(program: Program, state: Mapping[str, Any]) -> dict[str, str]:
    """What `storage` keeps beside the numbers: its name in the kernel, and its key in the state."""
    scales = {f"{letter}_scale": f"{slot.key}_scale" for letter, slot in program.slots.items()}
    found = {name: key for name, key in scales.items() if key in state}
    return found | {key: key for key in storage.EXTRA_KEYS if key in state}


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
        states: Sequence[Any],
    ):
        self.program = program
        self.places = places
        self.states: list[dict[str, Any]] = [states[i] for i in places]
        self.params: list[Tensor] = [group["params"][i] for i in places]
        slots = program.slots.items()
        self.keys = {letter: storage.entry_of(self.states[0], slot.key) for letter, slot in slots}
        self.keys |= _beside(program, self.states[0])
        self.rounding = storage.Keys(self.states, self.params[0].device)
        self.columns = {"p": self.params}
        self.columns |= {x: [state[key] for state in self.states] for x, key in self.keys.items()}
        dtypes = {letter: column[0].dtype for letter, column in self.columns.items()}
        self.dtype = gradients[places[0]].dtype  # type: ignore[union-attr]
        self.lengths = list(map(_numel, self.params))
        self.contiguous = list(map(_contiguous, self.params))
        self.strides = {i: x.stride() for i, x in enumerate(self.params) if not self.contiguous[i]}
        self.launch: Any
        self.counters: Any
        self.launch, self.counters = self._on_device(program, dtypes | {"g": self.dtype}, group)
        self.may_skip = not isinstance(self.counters, Counters)
        self.addresses = {x: list(map(_address, column)) for x, column in self.columns.items()}
        for letter, addresses in self.addresses.items():
            self.launch.place(letter, addresses)
        kept = {"g", *program.inputs} - program.outputs.keys()
        self.written = [x for name, column in self.columns.items() if name not in kept for x in column]
        if not self._take(gradients):
            raise AssertionError("a new plan must fit the gradients it was made for")

    def _on_device(self, program: Program, dtypes: Mapping[str, torch.dtype], group: dict[str, Any]) -> Any:
        """The launch on the device of these tensors, and where their counts are kept."""
        device = self.params[0].device
        if runners.kernel_for(device) == "cpu_kernel":
            return cpu_launch.Launch(program, dtypes, self.lengths), Counters(program, self.states)
        from steprule.engine import gpu_counters, gpu_launch

        launch = gpu_launch.Launch(program, dtypes, self.lengths, device)
        if not runners.counts_on_device(group):
            return launch, Counters(program, self.states)
        return launch, gpu_counters.DeviceCounters(program, self.states, device, launch.dtype)

    def holds(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether slots, memory and the gradients' form are as they were."""
        try:
            for letter, key in self.keys.items():
                if not all(map(is_, map(itemgetter(key), self.states), self.columns[letter])):
                    return False
            if not self.counters.hold(self.states):
                return False
        except KeyError:
            return False
        for letter, column in self.columns.items():
            if list(map(_address, column)) != self.addresses[letter]:
                return False
        return self._take(gradients)

    def _take(self, gradients: Sequence[Tensor | None]) -> bool:
        """Note down where the gradients are, if all have the form that the kernel expects."""
        whole = len(self.places) == len(gradients)
        own: Sequence[Any] = gradients if whole else [gradients[i] for i in self.places]
        if not PLAIN.issuperset(map(type, own)) and any(map(_wrapped, own)):
            return False
        try:
            addresses = list(map(_address, own))
            same = list(map(_contiguous, own)) == self.contiguous
        except RuntimeError:  # a sparse tensor has neither
            return False
        if not (same and list(map(_numel, own)) == self.lengths):
            return False
        if {gradient.dtype for gradient in own} != {self.dtype}:
            return False
        if 0 in addresses and any(n and not a for n, a in zip(self.lengths, addresses, strict=True)):
            return False
        if any(own[i].stride() != stride for i, stride in self.strides.items()):
            return False
        self.launch.place("g", addresses)
        return True

    def step(self, values: Mapping[str, Any], *scaler: Tensor | None) -> None:
        """Run the kernel, with these hyper-parameters and with what a gradient scaler says."""
        torch.autograd.graph.increment_version(self.written)
        scaling = (self.counters.scaling(*scaler),) if scaler and self.may_skip else ()
        scalars = self.counters.advance(values, *scaling)
        self.launch.run(scalars, self.counters.row_of, *scaling)
        self.rounding.advance(*scaling)
