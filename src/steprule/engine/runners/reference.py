"""The definition of every rule: `update` carried out on tensors, one parameter at a time.

Nothing is traced and nothing is shared between parameters, so this runner is slow, differentiable and easy
to check; every other runner is compared with it. Half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steprule import rule_errors
from steprule.engine import blocks, storage, views
from steprule.engine.blocks import Region
from steprule.engine.composition import Composition, Hyper, Slots, one_step, weights
from steprule.engine.draws import Draws
from steprule.engine.fields import Slot, make_step_counter
from steprule.engine.program import phases, sums
from steprule.engine.runners.eager import Eager, Lined
from steprule.engine.runners.matrices import memory_of
from steprule.engine.sharding import parts
from steprule.engine.sharding.parts import region_in
from steprule.engine.views import View
from steprule.levels import SIDES
from steprule.plain import Double
from steprule.values import Number

# A parameter, its gradient and its state.
Work = tuple[Tensor, Tensor, dict[str, Any]]


class Pending(Exception):
    """A sum over several tensors is asked for that is not known yet."""

    def __init__(self, key: Any, word: str, share: sums.Partial):
        super().__init__(key)
        self.asked = {key: (word, share)}


class Shared:
    """The sums over several tensors that one step of one parameter asks for, in this order.

    keys: which they are. known: those that all parameters have been asked for already.
    """

    def __init__(self, keys: Sequence[Any], known: Mapping[Any, float]):
        self._keys = iter(keys)
        self._known = known

    def of(self, owner: str, word: str, x: Tensor, over: str, region: Region | None) -> Double:
        """The next one. Raises: Pending with the share of this parameter."""
        key = next(self._keys)
        if key not in self._known:
            raise Pending(key, word, sums.partial(word, x, region))
        return Double(self._known[key])


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones; anything else unchanged.

    The result shares the tensor's memory unless that is lazily conjugated.
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def write(tensor: Tensor, value: Tensor) -> None:
    """Write these values into the tensor; complex ones are given as pairs of real ones."""
    if tensor.is_conj():
        tensor.copy_(torch.view_as_complex(value.contiguous()))
    else:
        real(tensor).copy_(value)


def next_step(state: dict[str, Any]) -> Any:
    """The number of the next step, in the count's own precision; None if steps are not counted."""
    if "step" not in state:
        return None
    following = state["step"] + 1
    return following.item() if isinstance(following, Tensor) else float(following)


def count(state: dict[str, Any]) -> None:
    """Count one step."""
    if "step" not in state:
        return
    if not isinstance(state["step"], Tensor):
        state["step"] = make_step_counter().fill_(state["step"])
    state["step"] += 1


