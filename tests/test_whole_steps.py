"""A step that raises has moved nothing: states that no step can use, and rules that raise for one parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rules import Case, assert_same, each, flat, numbers
from torch import Tensor, nn

import steprule
from steprule.declare import Matrix
from steprule.matrix.words import matrix_word
from steprule.words import becomes, largest, norm

LOOP, LISTS, DEFAULT = {"foreach": False}, {"foreach": True}, {}
RUNNERS = [LOOP, LISTS, DEFAULT]
WHOLE, SINGLE = "one value per element", "one value per tensor"


def in_inference(value: Tensor) -> Tensor:
    with torch.inference_mode():
        return value.clone()


# What is put in place of an entry, where, and what the error says of it.
SPOILED: dict[str, tuple[str, Any, str]] = {
    "a list": (WHOLE, lambda x: [1.0], "is list, must be a dense tensor"),
    "sparse": (WHOLE, lambda x: x.to_sparse(), r"\(torch.sparse_coo\), must be a dense tensor"),
    "whole numbers": (WHOLE, lambda x: x.long(), "is torch.int64, must be floating-point numbers"),
    "masks": (WHOLE, lambda x: x.bool(), "is torch.bool, must be floating-point numbers"),
    "complex": (WHOLE, lambda x: x.to(torch.complex64), "is torch.complex64, must be floating-point"),
    "one element": (WHOLE, lambda x: torch.zeros(()).expand(x.shape), "cannot be written in place"),
    "of inference": (WHOLE, in_inference, "cannot be written in place"),
    "another size": (WHOLE, lambda x: torch.zeros(7, 7), r"has shape \(7, 7\)"),
    "no number": (SINGLE, lambda x: None, "must be a floating-point tensor of one number"),
    "two numbers": (SINGLE, lambda x: torch.zeros(2), "must be a floating-point tensor of one number"),
    "a whole number": (SINGLE, lambda x: x.long(), "must be a floating-point tensor of one number"),
    "a frozen number": (SINGLE, in_inference, "cannot be written in place"),
    "no count": ("step", lambda x: None, "is NoneType, must be one number"),
    "a word": ("step", lambda x: "three", "is 'three', must be one number"),
    "two counts": ("step", lambda x: torch.ones(2), r"must be one number"),
    "a truth": ("step", lambda x: True, "is True, must be one number"),
    "a frozen count": ("step", lambda x: in_inference(torch.as_tensor(x)), "cannot be written in place"),
}


def keys_at(case: Case, optimizer: Any, where: str) -> list[str]:
    """The entries of a state that hold this: one value per element, per tensor, or the count."""
    param = flat(optimizer)[-1]
    if where == "step":
        return [where] if where in optimizer.state[param] else []
    (group,) = optimizer.param_groups
    slots = [slot for slot in case.rule.slots.values() if slot.exists(group)]
    return [
        slot.key
        for slot in slots
        if slot.per_tensor == (where == SINGLE) and slot.key in optimizer.state[param]
    ]


@each(lambda case: not case.closure)
def test_a_state_that_no_step_can_use_is_named_and_nothing_moves(case: Case) -> None:
    params = [nn.Parameter(numbers((4, 3), torch.float32, i)) for i in range(3)]
    optimizer = case.make(params)
    case.advance(optimizer, 2)
    case.prepare(optimizer)
    state = optimizer.state[params[-1]]
    others = [[p.detach(), optimizer.state[p]] for p in params[:-1]]
    before = copy.deepcopy(others)
    for where, spoil, message in SPOILED.values():
        for key in keys_at(case, optimizer, where)[-1:]:
            right, state[key] = state[key], spoil(state[key])
            with pytest.raises(RuntimeError, match=rf"^{case.name}: parameter 2 .*'{key}'.*{message}"):
                optimizer.step()
            assert_same(others, before)
            state[key] = right
    optimizer.step()


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_buffer_of_none_is_one_that_is_not_there(runner: dict[str, Any]) -> None:
    """Older versions of torch's SGD kept it so, and users move states by hand."""
    ran: list[Any] = []
    for buffer in ({}, {"momentum_buffer": None}):
        param = nn.Parameter(torch.ones(3))
        optimizer = steprule.SGD([param], lr=0.1, momentum=0.9, **runner)
        optimizer.state[param] = dict(buffer)
        for _ in range(2):
            param.grad = torch.ones(3)
            optimizer.step()
        ran.append([param.detach(), optimizer.state[param]])
    assert_same(ran[0], ran[1])


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("state", [None, [], "exp_avg"])
def test_a_state_that_is_no_dict(state: Any, runner: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = steprule.AdamW([("a", params[0]), ("b", params[1])], **runner)
    optimizer.state[params[1]] = state
    params[0].grad = params[1].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"^AdamW: 'b' .*its state is \w+, must be a dict"):
        optimizer.step()
    assert params[0].eq(1).all()


