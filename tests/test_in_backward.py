"""Steps during the backward pass: the numbers of `step()`, and gradients that are freed as they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rules import LOOPS, Case, assert_same, each, numbers
from torch import nn

import steprule
from steprule.engine.composition import Composition


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def backward(net: nn.Module, number: int) -> None:
    net(numbers((3, 6), torch.float32, number)).square().mean().backward()


def alone(case: Case) -> bool:
    """Whether every parameter is stepped on its own."""
    if case.closure or case.sparse_only or not hasattr(case.rule, "update") or not case.any_shape:
        return False
    optimizer = case.make()
    (group, *_) = optimizer.param_groups
    own: Composition = optimizer.composition(group)
    return not (optimizer.program(group).shares or any(x.shared for x in own.slots.values()))


# Steps with a curvature of 0 will do here.
@pytest.mark.filterwarnings("ignore:.*update_hessian was never called:UserWarning")
@each(alone, among=LOOPS)
def test_every_rule_steps_as_it_does_after_the_backward_pass(case: Case) -> None:
    after, during = model(), model()
    one, other = case.make(after.parameters()), case.make(during.parameters())
    steprule.step_in_backward(during, other)
    for number in range(3):
        backward(after, number)
        one.step()
        one.zero_grad()
        backward(during, number)
        other.step()
    for p, q in zip(after.parameters(), during.parameters(), strict=True):
        assert q.grad is None
        assert_same(q, p, str(case))
        for key, value in one.state[p].items():
            assert_same(other.state[q][key], value, f"{case}: {key}")


def test_schedules_storage_groups_and_checkpoints_stay_as_they_are() -> None:
    def make(net: nn.Module) -> Any:
        groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}]  # type: ignore[index]
        return steprule.AdamW(groups, state_dtype="bf16")

    after, during = model(), model()
    one, other = make(after), make(during)
    schedules = [torch.optim.lr_scheduler.StepLR(x, 1, 0.5) for x in (one, other)]
    steprule.step_in_backward(during, other)
    for number in range(4):
        if number == 2:
            again = make(during)
            again.load_state_dict(other.state_dict())
            other.load_state_dict(again.state_dict())
        backward(after, number)
        one.step()
        one.zero_grad()
        backward(during, number)
        other.step()
        for schedule in schedules:
            schedule.step()
    for p, q in zip(after.parameters(), during.parameters(), strict=True):
        assert_same(q, p, "parameters")


def test_accumulated_gradients_are_stepped_with_their_sum_and_remove_ends_it() -> None:
    after, during = model(), model()
    one, other = steprule.SGD(after.parameters(), lr=0.1), steprule.SGD(during.parameters(), lr=0.1)
    stepping = steprule.step_in_backward(during, other)
    for net in (after, during):
        with stepping.accumulate():
            backward(net, 1)
        backward(net, 2)
    one.step()
    one.zero_grad()
    for p, q in zip(after.parameters(), during.parameters(), strict=True):
        assert_same(q, p, "parameters")
    stepping.remove()
    backward(during, 3)
    assert all(p.grad is not None for p in during.parameters())


def test_only_the_gradients_of_one_layer_exist_at_a_time() -> None:
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(8)])
    steprule.step_in_backward(net, steprule.AdamW(net))
    alive: list[int] = []

    def count(param: Any) -> None:
        alive.append(sum(p.grad is not None for p in net.parameters()))

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(count)
    net(torch.ones(2, 4)).sum().backward()
    assert alive == [0] * 8


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modifiers": [steprule.GlobalNormClip(1.0)]}, "needs the gradients of several parameters at once"),
        ({"modifiers": [steprule.SAM()]}, "takes the gradients twice"),
        ({"modifiers": [steprule.Lookahead()]}, "share 'lookahead.steps', which belongs to whole steps"),
        ({"nonfinite": "skip"}, "nonfinite='skip' looks at all gradients first"),
    ],
)
def test_what_needs_all_gradients_is_refused(options: dict[str, Any], reason: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=reason):
        steprule.step_in_backward(net, steprule.AdamW(net, **options))
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def test_what_is_no_optimizer_of_ours_is_refused() -> None:
    net = model()
    with pytest.raises(TypeError, match="given Sequential and AdamW, must be a model and an optimizer"):
        steprule.step_in_backward(net, torch.optim.AdamW(net.parameters()))
