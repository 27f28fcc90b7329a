"""The runner that is always there: the reference, one parameter after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine.composition import Composition
from steprule.engine.program import phases
from steprule.engine.program.phases import Part
from steprule.engine.program.program import Program
from steprule.engine.program.trace import static_key
from steprule.engine.runners import foreach, reference, sparse
from steprule.engine.runners.reference import Work
from steprule.engine.runners.runner import Prepared, Runner

_own_noise = cast(Any, torch.random).fork_rng


class Reference(Runner):
    """The reference, which can run every rule."""

    name = "reference"
    switch = ""

    def why_not(self, own: Composition, group: dict[str, Any]) -> str | None:
        """None: there is nothing that it cannot run."""

    def prepare(
        self, optimizer: Any, group: dict[str, Any], program: Program | None, after: dict[str, float]
    ) -> Prepared:
        """Leave everything to `prepare_some`, which also steps what another runner has left."""
        return [], group["params"]


def prepare_some(
    optimizer: Any, params: Sequence[Tensor], group: dict[str, Any], after: dict[str, float]
) -> Part:
    """Prepare a step of these parameters of the group, so that nothing in it raises any more."""
    work, own = optimizer.checked(params, group), optimizer.composition(group)
    if own.traced:
        program = optimizer.program(group)
        foreach.check_scalars(program, group, work)
        keys = [[phases.key_in(group, x) for x in program.calls]] * len(work)
    else:
        keys = _rehearse(optimizer, work, group)
    asked = {id(param): own_keys for (param, _, _), own_keys in zip(work, keys, strict=True)}

    def one(entry: Work, known: Mapping[Any, float]) -> None:
        param, gradient, state = entry
        if gradient.is_sparse:
            sparse.run(own, group, param, gradient, state)
            return
        shared, t = reference.Shared(asked[id(param)], known), reference.next_step(state)
        after.update(reference.run(own, group, param, gradient, state, t, shared))
        if not own.estimates:
            reference.count(state)

    def start() -> phases.Going | None:
        if any(keys):
            return reference.in_turns(work, one)
        for entry in work:
            one(entry, {})
        return None

    return Part(start, _stages(keys))


def _stages(keys: Sequence[Sequence[Any]]) -> phases.Stages:
    """What is asked for together if every parameter asks for one sum after the other."""
    stages: list[frozenset[Any]] = []
    known: set[Any] = set()
    orders = set(map(tuple, keys))
    while asked := {next((key for key in own if key not in known), None) for own in orders} - {None}:
        stages.append(frozenset(asked))
        known |= asked
    return tuple(stages)


def _rehearse(optimizer: Any, work: list[Work], group: dict[str, Any]) -> list[list[Any]]:
    """Compute a step for every new kind of parameter, so that errors of the rule are raised now.

    Returns the keys of the sums over several tensors that each parameter asks for.
    """
    own = optimizer.composition(group)
    known: dict[Any, list[Any]] = optimizer.rehearsed
    types: list[Any] = [type(cast(object, group.get(name))) for name in own.fields]
    options = (id(group), own, static_key(own.fields, group), *types)
    keys: list[list[Any]] = []
    for param, gradient, state in work:
        tensors = [x for x in (param, gradient, *state.values()) if isinstance(x, Tensor)]
        kind = (options, param.shape, *((x.dtype, x.device) for x in tensors))
        if kind not in known:
            with _own_noise([param.device] if param.is_cuda else []):
                t, asking = reference.next_step(state), reference.Asking(group)
                reference.compute(own, group, param, gradient, state, t, asking)
            known = optimizer.rehearsed = {**known, kind: asking.keys}
        keys.append(known[kind])
    return keys
