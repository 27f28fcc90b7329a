"""Every rule with every modifier in every storage and every runner: it runs, or it is refused with the reason.

There are some ten thousand combinations, each with a kernel of its own. An ordinary run takes one of each rule,
always the same, with every modifier and every storage among them. `pytest -n auto --whole
tests/test_combinations.py` takes all; on two cores that is about half an hour. With `--whole`, `-k` finds
single ones.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from kernels import FUSED, LOOP, assert_same_numbers, exact_roots, has_angles, has_kernel
from rules import Case, assert_same_run, by_lines, flat, give_gradients, numbers
from test_storage_runners import STORAGES
from torch import nn

import steprule

# Updates that round away in 16 bits do not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")

RULES: dict[str, Any] = steprule.catalogue()
MODIFIERS: dict[str, Any] = {x.__name__: x for x in steprule.modifier_catalogue().values()}
WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {**STORAGES, "double": (torch.float64, {})}
RUNNERS = {"loop": LOOP, "lists": {"foreach": True, "fused": None}, "kernel": FUSED}
# By default these act after more steps than are taken here.
OFTEN: dict[str, dict[str, Any]] = {"Lookahead": {"every": 2}, "OuterNesterov": {"every": 2}}
# A matrix that is long enough for 8 bits, and a vector.
SHAPES = ((70, 64), (7,))
MATRICES = ((70, 64), (7, 3))
REFUSALS = (ValueError, TypeError, RuntimeError)


def make(rule: str, modifier: str | None, way: str, runner: str) -> Any:
    case, (dtype, options) = Case(RULES[rule]), WAYS[way]
    options = dict(options)
    if modifier is not None:
        options["modifiers"] = [MODIFIERS[modifier](**OFTEN.get(modifier, {}))]
        if "weight_decay" in MODIFIERS[modifier].not_with and case.knows("weight_decay"):
            options["weight_decay"] = 0.0
    options |= RUNNERS[runner] if case.knows("foreach") else {}
    shapes = SHAPES if case.any_shape else MATRICES
    params = [nn.Parameter(numbers(shape, dtype, 100 + i)) for i, shape in enumerate(shapes)]
    return case.rule(params, **case.settings, **options)


def advance(rule: str, modifier: str | None, optimizer: Any, number: int) -> None:
    case = Case(RULES[rule])
    if modifier is not None and hasattr(MODIFIERS[modifier], "climb"):
        give_gradients(case, optimizer, 100 + number)
        optimizer.climb()
    case.advance(optimizer, first=number)


def run(rule: str, modifier: str | None, way: str, runner: str) -> Any:
    """The optimizer after three steps, which another one continues from its checkpoint with the same bits."""
    whole = make(rule, modifier, way, runner)
    for number in range(2):
        advance(rule, modifier, whole, number)
    resumed = make(rule, modifier, way, runner)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    with torch.no_grad():
        for param, value in zip(flat(resumed), flat(whole), strict=True):
            param.copy_(value)
    for optimizer in (whole, resumed):
        advance(rule, modifier, optimizer, 2)
    assert_same_run(resumed, whole)
    return whole


# Refusals


@cache
def refusal(rule: str, modifier: str | None, way: str, runner: str) -> str | None:
    """Why it cannot be made, or cannot take its first step."""
    try:
        advance(rule, modifier, make(rule, modifier, way, runner), 0)
    except REFUSALS as error:
        return str(error)
    return None


def assert_told(told: str, rule: str, modifier: str, way: str, runner: str) -> None:
    """A refusal names both sides, and comes from two of the four: what goes in pairs goes together."""
    storage = ["state_dtype", "low_precision", *map(str, WAYS[way][1].values())]
    runners = ["fused=True", "foreach=True"]
    pairs = {
        (modifier, "'modifiers'"): (rule, modifier, "plain", "loop"),
        (*storage,): (rule, None, way, "loop"),
        (*runners,): (rule, None, way, runner),
        (*storage, *runners, modifier): ("SGD", modifier, way, runner),
    }
    found = [sides for sides, parts in pairs.items() if refusal(*parts) is not None]
    assert found, f"only together: {told}"
    assert rule in told, told
    assert any(side in told for sides in found for side in sides), told
    assert len(told.split()) > 6, told


# The cells


def cells(whole: bool) -> list[tuple[str, str, str]]:
    """All combinations, or one for each rule."""
    if whole:
        return list(itertools.product(RULES, MODIFIERS, WAYS))
    modifiers, ways = list(MODIFIERS), list(WAYS)
    places = enumerate(RULES)
    return [(rule, modifiers[5 * i % len(modifiers)], ways[3 * i % len(ways)]) for i, rule in places]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        config = metafunc.config
        taken = cells(config.getoption("whole") or any("[" in x for x in config.args))
        metafunc.parametrize("cell", taken, ids=["-".join(cell) for cell in taken])


def test_it_runs_in_every_runner_or_says_why_not(cell: tuple[str, str, str]) -> None:
    for runner in ("lists", "kernel"):
        # torch's roots may be off by one unit in the last place; those of kernels are not.
        with exact_roots() if runner == "kernel" else contextlib.nullcontext():
            loop = tried(*cell, "loop")
            given = tried(*cell, runner)
            if given is not None and is_exact(*cell, runner):
                assert_same_numbers(given, loop)
            elif given is not None:
                assert_close(given, loop, cell[2])


def is_exact(rule: str, modifier: str, way: str, runner: str) -> bool:
    """Kernels take angles and sums of rows in double precision in their own way, and no sums as torch does."""
    known = RULES[rule]
    in_double = by_lines(known) or by_lines(MODIFIERS[modifier])
    in_double |= has_kernel(Case(known)) and has_angles(Case(known))
    apart = getattr(known, "sums_as_torch", False) or (way == "double" and in_double)
    return runner != "kernel" or not apart


def assert_close(given: Any, wanted: Any, way: str) -> None:
    tolerance = {"double": 1e-9, "plain": 1e-6}.get(way, 1e-2)
    for one, other in zip(flat(given), flat(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def tried(rule: str, modifier: str, way: str, runner: str) -> Any:
    """The optimizer after its steps, or None if it is refused."""
    try:
        return run(rule, modifier, way, runner)
    except REFUSALS as error:
        assert_told(str(error), rule, modifier, way, runner)
        return None
