"""A run that is saved and goes on with another number of processes ends as one that never stopped, to the bit.

Each stage loads with torch.distributed.checkpoint what the one before has saved, takes a step, and saves: one
process, two, four, one. An ordinary run takes some rules, each in a storage and with modifiers; `--whole` takes
every rule in every storage, and every modifier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from layouts import in_processes, layouts
from rules import Case, numbers
from test_lbfgs_sharded import closure_of
from test_sharded import SHARDED, assert_equal
from test_storage_runners import STORAGES, can_keep
from torch import Tensor, nn

import steprule

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)
# How many processes each stage has.
STAGES = (1, 2, 4, 1)
# Long enough for 8 bits; parts of unequal size, and parts that are empty.
ELEMENTS = ((130, 256), (7, 3), (9,), (1, 5), ())
MATRICES = ((24, 40), (7, 3), (1, 5))
MODIFIERS = {x.__name__: x for x in steprule.modifier_catalogue().values()}
OPTIONS = {"SGD": {"momentum": 0.9}, "Kron": {"fit_start": 0, "fit_decay": 0.5}}
# By default these act after more steps than are taken here.
OFTEN: dict[str, Any] = {"Lookahead": {"every": 2}, "OuterNesterov": {"every": 2}}
SOME = [
    ("AdamW", "int8", ("GlobalNormClip", "EMA")),
    ("AdamW", "master", ()),
    ("AdamW", "kahan", ("Cautious",)),
    ("AdamW", "stochastic", ()),
    ("AdamW", "all at once", ("Lookahead",)),
    ("SGD", "half", ("ScheduleFree",)),
    ("Lion", "bf16", ("Noise",)),
    ("LAMB", "plain", ("GlobalNormClip",)),
    ("Adafactor", "plain", ()),
    ("Prodigy", "plain", ("GlobalNormClip",)),
    ("DoG", "plain", ()),
    ("ScheduleFreeAdamW", "plain", ()),
    ("Muon", "plain", ("GlobalNormClip",)),
    ("SOAP", "plain", ()),
    ("Kron", "plain", ()),
    ("LBFGS", "plain", ()),
]


class Run(NamedTuple):
    """A rule, how its numbers are kept, and modifiers."""

    case: Case
    storage: str
    modifiers: tuple[str, ...] = ()

    def start(self, put: Any) -> tuple[nn.Module, Any]:
        dtype, options = STORAGES[self.storage]
        shapes = ELEMENTS if self.case.elementwise else self.case.shapes
        shapes = shapes if self.case.any_shape else MATRICES
        model = nn.ParameterList(put(x.detach()) for x in self.case.parameters(dtype, shapes))
        if self.modifiers:
            options = options | {"modifiers": [MODIFIERS[x](**OFTEN.get(x, {})) for x in self.modifiers]}
        optimizer = self.case.make(model.named_parameters(), **options)
        optimizer.init_state()
        return model, optimizer

    def step(self, model: nn.Module, optimizer: Any, number: int, put: Any) -> None:
        if self.case.closure:
            optimizer.step(closure_of(optimizer, put))
            return
        for place, p in enumerate(model.parameters()):
            p.grad = put(numbers(tuple(p.shape), p.dtype, 10 * number + place))
        if any(hasattr(MODIFIERS[name], "climb") for name in self.modifiers):
            optimizer.climb()
        self.case.step(optimizer)

    def __str__(self) -> str:
        return " ".join((str(self.case), self.storage, *self.modifiers))


def runs(all_of_them: bool) -> Iterator[Run]:
    rules = steprule.catalogue()
    for rule, storage, modifiers in SOME:
        yield Run(Case(rules[rule], OPTIONS.get(rule, {}), "default"), storage, modifiers)
    if all_of_them:
        for case in SHARDED:
            own = replace(case, runner="default")
            yield from (Run(own, name) for name in STORAGES if can_keep(case, name))
        momentum = Case(rules["SGD"], OPTIONS["SGD"], "default")
        yield from (Run(momentum, "plain", (name,)) for name in MODIFIERS)


def as_it_is(x: Tensor) -> Tensor:
    """Not sharded."""
    return x


def put_of(number: int, run: Run, sharded: bool) -> Any:
    """Another layout for each run; blocks of 8 bits are not cut."""
    # LBFGS is a different one on parameters that are not sharded.
    if not sharded and not run.case.closure:
        return as_it_is
    found = dict(layouts())
    if len(found) > 3 and "int8" in STORAGES[run.storage][1].values():
        found = {name: found[name] for name in ("rows", "hsdp", "strided")}
    return list(found.values())[number % len(found)]


def states(begun: Sequence[tuple[nn.Module, Any]]) -> dict[str, Any]:
    """What is saved of all runs together: to save each on its own takes longer than its steps."""
    from torch.distributed.checkpoint import state_dict as torchs

    return {
        str(number): {
            "model": torchs.get_model_state_dict(model),
            "optimizer": torchs.get_optimizer_state_dict(model, optimizer),
        }
        for number, (model, optimizer) in enumerate(begun)
    }


def stage(rank: int, place: int, folder: str, all_of_them: bool) -> None:
    """Go on from the stage before, one step, and save; at the end, compare."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as torchs

    chosen = list(runs(all_of_them))
    puts = [put_of(number, run, place > 0) for number, run in enumerate(chosen)]
    begun = [run.start(put) for run, put in zip(chosen, puts, strict=True)]
    if place:
        saved = states(begun)
        checkpoint.load(saved, checkpoint_id=f"{folder}/{place - 1}")
        for (model, optimizer), own in zip(begun, saved.values(), strict=True):
            torchs.set_model_state_dict(model, own["model"])
            torchs.set_optimizer_state_dict(model, optimizer, own["optimizer"])
    for run, put, (model, optimizer) in zip(chosen, puts, begun, strict=True):
        run.step(model, optimizer, place, put)
    checkpoint.save(states(begun), checkpoint_id=f"{folder}/{place}")
    if place == len(STAGES) - 1:
        for number, (run, (_, optimizer)) in enumerate(zip(chosen, begun, strict=True)):
            put = put_of(number, run, sharded=False)
            model, straight = run.start(put)
            for step in range(len(STAGES)):
                run.step(model, straight, step, put)
            assert_equal(straight, optimizer, str(run))


def test_one_two_four_and_one_process(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for place, count in enumerate(STAGES):
        own = tmp_path / f"store of {place}"
        own.mkdir()
        whole = bool(request.config.getoption("whole"))
        in_processes(count, "stage", own, "test_reshards", place, str(tmp_path), whole)
