"""Every rule in every storage on every runner: the same results, even when another process continues."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import FUSED, LOOP, assert_same_numbers, exact_roots, has_kernel
from processes import python
from rules import ALWAYS, CASES, LOOPS, SWITCHES, Case, assert_same, can_store, each, flat, numbers
from torch import nn

from steprule.engine import storage
from steprule.engine.runners.kernels.cpu import launch as cpu_launch

# Updates that round away in 16 bits do not matter in these tests.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")

# The dtype of the parameters, and how they and their state are kept.
STORAGES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float32, {}),
    "half": (torch.bfloat16, {}),
    "bf16": (torch.float32, {"state_dtype": "bf16"}),
    "fp16": (torch.float32, {"state_dtype": "fp16"}),
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "kahan": (torch.bfloat16, {"low_precision": "kahan", "state_dtype": "fp32"}),
    "master": (torch.bfloat16, {"low_precision": "master"}),
    "stochastic": (torch.bfloat16, {"low_precision": "stochastic", "state_dtype": "bf16"}),
    "all at once": (torch.bfloat16, {"low_precision": "master", "state_dtype": "int8"}),
}
# Blocks and chunks that end early, and a tensor too small for codes.
SHAPES = ((70, 90), (5,), (cpu_launch.CHUNK + 700,))
KEPT = [name for name in STORAGES if name != "plain"]


def can_keep(case: Case, name: str) -> bool:
    """Whether the rule takes this storage."""
    _, options = STORAGES[name]
    if name == "plain":
        return True
    return case.elementwise and not case.sparse_only and can_store(case, options.get("state_dtype", "fp32"))


def make(case: Case, name: str, switches: dict[str, Any] | None = None, shapes: Any = SHAPES) -> Any:
    dtype, options = STORAGES[name]
    options = dict(options, **({} if switches is None else switches))
    if name == "plain":
        return case.make(**options)
    params = [nn.Parameter(numbers(shape, dtype, 100 + i)) for i, shape in enumerate(shapes)]
    return case.make(params, **options)


@pytest.mark.parametrize("name", KEPT)
@each(has_kernel, among=LOOPS)
def test_the_kernel_keeps_what_the_loop_keeps(case: Case, name: str) -> None:
    if not can_keep(case, name):
        pytest.skip("the rule refuses this storage")
    with exact_roots():
        kernel, loop = (make(case, name, switches) for switches in (FUSED, LOOP))
        for optimizer in (kernel, loop):
            case.advance(optimizer, 3)
        assert_same_numbers(kernel, loop)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e-18, 1e15, float("inf"), float("nan")])
@each(lambda case: has_kernel(case) and can_keep(case, "int8"), among=LOOPS)
def test_codes_of_extreme_numbers_are_the_loops(case: Case, size: float) -> None:
    """One block of only this value, and one with a single extreme value."""
    with exact_roots():
        kernel, loop = (make(case, "int8", switches, shapes=((5000,),)) for switches in (FUSED, LOOP))
        for number in range(3):
            for optimizer in (kernel, loop):
                (param,) = flat(optimizer)
                param.grad = numbers((5000,), torch.float32, number)
                param.grad[:256] *= size
                param.grad[700] *= size
                case.step(optimizer)
        (one,), (other,) = flat(kernel), flat(loop)
        keys = [x.key for x in case.rule.slots.values() if storage.holds(loop.state[other], x.key)]
        assert any(f"{key}_codes" in loop.state[other] for key in keys)
        for key in keys:
            # A block with an infinite element is lost; its codes do not matter.
            pair = [storage.load(optimizer.state[p], key) for optimizer, p in ((kernel, one), (loop, other))]
            finite = [x.isfinite() for x in pair]
            assert torch.equal(*finite), key
            assert_same(*(torch.where(finite[0], x, 0.0) for x in pair), key)


@pytest.mark.parametrize("name", ["bf16", "kahan", "master", "stochastic"])
@each(lambda case: has_kernel(case) and not case.options, among=LOOPS)
def test_other_layouts_are_rounded_alike(case: Case, name: str) -> None:
    """Transposed and channels-last parameters: positions are the same for the kernel and for the loop."""
    if not can_keep(case, name):
        pytest.skip("the rule refuses this storage")
    with exact_roots():
        made: list[Any] = []
        for switches in (FUSED, LOOP):
            dtype, options = STORAGES[name]
            transposed = numbers((30, 20), dtype, 1).t()
            last = numbers((2, 4, 3, 3), dtype, 2).contiguous(memory_format=torch.channels_last)
            optimizer = case.make([nn.Parameter(transposed), nn.Parameter(last)], **options, **switches)
            for number in range(3):
                for place, param in enumerate(flat(optimizer)):
                    param.grad = torch.empty_like(param).copy_(numbers(param.shape, dtype, 10 * number + place))
                case.step(optimizer)
            made.append(optimizer)
        assert "reference" not in made[0].explain()
        assert_same_numbers(*made)


@pytest.mark.parametrize("name", [name for name in KEPT if name != "fp16"])
@each(lambda case: case.runner == "lists")
def test_lists_leave_a_storage_that_is_there_to_the_loop(case: Case, name: str) -> None:
    """The group asks for nothing any more, but its state was created when it did."""
    if not can_keep(case, name):
        pytest.skip("the rule refuses this storage")
    wanted = make(case, name, LOOP)
    case.advance(wanted, 2)
    given = make(case, name, LOOP)
    case.advance(given, 2)
    given.param_groups[0].update(foreach=True, state_dtype=None, low_precision=None)
    for optimizer in (given, wanted):
        case.advance(optimizer, 2, first=2)
    assert_same_numbers(given, wanted)


# In a new process


def jobs(runner: str, whole: bool) -> list[tuple[Case, str]]:
    """The rules that this runner steps, in all storages that they take.

    Not whole: those that an ordinary run does not take all cases of, plainly and in one other storage, in turn.
    """
    cases = [case for case in CASES if case.runner == runner]
    # The loop has each rule twice; once with every option on is enough.
    cases = [case for case in cases if case.options or not any(x.options for x in cases if x.rule == case.rule)]
    named = [name for name in STORAGES if listed(runner, name)]
    found: list[tuple[Case, str]] = []
    for turn, case in enumerate(cases):
        kept = [name for name in named if can_keep(case, name)]
        if not whole and case.name not in ALWAYS and len(kept) > 2:
            kept = [kept[0], kept[1 + turn % (len(kept) - 1)]]
        found += [(case, name) for name in kept]
    return found


def listed(runner: str, name: str) -> bool:
    """Lists of tensors leave to the loop what is rounded at random."""
    return runner != "lists" or name in ("plain", "fp16")


def go_on(runner: str, whole: bool, folder: str) -> None:
    """Load every run and take two more steps, with another seed than it began with."""
    torch.manual_seed(999)
    saved = torch.load(Path(folder) / "half", weights_only=True)
    result: list[Any] = []
    for (case, name), (params, state) in zip(jobs(runner, whole), saved, strict=True):
        optimizer = make(case, name)
        for param, value in zip(flat(optimizer), params, strict=True):
            param.data.copy_(value)
        optimizer.load_state_dict(state)
        case.advance(optimizer, 2, first=2)
        result.append(numbers_of(optimizer))
    torch.save(result, Path(folder) / "end")


def numbers_of(optimizer: Any) -> tuple[Any, Any]:
    return [p.detach().clone() for p in flat(optimizer)], optimizer.state_dict()


@pytest.mark.parametrize("runner", SWITCHES)
def test_every_rule_in_every_storage_goes_on_in_a_new_process(
    runner: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    whole: bool = pytestconfig.getoption("whole")
    given = jobs(runner, whole)
    optimizers = [make(case, name) for case, name in given]
    assert len(optimizers) > 20
    for optimizer, (case, _) in zip(optimizers, given, strict=True):
        case.advance(optimizer, 2)
    torch.save([numbers_of(optimizer) for optimizer in optimizers], tmp_path / "half")
    script = f"import test_storage_runners as t; t.go_on({runner!r}, {whole}, {str(tmp_path)!r})"
    python("-W", "ignore", "-c", script, env={"PYTHONPATH": os.pathsep.join(sys.path)})
    resumed = torch.load(tmp_path / "end", weights_only=True)
    for optimizer, (case, name), found in zip(optimizers, given, resumed, strict=True):
        case.advance(optimizer, 2, first=2)
        assert_same(found, numbers_of(optimizer), f"{case} in {name}")
