"""One fused kernel for all parameters of a group: what is kept between steps.

A plan holds which places of a group step together, the addresses and forms of their tensors, and how the
work is cut up. At every step it is compared with what the group holds now: its options, which
parameters have gradients, and the addresses and forms of parameters, gradients and state. If anything
differs (a loaded state, a swapped parameter, a moved device), a new plan is made. A plan keeps no parameter,
gradient or slot alive, goes into no checkpoint, and is not copied with its optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine import plans
from steprule.engine.fields import Field
from steprule.engine.program import decisions, phases
from steprule.engine.program.phases import Part
from steprule.engine.program.program import Program
from steprule.engine.program.sums import Partial
from steprule.engine.runners import matrices, sharing
from steprule.engine.runners.kernels import fits
from steprule.engine.runners.kernels.batch import Batch, beside, counts_there
from steprule.engine.runners.kernels.cache import NoKernel
from steprule.engine.runners.kernels.counters import keys_of
from steprule.engine.runners.kernels.runner import Kernels
from steprule.engine.runners.reference import next_step
from steprule.engine.runners.runner import Prepared
from steprule.engine.runners.stacks import BeforeSweep, Member, Stack, Sweeps
from steprule.engine.sharding.parts import is_piece, region_in

# Options of a group that no program knows and no state shows, yet a plan depends on.
OPTIONS = ("state_dtype", "low_precision", "capturable", "fused", "views")


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
    own = optimizer.plans_now()
    # Kept alive until the kernel has read them, whatever other threads do.
    gradients: list[Tensor | None] = optimizer.gradients_of(group["params"])
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
    if all(
        len(own.scalars) == len(own.passes) == 1 and not (own.columns or own.stages) for own in program.kinds
    ):

        def run() -> None:
            for batch, written in zip(batches, found, strict=True):
                scaling = batch.step(written, *scaler)
                if shared and not (scaling and scaling[0][1]):
                    after.update(batch.counters.shared())
            gradients.clear()

        return [Part(run)], left
    parts: list[Part] = []
    for batch, written in zip(batches, found, strict=True):
        states = [optimizer.state[group["params"][place]] for place in batch.places] if batch.work else []
        member = Member(
            partial(_sweeps, batch, written, scaler, group, gradients, states, after),
            partial(_names, optimizer, group, batch.places),
        )
        split = batch.split_places(group)
        stages = phases.stages_of(batch.program, group, split)
        alike = None if batch.alike is None else (*batch.alike, stages)
        stack = Stack(optimizer.who(group), alike, batch.size, batch.most, (member,))
        parts.append(stack.part(stages, phases.waits_to_store(batch.program, bool(split))))
    return parts, left


def _names(optimizer: Any, group: dict[str, Any], places: Sequence[int]) -> list[str]:
    names = optimizer.names_in(group)
    return [names[place] for place in places]


def _sweeps(
    batch: Batch,
    written: Iterable[Tensor],
    scaler: list[Tensor | None],
    group: dict[str, Any],
    gradients: list[Tensor | None],
    states: list[dict[str, Any]],
    after: dict[str, float],
) -> Sweeps:
    """A step of a batch whose scalars depend on sums, or with words on whole matrices: sweep by sweep.

    gradients: held until the step is over, since other batches of the group may still read theirs. states: of
    the batch, if it works on whole matrices.
    """
    program, places = batch.program, batch.split_places(group)
    scaling, storing = batch.scaling(scaler), batch.first_stored
    reduced: dict[int, Any] = {}
    lengths = map(len, (program.passes, program.scalars, program.columns, program.stages))
    for number in range(max(lengths)):
        if 0 < number < len(program.scalars):
            batch.counters.add(number, reduced)
        if batch.work is not None:
            given = [cast(Tensor, gradients[place]) for place in batch.places]
            yield BeforeSweep(number, batch, group, given, states)
            if number == len(program.passes) - 1 and phases.waits_to_store(program, bool(places)):
                yield phases.NOTHING_RAISES
        asked: dict[Any, tuple[str, Partial]] = {}
        if number == storing:  # not before: until then the step may be given up
            batch.note(written)
        found = batch.run(number, scaling)
        for reduction, shares in found:
            word = reduction.word
            if reduction.shared:
                asked[phases.key_in(group, reduction)] = word, batch.launch.together(word, shares)
            elif places:
                own = zip(
                    phases.keys_of(group, reduction, places), batch.launch.partials(word, shares), strict=True
                )
                asked |= {key: (word, share) for key, share in own}
            else:
                reduced[reduction.index] = batch.launch.finished(reduction, shares)
        if asked:
            known = yield asked
            assert known is not None
            for x, _ in found:
                if x.shared:
                    reduced[x.index] = known[phases.key_in(group, x)]
                elif places:
                    reduced[x.index] = batch.launch.column([known[y] for y in phases.keys_of(group, x, places)])
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
        self._decides = any(own.decision is not None for own in (program, program.of_vectors) if own)
        self._for_now: list[int] = []
        together: dict[Any, list[int]] = {}
        shared = sharing.memory(params)
        work: dict[Any, matrices.Shares] = {}
        optimizer.check_storage(group)
        # All gradients first: a state that was made for some would outlive the error about another.
        for place in self.present:
            optimizer.check_gradient(params[place], gradients[place], group)
        states = {place: optimizer.state_of(params[place], group) for place in self.present}
        self._chosen = {x: self._choose(group, params[x], states[x]) for x in self.present}
        twice = sharing.state(states)
        for place, state in states.items():
            own = self._chosen[place]
            reason, kind = self._fit(own, params[place], gradients[place], state, group)
            if reason is not None:
                self._for_now.append(place)
            elif place in shared:
                reason = "it shares memory with another parameter"
            elif place in twice:
                reason = "it shares a tensor of its state with another parameter"
            if reason is not None:
                self.refused.append((place, reason))
            else:
                param = params[place]
                shares = work.setdefault(kind, matrices.Shares(matrices.most_at_once(param.device)))
                together.setdefault((kind, shares.share_of(own, param, state)), []).append(place)
        self._run = _run_of(optimizer.state, [params[place] for place in self.present])
        self.batches: list[Batch] = []
        for places in together.values():
            states = [optimizer.state[params[place]] for place in places]
            try:
                own = self._chosen[places[0]]
                self.batches.append(Batch(own, places, group, gradients, states, kernels))
            except NoKernel as missing:
                self.refused += [(place, str(missing)) for place in places]
        self._rows = self._rows_of()

    def _fit(
        self, program: Program, param: Tensor, gradient: Any, state: dict[str, Any], group: dict[str, Any]
    ) -> tuple[str | None, Any]:
        """Why the kernel cannot take a parameter, or None; and what those have in common that step together."""
        slots, keys = fits.slots_of(program, state), keys_of(program, state)
        reason = fits.why_not(program, param, gradient, state)
        if reason is not None:
            return reason, None
        where = param.device if counts_there(program, group) else torch.device("cpu")
        for key in keys:
            if state[key].device != where:
                state[key] = state[key].to(where)
        dtypes = (x.dtype for x in (param, gradient, *slots.values(), *(state[key] for key in keys)))
        return None, (
            id(program),
            param.device,
            tuple(beside(program, state)),
            tuple(keys),
            region_in(state) is None,
            is_piece(state),
            *dtypes,
        )

    def _choose(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> Program:
        """The program of a parameter's next step."""
        return decisions.chosen(self.program, group, param, state, next_step(state))

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
        given = gradients
        if program is not self.program or _options(group) != self.options:
            return None
        if list(map(is_, gradients, repeat(None))) != self.absent:
            return None
        if len(self.present) < len(params):
            params = [params[place] for place in self.present]
            gradients = [gradients[place] for place in self.present]
        states = self._states(state, params)
        if states is not None and self._decides and not self._still_chosen(group, params, states):
            return None
        if states is None or any(
            self._acceptable(group, group["params"][i], given[i], state.get(group["params"][i], {}))
            for i in self._for_now
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

    def _still_chosen(self, group: dict[str, Any], params: Sequence[Tensor], states: Sequence[Any]) -> bool:
        """Whether the next step of each parameter has the program of this plan."""
        try:
            pairs = zip(params, states, self._chosen.values(), strict=True)
            return all(self._choose(group, param, own) is chosen for param, own, chosen in pairs)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # when a new plan is made, the state is checked

    def _states(self, state: Mapping[Tensor, Any], params: Sequence[Tensor]) -> list[Any] | None:
        """The states of these parameters, if each has one."""
        if self._run is not None:
            keys = list(state)[self._run]
            if len(keys) == len(params) and all(map(is_, keys, params)):
                return list(state.values())[self._run]
        states = list(map(state.get, params))
        return None if any(x is None for x in states) else states

    def _acceptable(
        self, group: dict[str, Any], param: Any, gradient: Tensor | None, state: dict[str, Any]
    ) -> bool:
        """Whether what was refused before could be taken now."""
        try:
            program = self._choose(group, param, state)
            return fits.why_not(program, param, _resolved(gradient), state) is None  # type: ignore[arg-type]
        except (AttributeError, KeyError):
            return True


def _options(group: dict[str, Any]) -> list[Any]:
    """A copy of what a plan depends on, as a dict of dtypes may be changed in place."""
    given = [group.get(name) for name in OPTIONS]
    return [dict(cast(dict[str, str], x)) if isinstance(x, dict) else x for x in given]


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