def test_notes_of_the_user_in_a_state_are_left_alone() -> None:
    for rule in (steprule.SparseAdam, steprule.AdamW, steprule.Muon):
        param = nn.Parameter(torch.ones(3, 2))
        optimizer = rule([param])
        optimizer.state[param].update(note="mine", size=torch.ones(3, 2))
        param.grad = torch.ones(3, 2).to_sparse(1) if rule is steprule.SparseAdam else torch.ones(3, 2)
        optimizer.step()
        assert optimizer.state[param]["note"] == "mine"
        assert optimizer.state[param]["size"].eq(1).all()


# Parameters that torch does not write to


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_parameter_that_cannot_be_written_is_named_first(runner: dict[str, Any]) -> None:
    with torch.inference_mode():
        frozen = torch.ones(2, 2)
    for bad in (frozen, nn.Parameter(torch.ones(1, 2).expand(2, 2))):
        first = nn.Parameter(torch.ones(2, 2))
        optimizer = steprule.AdamW([("a", first), ("b", bad)], **runner)
        first.grad = bad.grad = torch.ones(2, 2)
        with pytest.raises(RuntimeError, match=r"^AdamW: 'b' cannot be written in place"):
            optimizer.step()
        assert first.eq(1).all()


def test_a_leaf_that_requires_grad_after_one_that_does_not() -> None:
    leaf = nn.Parameter(torch.ones(2))
    inner = leaf.clone()
    inner.retain_grad()
    optimizer = steprule.SGD([("inner", inner), ("leaf", leaf)], lr=1.0, differentiable=True)
    inner.grad = leaf.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"^SGD: 'leaf' is a leaf Variable that requires grad.*clone"):
        optimizer.step()
    assert inner.eq(1).all()


def test_a_state_loaded_in_inference_mode_can_be_stepped() -> None:
    for runner in RUNNERS:
        params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = steprule.AdamW(params, **runner)
        params[0].grad = params[1].grad = torch.ones(2)
        optimizer.step()
        with torch.inference_mode():
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        assert optimizer.state[params[0]]["step"] == 2


# What rules raise


@matrix_word
def picky_word(x: torch.Tensor) -> torch.Tensor:
    """Raises for some matrices."""
    if x.size(-1) == 7:
        raise ValueError("no seven columns")
    if x.sum() < 0:
        raise ValueError("no negative sums")
    return x[..., :1] if x.size(-1) == 5 else x.clone()


class Picky(Matrix):
    """Raises for some parameters."""

    lr: float = steprule.hyper(0.5)
    m = steprule.slot("m")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        s.m = s.m + g
        return -h.lr * g + 0 * picky_word(p)


WHOLE: list[dict[str, Any]] = [{"fused": False}, {}]


def picky(*shapes: tuple[int, ...], groups: int = 1, **runner: Any) -> tuple[Any, list[Any]]:
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    return Picky([{"params": params[i::groups]} for i in range(groups)], **runner), params


@pytest.mark.parametrize("runner", WHOLE)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(2, 2, 7), (2, 5)])
def test_a_rule_that_raises_for_one_shape_has_moved_nothing(
    shape: tuple[int, ...], groups: int, runner: dict[str, Any]
) -> None:
    optimizer, params = picky((2, 2), shape, groups=groups, **runner)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no seven columns|picky_word made matrices of shape \(2, 1\)"):
            optimizer.step()
        assert not optimizer.state
    assert all(param.eq(1).all() for param in params)


def test_a_vector_for_a_rule_on_matrices() -> None:
    with pytest.raises(ValueError, match=r"^Picky steps matrices, but parameter 1 has shape \(7,\).*AdamW"):
        picky((2, 2), (7,))
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = Picky([param])
    param.data = torch.ones(7)
    param.grad = torch.ones(7)
    with pytest.raises(ValueError, match=r"^Picky steps matrices, but parameter 0 has shape \(7,\)"):
        optimizer.step()


