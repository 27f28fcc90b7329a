"""The runner that is always there: the reference, one parameter after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from steprule import matrix_errors
from steprule.engine.composition import Composition
from steprule.engine.program import phases
from steprule.engine.program.phases import Part
from steprule.engine.program.program import Program
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
    program = optimizer.program(group)
    # Nothing is stored before all words on whole matrices that may raise are over.
    may_raise = any(x.may_raise for x in program.kinds)
    foreach.check_scalars(program, group, work)
    keys = [phases.key_in(group, x) for x in program.calls] if work else []

    later: list[Callable[[], None]] = []

    def one(entry: Work, known: Mapping[Any, float]) -> None:
        param, gradient, state = entry
        if gradient.is_sparse:
            sparse.run(own, group, param, gradient, state)
            return
        shared, t = reference.Shared(keys, known), reference.next_step(state)
        try:
            slots, common, value = reference.compute(own, group, param, gradient, state, t, shared)
        except matrix_errors.WordFailed as failed:
            name = optimizer.name_of(param)
            raise matrix_errors.word_failed(optimizer.who(group), failed, [name]) from None

        def store() -> None:
            reference.store(own, group, param, state, slots, value)
            after.update(common)
            if not own.estimates:
                reference.count(state)

        if may_raise:
            later.append(store)
        else:
            store()

    def start() -> phases.Going | None:
        if keys:
            return reference.in_turns(work, one)
        for entry in work:
            one(entry, {})
        return None

    def on_whole_matrices() -> phases.Going:
        yield from reference.in_turns(work, one)
        yield phases.NOTHING_RAISES
        for store in later:
            store()

    stages: phases.Stages = tuple(frozenset({key}) for key in dict.fromkeys(keys))
    if may_raise:
        return Part(on_whole_matrices, (*stages, frozenset({phases.BEFORE_STORING})), may_raise=True)
    return Part(start, stages)