def compute_dtype(param: Tensor) -> torch.dtype:
    """The precision that a step of this parameter is computed in."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def as_plain(value: Any, machine: Eager, live: bool) -> Any:
    """A hyper-parameter as `update` sees it: a plain number, or a Number if it must stay on the tape."""
    if isinstance(value, tuple):
        return tuple(as_plain(entry, machine, live) for entry in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, Tensor):
        # A tensor lr keeps its own precision through the scalars, as it does in torch.
        return Number(machine, value.reshape(())) if live else value.detach().reshape(())
    return value


def run(
    composition: Composition,
    group: dict[str, Any],
    param: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    t: Any,
    shared: Shared | None = None,
) -> dict[str, float]:
    """One step of a composition on one parameter, in place: nothing is written before all of it is computed.

    An estimate of the curvature leaves the parameter alone.

    Returns the new values of slots that parameters share, by key.
    Raises: Pending for a sum over several tensors that `shared` does not know.
    """
    slots, common, value = compute(composition, group, param, gradient, state, t, shared)
    store(composition, group, param, state, slots, value)
    return common


def store(
    composition: Composition,
    group: dict[str, Any],
    param: Tensor,
    state: dict[str, Any],
    slots: dict[str, Any],
    value: Tensor,
) -> None:
    """Write what `compute` made of one parameter."""
    live = bool(group.get("differentiable"))
    _store_state(state, slots, live, {slot.key for slot in composition.slots.values()})
    if not composition.estimates:
        _store_parameter(param, state, value, live)
    storage.next_keys(state)


def compute(
    composition: Composition,
    group: dict[str, Any],
    param: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    t: Any,
    shared: Shared | None = None,
) -> tuple[dict[str, Any], dict[str, float], Tensor]:
    """What one step of a composition makes of one parameter.

    The slots that it sets, those that parameters share, both by key, and the parameter.
    """
    live = bool(group.get("differentiable"))
    view = views.of(group, param) if composition.rule.on_matrices else views.AS_IT_IS
    machine = _machine(composition, param, live, shared, view)
    region = region_in(state)
    if region is not None and not parts.is_piece(state):
        machine.shape = region.whole
    machine.region = _region_of_numbers(param, region)
    h, s, slots, common = _begin(machine, composition, group, param, state)
    # A differentiable step keeps old values on the tape, so the parameter must not alias them.
    p = _loaded(machine, param.clone() if live else storage.load_parameter(param, state))
    g = _loaded(machine, gradient.expand(param.shape) if machine.on_matrices else gradient)
    machine.draws = Draws(composition.seeds, state, real(param))
    t = Number(machine, t) if isinstance(t, Tensor) else t
    # What the step began with may be a slot's memory, which is written before the other results are read.
    begun = [x.handle for x in (*s.numbers.values(), *((p, g) if live else ())) if isinstance(x, Number)]
    # Words on matrices may also return a part of that memory, or turn it.
    which = memory_of if machine.on_matrices else id
    given = {which(x.tensor if isinstance(x, Lined) else x) for x in begun}
    new = one_step(composition, h, p, g, s, t)

    def own(value: Any) -> Any:
        value = value.tensor if isinstance(value, Lined) else value
        return value.clone() if isinstance(value, Tensor) and which(value) in given else value

    values: dict[str, Any] = {}
    for letter in sorted(s.written & slots.keys()):
        slot, value = slots[letter], s.numbers[letter]
        value = own(value.handle) if isinstance(value, Number) else value
        if not slot.per_tensor:
            like = real(state[storage.entry_of(state, slot.key)])
            value = _fitted(machine, f"slot '{letter}'", value, like, slot.per)
        values[slot.key] = value
    what = "the new value of the parameter"
    shared_values = {slot.key: float(s.numbers[x]) for x, slot in common.items() if x in s.written}
    return values, shared_values, _fitted(machine, what, own(new.handle), real(param))


def evaluated(composition: Composition, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> Tensor:
    """The weights of one parameter to evaluate with."""
    machine = _machine(composition, param)
    h, s, _, _ = _begin(machine, composition, group, param, state)
    p = _loaded(machine, storage.load_parameter(param, state))
    t = float(state["step"]) if "step" in state else None
    found = weights(composition, h, p, s, t).handle
    return _fitted(machine, "the weights to evaluate with", found, real(param))


def _machine(
    composition: Composition,
    param: Tensor,
    live: bool = False,
    shared: Shared | None = None,
    view: View = views.AS_IT_IS,
) -> Eager:
    rule = composition.rule
    shape = view.shape(param.shape)
    if rule.on_matrices and len(shape) > 3:
        shape = (math.prod(shape[:-2]), *shape[-2:])
    machine = Eager(rule.__name__, compute_dtype(param), live, shared, shape, 1 + param.is_complex())
    machine.view = view
    machine.stacked = rule.matrices == "stacked"
    machine.on_matrices = rule.on_matrices
    machine.as_torch = rule.__name__ if rule.sums_as_torch else None
    return machine


def _region_of_numbers(param: Tensor, region: Region | None) -> Region | None:
    """The part of a whole tensor of real numbers; None for DTensors, which know it themselves."""
    if parts.sharded(param):
        return None
    region = blocks.whole(param.shape) if region is None else region
    if not param.is_complex():
        return region
    return Region((*region.whole, 2), (*region.shape, 2), (*region.first, 0))


def _loaded(machine: Eager, tensor: Tensor, level: str = "element") -> Number:
    if level == "element":
        found = real(tensor).to(machine.dtype)
        return Number(machine, machine.view.matrices(found) if machine.on_matrices else found)
    dtype = machine.dtype if level in SIDES else machine.lined_dtype
    flat = machine.on_matrices and tensor.dim() > 3
    return Number(machine, Lined((tensor.flatten(0, -3) if flat else tensor).to(dtype), level))


def _begin(
    machine: Eager, composition: Composition, group: dict[str, Any], param: Tensor, state: dict[str, Any]
) -> tuple[Hyper, Slots, dict[str, Slot], dict[str, Slot]]:
    """`h` and `s`, and by letter the slots that the parameter has and those that it shares."""
    fields, live = composition.fields, machine.live
    plain = {k: as_plain(group[k], machine, live) for k, f in fields.items() if k in group and not f.free}
    h = Hyper(machine.rule, composition.rule.fields, plain)
    slots: dict[str, Slot] = {k: v for k, v in composition.slots.items() if storage.holds(state, v.key)}
    common = {letter: slot for letter, slot in composition.slots.items() if slot.shared and slot.exists(group)}
    numbers: dict[str, Any] = {letter: float(group[slot.key]) for letter, slot in common.items()}
    for letter, slot in slots.items():
        once = slot.per_tensor and not live
        level = slot.per if slot.has_elements else "element"
        value = state[slot.key].item() if once else _loaded(machine, storage.load(state, slot.key), level)
        numbers[letter] = value
    return h, Slots(machine, composition.slots, numbers, tuple(param.shape)), slots, common


def in_turns(work: Sequence[Work], one: Callable[[Work, Mapping[Any, float]], None]) -> phases.Going:
    """Steps of parameters that share sums: each is tried until it asks for a sum that is not known yet.

    one: steps one parameter with the sums that are known.
    """
    known: dict[Any, float] = {}
    left = list(work)
    while left:
        asked: dict[Any, tuple[str, list[sums.Partial]]] = {}
        waiting: list[Work] = []
        for entry in left:
            try:
                one(entry, known)
            except Pending as pending:
                waiting.append(entry)
                for key, (word, share) in pending.asked.items():
                    asked.setdefault(key, (word, []))[1].append(share)
        left = waiting
        if left:
            known |= yield {key: (word, sums.together(word, parts)) for key, (word, parts) in asked.items()}


def _fitted(machine: Eager, what: str, value: Any, like: Tensor, level: str = "element") -> Tensor:
    """A result in the shape that it is stored in."""
    if not isinstance(value, Tensor):
        return torch.full_like(like, value, dtype=machine.dtype)
    value = machine.counted(value)
    view = machine.view if level == "element" and machine.on_matrices else views.AS_IT_IS
    shape = view.shape(like.shape)
    if machine.on_matrices and len(shape) > 3:
        shape = (math.prod(shape[:-2]), *shape[-2:])
    try:
        return view.back(value if value.shape == shape else value.expand(shape), like.shape)
    except RuntimeError:
        raise rule_errors.wrong_shape(machine.rule, what, tuple(value.shape), tuple(like.shape)) from None


def put(cell: Tensor, number: float) -> None:
    """Write a number, which is infinite if it is out of range: `fill_` would raise."""
    cell.copy_(torch.tensor(number, dtype=torch.float64, device=cell.device))


def _store_parameter(param: Tensor, state: dict[str, Any], value: Tensor, live: bool) -> None:
    if param.dtype in storage.HALF and not live:
        storage.store_parameter(param, state, value)
    else:
        write(param, value)


def _store_state(state: dict[str, Any], values: dict[str, Any], live: bool, among: Collection[str]) -> None:
    for key, value in values.items():
        entry = storage.entry_of(state, key)
        if not isinstance(value, Tensor):
            put(state[key], value)
        elif live and entry == key and not state[key].is_complex():
            state[key] = value.to(state[key].dtype)
        elif state[entry].is_complex():
            write(state[entry], value)
        else:
            storage.store(state, key, value, among)
