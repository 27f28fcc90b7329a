"""What is worked on together: equal matrices of all groups, as many as fit; and memory that slots share."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from rules import assert_same, numbers
from test_matrices import LOOP, RULES, Whitening, assert_close, looking, stepped
from torch import nn
from torch._subclasses import FakeTensorMode

import steprule
from steprule import hyper, slot
from steprule.declare import Matrix, identity
from steprule.engine import plans
from steprule.engine.runners import matrices
from steprule.engine.runners.matrices import MatrixWork
from steprule.matrix.words import transpose
from steprule.words import is_matrix

SHAPES = ((64, 80), (80, 64), (64, 80), (32, 48), (64, 80))


def made(
    rule: Any, own: list[dict[str, Any]] | None, dtype: torch.dtype, **options: Any
) -> tuple[Any, list[Any]]:
    """An optimizer with one group, or with a group for each of these options, in turn."""
    params = [nn.Parameter(numbers(shape, dtype, seed=i)) for i, shape in enumerate(SHAPES)]
    if own is None:
        return rule(params, **options), params
    groups = [{"params": [p], **own[i % len(own)]} for i, p in enumerate(params)]
    return rule(groups, **options), params


def take(optimizer: Any, params: list[Any], steps: int, late: int | None = None) -> None:
    for step in range(steps):
        for place, param in enumerate(params):
            param.grad = numbers(tuple(param.shape), param.dtype, seed=100 * step + place)
            if place == late and step < 2:
                param.grad = None
        optimizer.step()


def test_equal_matrices_of_all_groups_are_worked_on_together() -> None:
    seen: list[tuple[int, ...]] = []
    take(*made(looking(seen), [{"lr": 0.1}, {"lr": 0.2}], torch.float32), 1)
    assert sorted(seen) == [(3, 64, 80), (32, 48), (80, 64)]


@pytest.mark.parametrize(
    ("own", "groups"),
    [
        ([{}, {}, {"clip": True}], 2),
        ([{}, {"maximize": True}, {"clip": True}], 3),
        ([{}, {}, {"fused": False}], 2),
    ],
)
def test_groups_with_other_words_or_options_are_not(own: list[dict[str, Any]], groups: int) -> None:
    seen: list[tuple[int, ...]] = []
    optimizer, params = made(looking(seen), own, torch.float32)
    take(optimizer, params, 1)
    assert len([x for x in seen if x[-2:] == (64, 80)]) == groups


def test_matrices_of_another_precision_are_not() -> None:
    seen: list[tuple[int, ...]] = []
    kinds = (torch.float32, torch.float64, torch.float32, torch.float64)
    params = [nn.Parameter(numbers((64, 80), kind, seed=i)) for i, kind in enumerate(kinds)]
    take(looking(seen)([{"params": [p]} for p in params]), params, 1)
    assert seen == [(2, 64, 80), (2, 64, 80)]


def test_matrices_without_elements_take_no_part() -> None:
    seen: list[tuple[int, ...]] = []
    params = [nn.Parameter(numbers(shape, torch.float32, seed=i)) for i, shape in enumerate(((0, 6), *SHAPES))]
    take(looking(seen)([{"params": [p]} for p in params]), params, 1)
    assert (3, 64, 80) in seen


MODIFIERS: list[list[Any]] = [[], [steprule.GlobalNormClip(0.1), steprule.Cautious(), steprule.EMA(0.9)]]


@pytest.mark.parametrize("modifiers", MODIFIERS, ids=["plain", "modified"])
@pytest.mark.parametrize(("rule", "own"), [(steprule.Muon, {}), (Whitening, {}), *RULES[1:4]])
def test_many_groups_step_as_one_does(rule: Any, own: dict[str, Any], modifiers: list[Any]) -> None:
    """To the bit, whenever the parameters get their first gradients."""
    results: list[Any] = []
    for groups in (None, [{}]):
        optimizer, params = made(rule, groups, torch.float32, modifiers=modifiers, **own)
        take(optimizer, params, 5, late=2)
        assert "by the reference" not in optimizer.explain()
        results.append([*(p.detach() for p in params), *(dict(optimizer.state[p]) for p in params)])
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", [steprule.Muon, Whitening, steprule.Kron])
def test_groups_with_options_of_their_own_step_as_the_loop_does(rule: Any, dtype: torch.dtype) -> None:
    own = [{"lr": 0.01}, {"lr": 0.02}, {"maximize": True}]
    ran: list[Any] = []
    for switches in ({}, LOOP):
        optimizer, params = made(rule, own, dtype, low_precision="none", **switches)
        take(optimizer, params, 4, late=2)
        ran.append(params)
    # Products of several matrices at once may add in another order.
    assert_close(*ran, 1e-12 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_what_is_in_memory_between_sweeps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(matrices, "CACHED", 2 * 4 * 64 * 80)
    take(*made(looking(seen), [{}], torch.float32), 1)
    assert seen == [(64, 80), (80, 64), (64, 80), (32, 48), (64, 80)]
    monkeypatch.setattr(matrices, "CACHED", 3 * 4 * 64 * 80)
    seen.clear()
    take(*made(looking(seen), [{}], torch.float32), 1)
    assert seen == [(2, 64, 80), (80, 64), (32, 48), (64, 80)]


@pytest.mark.parametrize("rule", [steprule.SOAP, steprule.Shampoo])
def test_a_word_that_fails_names_the_parameters_and_nothing_moves(rule: Any) -> None:
    params = [nn.Parameter(numbers((3, 4), torch.float32, seed=i)) for i in range(3)]
    optimizer = rule([{"params": [(f"w{i}", p)]} for i, p in enumerate(params)], every=1)
    before = [p.detach().clone() for p in params]
    for place, param in enumerate(params):
        param.grad = numbers((3, 4), torch.float32, seed=place)
    params[1].grad[0, 0] = float("nan")
    with pytest.raises(
        RuntimeError, match=r"of the matrices of 'w0', 'w1', 'w2' failed: .* No parameter has moved"
    ):
        optimizer.step()
    assert_same([p.detach() for p in params], before)
    assert held() == 0
    take(optimizer, params, 1)
    assert not params[0].detach().isnan().any()


def held() -> int:
    """How many arrays and values all work on matrices holds."""
    works = [x for x in gc.get_objects() if type(x) is MatrixWork]
    return sum(len(equal.arrays) + len(equal.values) for work in works for equal in work._equals)


def test_a_step_leaves_nothing_in_memory_whether_it_is_taken_or_not() -> None:
    clip = [steprule.GlobalNormClip(1.0)]
    optimizer, params = made(steprule.Muon, [{}], torch.float32, modifiers=clip, nonfinite="skip")
    take(optimizer, params, 2)
    assert held() == 0
    before = [x.detach().clone() for x in params]
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert_same([x.detach() for x in params], before)
    assert optimizer.param_groups[0]["skipped_steps"] == 1
    assert held() == 0


def test_factors_count_as_what_words_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six values per row are little, a factor of 40 by 40 is not."""
    monkeypatch.setattr(matrices, "CACHED", 4 * 40 * 40)
    optimizer, _ = stepped(steprule.SOAP, 1, shapes=((40, 6),) * 3)
    (plan,) = plans.of(optimizer).plans.values()
    assert [len(batch.places) for batch in plan.batches] == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("runner", [{}, LOOP])
def test_slots_may_take_what_others_had(runner: dict[str, Any], count: int) -> None:
    class Swaps(Matrix):
        lr: float = hyper(default=0.1)
        a = slot("a", per="left", only="matrices")
        b = slot("b", per="left", only="matrices", starts=identity)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            if not is_matrix(p):
                return -h.lr * g
            s.a, s.b = transpose(s.b), transpose(s.a)
            return -h.lr * (s.a @ g)

    optimizer, (param, *_) = stepped(Swaps, 1, shapes=((4, 6),) * count, **runner)
    for a, b in ((torch.eye(4), torch.zeros(4, 4)), (torch.zeros(4, 4), torch.eye(4))):
        assert_same(optimizer.state[param]["a"], a)
        assert_same(optimizer.state[param]["b"], b)
        optimizer.step()


def test_fake_tensors_have_no_memory_to_look_at() -> None:
    """torch warns of those who ask for it, and warnings are errors here."""
    with FakeTensorMode():
        stepped(steprule.Muon, 1, shapes=((4, 6),), **LOOP)
