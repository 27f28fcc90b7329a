"""Steps during the backward pass: the numbers of `step()`, and gradients that are freed as they are used."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import threading
import time
from typing import Any

import pytest
import torch
from rules import LOOPS, Case, assert_same, each, flat, numbers, uses_curvature
from torch import nn

import steprule
from steprule.engine import host
from steprule.engine.composition import Composition
from steprule.engine.in_backward import SomeParameters


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
    for on_host in (False, True)[: 1 if uses_curvature(case.rule) else 2]:
        after, during = model(), model()
        one, other = case.make(after.parameters()), case.make(during.parameters())
        if on_host:
            steprule.state_on_host(other)
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


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("kept", ["bf16", "int8"])
def test_schedules_storage_groups_and_checkpoints_stay_as_they_are(kept: str, on_host: bool) -> None:
    def make(net: nn.Module) -> Any:
        groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}]  # type: ignore[index]
        return steprule.AdamW(groups, state_dtype=kept)

    after, during = model(), model()
    one, other = make(after), make(during)
    if on_host:
        steprule.state_on_host(other)
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


def stepping_on_host(lr: float = 0.1) -> tuple[Any, Any]:
    net = model()
    optimizer = steprule.state_on_host(steprule.SGD(net.named_parameters(), lr=lr, momentum=0.9))
    steprule.step_in_backward(net, optimizer)
    return net, optimizer


def test_state_in_main_memory_is_stepped_while_the_backward_pass_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "PORTION", 1)
    net, optimizer = stepping_on_host()
    moved, seen, steps = threading.Event(), list[Any](), SomeParameters.take_step_with

    def take_step_with(*given: Any) -> None:
        steps(*given)
        seen.append(threading.current_thread())
        moved.set()

    monkeypatch.setattr(SomeParameters, "take_step_with", take_step_with)
    net[0].weight.register_hook(lambda gradient: seen.append(moved.wait(60)))
    before = net[2].weight._version
    backward(net, 0)
    assert True in seen
    assert threading.main_thread() not in seen
    assert net[2].weight._version > before
    # Without gradients, there is nothing to copy.
    monkeypatch.setattr(host.OnHost, "_fetch_one", None)
    optimizer.step()


def test_a_step_that_fails_beside_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters after it are not stepped, it has not moved, and the next pass steps all again."""
    monkeypatch.setattr(host, "PORTION", 1)
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizer = steprule.state_on_host(steprule.AdamW(net.named_parameters()))
    steprule.step_in_backward(net, optimizer)

    def run(sparse: bool) -> None:
        net[0].sparse = sparse
        # The backward pass begins with what is computed last.
        later = net[1](torch.ones(2, 4))
        net[2](later + net[0](torch.tensor([1, 3]))).square().sum().backward()

    run(sparse=False)
    before, state = [p.detach().clone() for p in flat(optimizer)], copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        RuntimeError, match=r"AdamW needs dense gradients, got a sparse one for '0\.weight'"
    ) as failed:
        run(sparse=True)
    assert_same(net[0].weight.detach(), before[0])
    assert_same(optimizer.state_dict()["state"][0], state["state"][0])
    assert [optimizer.state[layer.weight]["step"] for layer in net] == [1, 1, 2]

    # The thread may be the one that collects what is left of the error.
    cycle: list[Any] = [failed]
    cycle.append(cycle)
    del failed, cycle
    steps = SomeParameters.take_step_with
    monkeypatch.setattr(SomeParameters, "take_step_with", lambda *given: (gc.collect(), steps(*given)))
    run(sparse=False)
    assert [optimizer.state[layer.weight]["step"] for layer in net] == [2, 2, 3]


def test_what_is_begun_is_complete_when_a_backward_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = stepping_on_host()
    steps = SomeParameters.take_step_with
    monkeypatch.setattr(SomeParameters, "take_step_with", lambda *given: (time.sleep(0.2), steps(*given)))
    before, version = net[2].weight.detach().clone(), net[2].weight._version
    # What reads a parameter after its step has begun is to fail, whether it has moved by then or not.
    handle = net[0].weight.register_hook(lambda gradient: 1 / (net[2].weight._version == version))
    with pytest.raises(ZeroDivisionError):
        backward(net, 0)
    assert not torch.equal(net[2].weight, before)
    assert len(optimizer.state[net[2].weight]) == 1
    handle.remove()
    backward(net, 0)
    assert len(optimizer.state) == 4


def test_parameters_are_stepped_in_portions_whichever_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is a portion; the one that gets its gradients in part is stepped in part."""
    monkeypatch.setattr(host, "PORTION", 24)

    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        net = nn.ModuleList([nn.Linear(4, 6) for _ in range(3)])
        return net, steprule.state_on_host(steprule.AdamW(net.named_parameters(), lr=0.1))

    def run(net: Any, number: int) -> None:
        x = numbers((2, 4), torch.float32, number)
        layers = net if number != 2 else [net[0]]
        found = sum(layer(x).square().sum() for layer in layers)
        # Of the last layer, only the bias.
        (found + net[2].bias.sum()).backward()

    (after, one), (during, other) = make(), make()
    steprule.step_in_backward(during, other)
    taken, steps = list[int](), SomeParameters.take_step_with
    monkeypatch.setattr(
        SomeParameters, "take_step_with", lambda self, *x: (taken.append(len(x[0])), steps(self, *x))
    )
    for number in range(5):
        run(after, number)
        one.step()
        one.zero_grad()
        run(during, number)
    assert sorted(taken) == [1] + [2] * 13
    for p, q in zip(flat(one), flat(other), strict=True):
        assert_same(q.detach(), p.detach())
        assert_same(other.state[q], one.state[p])
    # A parameter that has left the groups is left alone.
    other.param_groups[0]["params"].remove(during[0].weight)
    del other.param_groups[0]["param_names"]
    before = [p.detach().clone() for p in during[0].parameters()]
    run(during, 9)
    assert [torch.equal(p, q) for p, q in zip(during[0].parameters(), before, strict=True)] == [True, False]


def test_stale_graphs_and_further_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that reads what a step is about to change fails; a forked process has a thread of its own."""
    net, optimizer = stepping_on_host()
    stale = net(torch.ones(1, 6)).square().sum()
    backward(net, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    before = net[0].weight.detach().clone()
    child = multiprocessing.get_context("fork").Process(target=backward, args=(net, 0))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert_same(net[0].weight.detach(), before)
    again = copy.deepcopy((net, optimizer))
    steprule.step_in_backward(*again)
    for one in (net, again[0]):
        backward(one, 1)
    assert_same([p.detach() for p in flat(again[1])], [p.detach() for p in flat(optimizer)])


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


def test_gradients_that_are_averaged_later_are_not_used() -> None:
    net = model()
    replica = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    nn.Module.__init__(replica)
    replica.module = net
    with pytest.raises(
        ValueError, match="DistributedDataParallel averages gradients over processes afterwards"
    ):
        steprule.step_in_backward(nn.Sequential(replica), steprule.AdamW(net))
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def test_what_is_no_optimizer_of_ours_is_refused() -> None:
    net = model()
    with pytest.raises(TypeError, match="given Sequential and AdamW, must be a model and an optimizer"):
        steprule.step_in_backward(net, torch.optim.AdamW(net.parameters()))