@pytest.mark.parametrize("runner", WHOLE)
@pytest.mark.parametrize("beside", [steprule.AdamW, steprule.LAMB, Picky])
def test_what_no_check_can_foresee_has_moved_nothing_either(beside: Any, runner: dict[str, Any]) -> None:
    _, (first, second) = picky((2, 2), (2, 2))
    optimizer = steprule.AdamW(
        [
            {"params": [first], "rule": beside, **runner},
            {"params": [second], "rule": Picky, "lr": 0.5, **runner},
        ],
        modifiers=[steprule.GlobalNormClip(0.1)],
    )
    optimizer.step()
    with torch.no_grad():
        second.fill_(-1.0)
    before = copy.deepcopy([first.detach(), second.detach(), [optimizer.state[x] for x in (first, second)]])
    with pytest.raises(ValueError, match="no negative sums") as caught:
        optimizer.step()
    assert not any("in the middle of a step" in note for note in getattr(caught.value, "__notes__", []))
    assert_same([first.detach(), second.detach(), [optimizer.state[x] for x in (first, second)]], before)
    with torch.no_grad():
        second.fill_(1.0)
    optimizer.step()
    assert optimizer.state[first]["step"] == optimizer.state[second]["step"] == 2


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_scalar_that_cannot_be_computed_for_the_last_parameter(runner: dict[str, Any]) -> None:
    class Late(steprule.Elementwise):
        lr: float = steprule.hyper(0.5)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
            return -h.lr / (t - 2) * g

    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = Late(params, **runner)
    params[1].grad = torch.ones(2)
    optimizer.step()
    params[0].grad = torch.ones(2)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert params[0].eq(1).all()


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_parameter_takes_the_old_value_of_a_slot_that_is_replaced(runner: dict[str, Any]) -> None:
    class Swap(steprule.Elementwise):
        lr: float = steprule.hyper(0.5)
        m = steprule.slot("m", starts=7.0)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
            old = s.m
            s.m = p
            return becomes(old)

    param = nn.Parameter(torch.ones(2))
    optimizer = Swap([param], **runner)
    for value, kept in ((7.0, 1.0), (1.0, 7.0)):
        param.grad = torch.ones(2)
        optimizer.step()
        assert param.tolist() == [value] * 2
        assert optimizer.state[param]["m"].tolist() == [kept] * 2


# Sums


class Shorter(steprule.Modifier):
    """Divides by a norm of all."""

    @staticmethod
    def gradient(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return g / (1 + norm(g, over="all"))


class Smaller(steprule.Modifier):
    """Divides by another one."""

    @staticmethod
    def gradient(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return g / (1 + largest(abs(g), over="all"))


@pytest.mark.parametrize("runner", RUNNERS)
def test_sums_that_wait_for_each_other_are_found_before_anything_moves(runner: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    both = [Shorter(), Smaller()]
    orders = [[], both, both[:1], both[::-1]]
    for switched in (False, True):
        groups = [{"params": [p], "modifiers": x} for p, x in zip(params, orders, strict=True)]
        optimizer = steprule.SGD(groups, lr=0.5, momentum=0.9, **runner)
        for param in params:
            param.grad = torch.ones(3)
        if switched:
            optimizer.step()
            assert not any(param.eq(1).any() for param in params)
        else:
            with pytest.raises(
                RuntimeError, match=r"^SGD: parameter groups 1 and 3 take the same sums .* order"
            ):
                optimizer.step()
            assert all(param.eq(1).all() for param in params)
            assert not optimizer.state
        orders[3] = both


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_elements_are_refused_where_they_are_added_up(
    kind: str, runner: dict[str, Any]
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for rule, modifiers in ((steprule.LAMB, []), (steprule.AdamW, [steprule.GlobalNormClip()])):
        first = nn.Parameter(torch.ones(3, 2))
        first.grad = torch.ones(3, 2)
        if kind == "meta":
            empty = nn.Parameter(torch.ones(3, 2, device="meta"))
        else:
            with FakeTensorMode():
                empty = nn.Parameter(torch.ones(3, 2))
        empty.grad = torch.empty_like(empty)
        optimizer = rule([("a", first), ("b", empty)], modifiers=modifiers, **runner)
        with pytest.raises(RuntimeError, match=rf"^{rule.__name__}.*: 'b' is a meta or fake tensor.*to_empty"):
            optimizer.step()
        assert first.eq(1).all()
        assert not optimizer.state


# Rules by hand


class ByHand(steprule.GenericAdaptiveOptimizer):
    """Raises for what is not positive."""

    def init_state(self, state: dict[str, Any], group: dict[str, Any], param: Tensor) -> None:
        state["sum"] = torch.zeros_like(param)
        if param.numel() == 7:
            raise ValueError("no seven")

    def step_param(self, state: dict[str, Any], group: dict[str, Any], grad: Tensor, param: Tensor) -> None:
        if param.sum() < 0:
            raise ValueError("no negative sums")
        param.sub_(grad)


def test_a_rule_by_hand_that_raises_says_that_others_have_moved() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(-torch.ones(2))
    optimizer = ByHand([first, second])
    first.grad = second.grad = torch.ones(2)
    with pytest.raises(ValueError, match="no negative sums") as caught:
        optimizer.step()
    assert "Parameters before this one may have moved" in caught.value.__notes__[-1]
    assert first.eq(0).all()


def test_a_state_that_was_begun_by_hand_and_not_finished_is_not_kept() -> None:
    first, seven = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(7))
    optimizer = ByHand([first, seven])
    _ = optimizer.state[seven]  # it is there, and empty
    first.grad, seven.grad = torch.ones(2), torch.ones(7)
    for _ in range(2):
        with pytest.raises(ValueError, match="no seven"):
            optimizer.step()
        assert not optimizer.state[seven]
    assert first.eq(1).all()
