"""Gradients that are NaN or infinite: a step that raises, is skipped, or continues as torch's does."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from rules import (
    Case,
    assert_same,
    assert_same_run,
    each,
    flat,
    give_gradients,
    loss_with_gradients,
    numbers,
    plain,
    snapshot,
    sparse_rows,
)
from torch import Tensor, nn

import steprule
from steprule import Adam, AdamW, SparseAdam
from steprule.engine import nonfinite

NAN, INF = float("nan"), float("inf")


def takes_it(case: Case) -> bool:
    return case.knows("nonfinite")


def spoil(optimizer: Any, place: int = 1, number: float = NAN) -> None:
    """Make one element of one gradient NaN or infinite."""
    gradient = flat(optimizer)[place].grad
    where = gradient._values() if gradient.is_sparse else gradient
    (torch.view_as_real(where) if where.is_complex() else where).view(-1)[-1] = number


def named(case: Case) -> list[tuple[str, Any]]:
    return [(f"layer{i}.weight", p) for i, p in enumerate(case.parameters())]


def with_nonfinite(case: Case, optimizer: Any, number: int, bad: float = NAN) -> None:
    give_gradients(case, optimizer, number)
    spoil(optimizer, number=bad)


# skip


@each(takes_it)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_skipped_step_moves_nothing_and_is_counted(case: Case, bad: float) -> None:
    optimizer, wanted = case.make(nonfinite="skip"), case.make()
    for step in range(4):
        if step % 2:
            with_nonfinite(case, optimizer, step, bad)
            case.step(optimizer)
        else:
            case.advance(optimizer, first=step)
            case.advance(wanted, first=step)
    assert optimizer.param_groups[0]["skipped_steps"] == 2
    assert_same([p.detach() for p in flat(optimizer)], [p.detach() for p in flat(wanted)])
    assert_same(optimizer.state_dict()["state"], wanted.state_dict()["state"])


@each(lambda case: takes_it(case) and plain(case))
def test_the_first_step_may_be_skipped_and_creates_no_state(case: Case) -> None:
    optimizer = case.make(nonfinite="skip")
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with_nonfinite(case, optimizer, 0)
    case.step(optimizer)
    assert_same(optimizer.state_dict()["state"], before)


def test_one_bad_gradient_stops_every_group() -> None:
    case = Case(AdamW)
    params = case.parameters()
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], nonfinite="skip")
    case.advance(optimizer)
    before = snapshot(optimizer)
    give_gradients(case, optimizer, 1)
    spoil(optimizer, place=3)
    optimizer.step()
    after = snapshot(optimizer)
    assert [group["skipped_steps"] for group in optimizer.param_groups] == [1, 1]
    for group in after[1]["param_groups"]:
        group["skipped_steps"] = 0
    assert_same(after, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_every_dtype(dtype: torch.dtype) -> None:
    case = Case(Adam)
    optimizer = case.make(case.parameters(dtype), nonfinite="skip", low_precision="none")
    with_nonfinite(case, optimizer, 0, INF)
    optimizer.step()
    assert optimizer.param_groups[0]["skipped_steps"] == 1
    # The largest finite values are finite, even if their sum or absolute value is not.
    most = torch.finfo(dtype).max
    for param in flat(optimizer):
        filled = torch.view_as_real(param.grad) if dtype.is_complex else param.grad
        filled.fill_(most)
    assert optimizer.nonfinite_parameters() == []
    optimizer.step()
    assert optimizer.param_groups[0]["skipped_steps"] == 1


@pytest.mark.parametrize("size", [1, 7, 33, 4099])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_found_at_every_place_of_a_gradient(size: int, bad: float) -> None:
    param = nn.Parameter(torch.zeros(size))
    optimizer = AdamW([param], nonfinite="skip")
    for place in {0, size // 2, size - 1}:
        param.grad = torch.ones(size)
        param.grad[place] = bad
        assert optimizer.nonfinite_parameters() == ["parameter 0"]


def test_empty_and_absent_gradients_are_finite() -> None:
    params = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    optimizer = AdamW(params, nonfinite="raise")
    params[0].grad, params[1].grad = torch.zeros(0, 3), torch.ones(2)
    optimizer.step()
    assert params[1][0] != 0
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("rule", [SparseAdam, steprule.SGD, steprule.Adagrad])
def test_sparse_gradients_and_what_their_rows_add_up_to(rule: Any) -> None:
    param = nn.Parameter(torch.zeros(6, 2))
    optimizer = rule([("embed.weight", param)], nonfinite="raise")
    param.grad = sparse_rows(torch.ones(6, 2))
    optimizer.step()
    rows = torch.full((6, 2), 3e38)
    param.grad = sparse_rows(rows)
    assert bool(param.grad._values().isfinite().all())
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"embed\.weight"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_half_a_nan_is_found_in_a_gradient_of_any_layout() -> None:
    """Slices, transposes, channels-last and expanded tensors are read in place."""
    param = nn.Parameter(torch.zeros(4, 6))
    optimizer = AdamW([param], nonfinite="skip")
    wide = torch.ones(8, 12)
    wide[2, 10] = NAN
    for gradient, bad in (
        (wide[::2, ::2], True),
        (wide[1::2, ::2], False),
        (torch.ones(6, 4).t(), False),
        (torch.tensor(NAN).expand(4, 6), True),
        (torch.tensor(1.0).expand(4, 6), False),
    ):
        param.grad = gradient
        assert optimizer.nonfinite_parameters() == (["parameter 0"] if bad else [])


# raise


@each(lambda case: takes_it(case) and plain(case))
def test_raising_names_the_parameters_and_moves_nothing(case: Case) -> None:
    optimizer = case.make(named(case), nonfinite="raise")
    case.advance(optimizer, 2)
    before = snapshot(optimizer)
    with_nonfinite(case, optimizer, 2)
    with pytest.raises(RuntimeError, match=rf"^{case.name}: the gradient of 'layer1.weight' is NaN .*'skip'"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert optimizer.nonfinite_parameters() == ["layer1.weight"]


def test_groups_may_differ_and_the_one_that_raises_comes_first() -> None:
    case = Case(AdamW)
    params = named(case)
    groups: Any = [
        {"params": params[:1], "nonfinite": "skip"},
        {"params": params[1:2], "nonfinite": "raise"},
        {"params": params[2:]},
    ]
    optimizer = AdamW(groups)
    assert [group.get("nonfinite") for group in optimizer.param_groups] == ["skip", "raise", None]
    give_gradients(case, optimizer, 0)
    spoil(optimizer, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["skipped_steps"] == 1
    assert not optimizer.state
    spoil(optimizer, 1)
    with pytest.raises(RuntimeError, match=r"of 'layer1.weight' is NaN"):
        optimizer.step()
    assert optimizer.nonfinite_parameters() == ["layer0.weight", "layer1.weight"]
    give_gradients(case, optimizer, 0)
    spoil(optimizer, 2)
    optimizer.step()
    assert optimizer.state
    assert "skipped_steps" not in optimizer.param_groups[1]


# ignore


@each(lambda case: case.torch_class is not None and not case.closure and plain(case))
def test_by_default_the_numbers_are_torchs_and_no_group_speaks_of_it(case: Case) -> None:
    ours, theirs = case.make(), case.make_torch()
    for optimizer in (ours, theirs):
        case.advance(optimizer)
        with_nonfinite(case, optimizer, 1)
        optimizer.step()
    for mine, other in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
    assert ours.nonfinite_parameters() == ["parameter 1"]
    spelt_out = case.make(nonfinite="ignore")
    for optimizer in (ours, spelt_out):
        assert {"nonfinite", "skipped_steps"}.isdisjoint(optimizer.param_groups[0])


@each(takes_it)
def test_the_option_changes_no_number(case: Case) -> None:
    optimizer, wanted = case.make(nonfinite="raise"), case.make()
    case.advance(optimizer, 3)
    case.advance(wanted, 3)
    assert_same_run(optimizer, wanted)


@each(plain)
def test_it_is_a_keyword_of_every_rule_but_lbfgs(case: Case) -> None:
    assert takes_it(case) != case.closure
    if case.closure:
        with pytest.raises(TypeError, match="nonfinite"):
            case.make(nonfinite="skip")
        with pytest.raises(ValueError, match="no hyper-parameter 'nonfinite'"):
            case.make([{"params": case.parameters(), "nonfinite": "skip"}])
        return
    assert inspect.signature(case.rule).parameters["nonfinite"].kind is inspect.Parameter.KEYWORD_ONLY
    with pytest.raises(ValueError, match=f"{case.name}: nonfinite = 'zero', must be one of 'ignore', 'raise'"):
        case.make(nonfinite="zero")


# Around it


@each(lambda case: takes_it(case) and plain(case) and not case.sparse_only)
def test_with_a_closure_the_loss_is_returned_all_the_same(case: Case) -> None:
    optimizer = case.make(nonfinite="skip")
    before = [p.detach().clone() for p in flat(optimizer)]

    def closure() -> Tensor:
        loss = loss_with_gradients(optimizer)
        spoil(optimizer)
        return loss

    case.prepare(optimizer)
    assert optimizer.step(closure).item() > 0
    assert_same([p.detach() for p in flat(optimizer)], before)


def test_a_schedule_sees_a_step() -> None:
    case = Case(AdamW)
    optimizer = case.make(nonfinite="skip")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with_nonfinite(case, optimizer, 0)
    optimizer.step()
    schedule.step()  # a warning here would be an error
    assert optimizer.param_groups[0]["skipped_steps"] == 1


def test_the_count_goes_through_a_checkpoint_and_through_torch() -> None:
    case = Case(AdamW)
    optimizer = case.make(nonfinite="skip")
    for step in range(3):
        with_nonfinite(case, optimizer, step)
        optimizer.step()
    case.advance(optimizer, first=3)
    again = case.make()
    again.load_state_dict(optimizer.state_dict())
    assert (again.param_groups[0]["nonfinite"], again.param_groups[0]["skipped_steps"]) == ("skip", 3)
    kept = case.make(nonfinite="skip")
    kept.load_state_dict(optimizer.state_dict(), hyperparams="current")
    assert kept.param_groups[0]["skipped_steps"] == 3
    without = case.make()
    without.load_state_dict(optimizer.state_dict(), hyperparams="current")
    assert {"nonfinite", "skipped_steps"}.isdisjoint(without.param_groups[0])
    theirs = case.make_torch()
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    case.advance(theirs, first=4)
    back = case.make()
    back.load_state_dict(theirs.state_dict())
    assert back.param_groups[0]["skipped_steps"] == 3


def test_a_checkpoint_of_torch_keeps_the_option_of_the_code() -> None:
    case = Case(AdamW)
    theirs = case.make_torch()
    case.advance(theirs)
    optimizer = case.make(nonfinite="skip")
    optimizer.load_state_dict(theirs.state_dict())
    assert (optimizer.param_groups[0]["nonfinite"], optimizer.param_groups[0]["skipped_steps"]) == ("skip", 0)


def test_sophias_curvature_is_guarded_too() -> None:
    case = Case(steprule.Sophia)
    for choice in ("skip", "raise"):
        optimizer = case.make(named(case), nonfinite=choice)
        case.advance(optimizer, 2)
        before = snapshot(optimizer)
        with_nonfinite(case, optimizer, 2)
        if choice == "raise":
            with pytest.raises(RuntimeError, match=r"layer1\.weight"):
                optimizer.update_hessian(4)
        else:
            optimizer.update_hessian(4)
        assert_same(snapshot(optimizer), before)


class ByHand(steprule.GenericAdaptiveOptimizer):
    def step_param(self, state: Any, group: dict[str, Any], grad: Tensor, param: Tensor) -> None:
        param.sub_(grad, alpha=group["lr"])


def test_a_rule_written_by_hand_has_it_among_its_defaults() -> None:
    case = Case(ByHand)
    optimizer = ByHand(case.parameters(), defaults={"nonfinite": "skip"})
    before = [p.detach().clone() for p in flat(optimizer)]
    with_nonfinite(case, optimizer, 0)
    optimizer.step()
    assert_same([p.detach() for p in flat(optimizer)], before)
    assert optimizer.param_groups[0]["skipped_steps"] == 1
    with pytest.raises(ValueError, match="ByHand: nonfinite = 'no'"):
        ByHand(case.parameters(), defaults={"nonfinite": "no"})


def test_a_differentiable_step_keeps_its_tape() -> None:
    lr = torch.tensor(0.5, requires_grad=True)
    start = nn.Parameter(numbers((3,), torch.float32, 1))
    param = start.clone()
    param.retain_grad()
    optimizer = steprule.SGD([param], lr=lr, differentiable=True, nonfinite="raise")
    gradient = numbers((3,), torch.float32, 2)
    param.grad = gradient
    optimizer.step()
    param.sum().backward()
    assert lr.grad is not None
    torch.testing.assert_close(lr.grad, -gradient.sum())


# Together with a norm that the step takes anyway


@pytest.mark.parametrize("runner", [{}, {"foreach": True}, {"foreach": False, "fused": False}], ids=str)
@pytest.mark.parametrize("kind", ["skip", "raise"])
@pytest.mark.parametrize("first", [True, False])
def test_the_norm_for_clipping_shows_it_without_a_further_read(
    kind: str, runner: dict[str, Any], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> Any:
        params = [nn.Parameter(numbers((5, 3), torch.float32, i)) for i in range(3)]
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.1}]
        return AdamW(groups, nonfinite=kind, modifiers=[steprule.GlobalNormClip(), steprule.EMA()], **runner)

    def give(optimizer: Any, step: int) -> None:
        for place, param in enumerate(flat(optimizer)):
            param.grad = numbers((5, 3), torch.float32, 10 * step + place)

    asked: list[Any] = []
    real = nonfinite.all_finite
    monkeypatch.setattr(nonfinite, "all_finite", lambda x: asked.append(x) or real(x))
    given, wanted = made(), made()
    for step in range(4):
        bad = step == (0 if first else 2)
        for optimizer in (given, wanted)[: 1 if bad else 2]:
            give(optimizer, step)
        asked.clear()
        if not bad:
            given.step()
            wanted.step()
            assert not asked
            continue
        spoil(given, place=2, number=INF)
        if kind == "raise":
            with pytest.raises(RuntimeError, match="parameter 2") as caught:
                given.step()
            assert not getattr(caught.value, "__notes__", [])
        else:
            given.step()
            assert [group["skipped_steps"] for group in given.param_groups] == [1, 1]
            for group in given.param_groups:
                group["skipped_steps"] = 0
        assert asked
        assert len(given.state) == (0 if first else 3)
    assert_same_run(given, wanted)


def test_a_norm_that_only_overflows_stops_nothing() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AdamW([param], nonfinite="raise", modifiers=[steprule.GlobalNormClip()])
    param.grad = torch.full_like(param, 1e200)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_a_limited_gradient_does_not_hide_it() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = AdamW([param], nonfinite="skip", modifiers=[steprule.ValueClip(), steprule.GlobalNormClip()])
    param.grad = torch.full_like(param, INF)
    optimizer.step()
    assert optimizer.param_groups[0]["skipped_steps"] == 1
    assert not optimizer.state


@pytest.mark.parametrize("modifiers", [[], [steprule.GlobalNormClip()]], ids=["plain", "clipped"])
@pytest.mark.parametrize("kind", ["skip", "raise"])
@pytest.mark.parametrize("runner", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_step_that_is_not_taken_leaves_no_trace(runner: Any, kind: str, modifiers: list[Any]) -> None:
    """No version, so that a backward pass still finds its parameters; and no state that was only looked at."""
    params = [nn.Parameter(numbers((5, 3), torch.float32, i)) for i in range(2)]
    optimizer = AdamW([("a", params[0]), ("b", params[1])], nonfinite=kind, modifiers=modifiers, **runner)
    assert optimizer.state[params[1]] == {}
    versions = [p._version for p in params]
    for bad in (True, False):
        for param in params:
            param.grad = torch.ones_like(param)
        params[1].grad[0, 0] = NAN if bad else 1.0
        if bad and kind == "raise":
            with pytest.raises(RuntimeError, match="b"):
                optimizer.step()
        else:
            optimizer.step()
        assert all((p._version == v) == bad for p, v in zip(params, versions, strict=True))
        assert [len(optimizer.state[p]) for p in params[bad:]] == ([0] if bad else [3, 3])
