"""State in main memory. Here the parameters are there, too: the numbers are those of any step, to the bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rules import LOOPS, Case, assert_same, assert_same_run, each, flat, numbers, uses_curvature
from test_storage_runners import STORAGES, can_keep
from torch import nn

import steprule
from steprule.engine.runners import choice

pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 70), nn.Tanh(), nn.Linear(70, 64))


def backward(model: nn.Module, number: int) -> Any:
    loss = model(numbers((8, 64), torch.float32, number)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Any, steps: range, closure: bool = False) -> None:
    for number in steps:

        def evaluate(number: int = number) -> Any:
            optimizer.zero_grad()
            return backward(model, number)

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()


@pytest.mark.parametrize("storage", STORAGES)
@each(lambda case: not (case.closure or uses_curvature(case.rule)), among=LOOPS)
def test_every_rule_in_every_storage(case: Case, storage: str) -> None:
    """From the second step on, with a parameter that has no gradient in the third."""
    if not can_keep(case, storage):
        pytest.skip("the rule refuses this storage")
    dtype, options = STORAGES[storage]
    shapes = None if storage == "plain" else ((70, 90), (5,))
    made = [case.rule(case.parameters(dtype, shapes), **case.settings, **options) for _ in range(2)]
    for number in range(4):
        for optimizer in made:
            case.advance(optimizer, 1, number, without={1} if number == 2 else ())
        if number == 0:
            assert steprule.state_on_host(made[1]) is made[1]
    assert_same_run(made[1], made[0])


MAKE: dict[str, Callable[..., Any]] = {
    "sums and averages": lambda model: steprule.AdamW(
        model, modifiers=[steprule.GlobalNormClip(0.1), steprule.EMA(0.9)], nonfinite="skip"
    ),
    "int8": lambda model: steprule.AdamW(model, state_dtype="int8"),
    "matrices": steprule.Muon,
    "schedule": steprule.ScheduleFreeAdamW,
    "over all": lambda model: steprule.Prodigy(model, modifiers=[steprule.Metrics()]),
    "at the start": lambda model: steprule.SGD(model, lr=0.1, modifiers=[steprule.ToStart(0.1)]),
    "uphill": lambda model: steprule.SGD(model, lr=0.1, modifiers=[steprule.SAM(0.1)]),
    "checked": lambda model: steprule.Lion(model, nonfinite="raise", low_precision="none"),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_runs_with_checkpoints_in_both_directions(make: Callable[..., Any]) -> None:
    """State that is saved on one side continues on the other, and copies of the optimizer continue as well."""
    (one, plain), (two, host) = ((model, make(model)) for model in (network(), network()))
    steprule.state_on_host(host)
    closure = any(x is steprule.SAM for x in plain.parts.modifiers.values())
    for steps in (range(2), range(2, 4)):
        for model, optimizer in ((one, plain), (two, host)):
            train(model, optimizer, steps, closure)
        assert_same_run(host, plain)
        for optimizer in (plain, host):
            optimizer.eval()
        assert_same_run(host, plain)
        for optimizer in (plain, host):
            optimizer.train()
        assert_same_run(host, plain)
        saved = [copy.deepcopy(x.state_dict()) for x in (plain, host)]
        assert_same(saved[1], saved[0])
        host.load_state_dict(saved[0])
        plain.load_state_dict(saved[1])
        assert_same_run(host, plain)
    assert steprule.memory_report(host) == steprule.memory_report(plain)
    for copied in (copy.deepcopy((two, host)), pickle.loads(pickle.dumps((two, host)))):
        model, optimizer = copied
        assert "state in main memory" in optimizer.explain()
        again, other = copy.deepcopy((one, plain))
        train(model, optimizer, range(4, 6), closure)
        train(again, other, range(4, 6), closure)
        assert_same_run(optimizer, other)
    assert_same_run(host, plain)


def test_what_happens_to_parameters_between_steps() -> None:
    """Writes by `.data`, other dtypes and shapes, freezing, further groups, moved state, a gradient's dtype."""
    made: list[Any] = []
    for number in range(2):
        params = [nn.Parameter(numbers((30, 20), torch.float32, x)) for x in range(4)]
        optimizer = steprule.AdamW(params[:3], lr=0.1)
        if number:
            steprule.state_on_host(optimizer)
        optimizer.init_state()
        for step in range(10):
            for place, p in enumerate(params):
                dtype = p.grad_dtype or p.dtype
                p.grad = numbers((30, 20), dtype, 10 * step + place) if p.requires_grad else None
            if step == 3:
                params[0].data = params[0].data * 2
                params[1].data.mul_(2)
                optimizer.offload_state()
            elif step == 4:
                params[1].requires_grad_(False)
                params[1].grad = None
                del optimizer.state[params[1]]
                optimizer.init_state()
                assert not optimizer.state.get(params[1])
                optimizer.add_param_group({"params": params[3:], "lr": 0.01})
            elif step == 5:
                params[1].requires_grad_(True)
                optimizer.init_state()
                assert optimizer.state[params[1]]
                params[2].data, params[2].grad = params[2].data.double(), params[2].grad.double()
                del optimizer.state[params[2]]
            elif step == 6:
                params[0].data = params[0].data.t().contiguous().t()
                params[0].grad = params[0].grad.t().contiguous().t()
            elif step == 7:
                params[3].grad = None
                params[3].grad_dtype = torch.float64
                params[3].grad = numbers((30, 20), torch.float64, 5)
            elif step == 8:
                params[3].grad = None
                params[3].grad_dtype = None
            optimizer.step()
        made.append(optimizer)
    assert_same_run(made[1], made[0])
    assert flat(made[1])[0].stride() == (1, 30)


def test_other_storage_moves_parameters_before_a_step() -> None:
    """What a parameter had beside its 16 bits is rounded into them when its state is asked for."""
    made: list[Any] = []
    for number in range(2):
        param = nn.Parameter(numbers((40,), torch.bfloat16, 1))
        optimizer = steprule.AdamW([param], lr=1e-3, low_precision="master")
        if number:
            steprule.state_on_host(optimizer)
        for step in range(3):
            param.grad = numbers((40,), torch.bfloat16, step)
            optimizer.step()
        before = param.detach().clone()
        optimizer.param_groups[0]["low_precision"] = "stochastic"
        optimizer.init_state()
        assert not torch.equal(before, param)
        made.append(optimizer)
    assert_same_run(made[1], made[0])


def test_sparse_gradients_and_frozen_parameters() -> None:
    made: list[Any] = []
    for number in range(2):
        torch.manual_seed(0)
        embedding, frozen = nn.Embedding(50, 8, sparse=True), nn.Parameter(torch.ones(3), requires_grad=False)
        optimizer = steprule.SGD([frozen, embedding.weight], lr=0.1)
        if number:
            steprule.state_on_host(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            embedding(torch.tensor([1, 5, 5, step])).square().sum().backward()
            optimizer.step()
        assert frozen._version == 0
        made.append(optimizer)
    assert_same_run(made[1], made[0])


def test_parameters_without_a_shape_are_left_until_they_have_one() -> None:
    made: list[Any] = []
    for number in range(2):
        torch.manual_seed(0)
        model = nn.LazyLinear(5)
        optimizer = steprule.AdamW(model.parameters())
        if number:
            steprule.state_on_host(optimizer)
        optimizer.step()
        assert "without a shape" in optimizer.explain()
        for step in range(3):
            optimizer.zero_grad()
            model(numbers((4, 3), torch.float32, step)).square().sum().backward()
            optimizer.step()
        made.append(optimizer)
    assert_same_run(made[1], made[0])


def test_autograd_is_told_of_what_changes_and_of_nothing_else() -> None:
    model = network()
    optimizer = steprule.state_on_host(steprule.AdamW(model, nonfinite="skip"))
    stale = model(torch.ones(1, 64)).square().sum()
    backward(model, 0)
    model[0].weight.grad.fill_(torch.nan)
    before = [p._version for p in flat(optimizer)]
    optimizer.step()
    optimizer.explain()
    assert [p._version for p in flat(optimizer)] == before
    stale.backward()
    stale = model(torch.ones(1, 64)).square().sum()
    train(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_the_kernels_run_on_memory_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan for all steps, no new room, and no scaling that a gradient scaler would leave to the step."""
    model = network()
    optimizer = steprule.state_on_host(steprule.AdamW(model, fused=True, state_dtype="int8"))
    train(model, optimizer, range(1))
    with monkeypatch.context() as patch:
        patch.setattr("steprule.engine.host._room", None)
        patch.setattr("steprule.engine.runners.kernels.fused.Plan", None)
        train(model, optimizer, range(3))
    for runner in choice.RUNNERS:
        monkeypatch.setattr(type(runner), "unscales", True)
    assert not optimizer._step_supports_amp_scaling
    explained = optimizer.explain()
    assert "runner: cpu_kernel" in explained
    size = 4 * sum(p.numel() for p in flat(optimizer))
    assert f"state in main memory; steps there, {2 * size:,} bytes to it and {size:,} bytes back" in explained
    assert all(p.grad is not None and p is q for p, q in zip(flat(optimizer), model.parameters(), strict=True))


def test_a_gradient_scaler() -> None:
    made: list[Any] = []
    for number in range(2):
        model = network()
        optimizer = steprule.AdamW(model)
        if number:
            steprule.state_on_host(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model(numbers((8, 64), torch.float32, step)).square().mean()).backward()
            if step == 1:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[model[0].weight]["step"] == 3
        made.append(optimizer)
    assert_same_run(made[1], made[0])


def test_a_step_that_fails_leaves_the_parameters_in_their_places() -> None:
    model = network()
    optimizer = steprule.state_on_host(steprule.AdamW(model, nonfinite="raise"))
    train(model, optimizer, range(1))
    before = copy.deepcopy(list(model.parameters()))
    backward(model, 1)
    model[0].bias.grad.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"AdamW: .*'0\.bias'"):
        optimizer.step()
    assert_same([p.detach() for p in flat(optimizer)], [p.detach() for p in before])
    assert all(p is q for p, q in zip(flat(optimizer), model.parameters(), strict=True))
    assert set(optimizer.state) == set(model.parameters())
    with torch.inference_mode():
        frozen = nn.Parameter(torch.ones(3))
        frozen.grad = torch.ones(3)
    of_frozen = steprule.state_on_host(steprule.SGD([frozen], lr=0.1))
    with pytest.raises(RuntimeError, match="SGD: parameter 0 cannot be written in place"):
        of_frozen.step()


def test_inside_of_inference_mode() -> None:
    made = [steprule.AdamW([nn.Parameter(torch.ones(5))]) for _ in range(2)]
    steprule.state_on_host(made[1])
    for optimizer in made:
        for step in range(2):
            flat(optimizer)[0].grad = torch.full((5,), 1.0 + step)
            with torch.inference_mode():
                optimizer.step()
    assert_same_run(made[1], made[0])


def test_what_cannot_be_stepped_in_main_memory() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"state_on_host: given AdamW, must be an optimizer of steprule"):
        steprule.state_on_host(torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match="given LBFGS"):
        steprule.state_on_host(steprule.LBFGS(model.parameters()))
    elsewhere = torch.ones((), device="meta")
    base = torch.ones(8)
    overlapping = [nn.Parameter(base[:5]), nn.Parameter(base[3:])]
    refused: list[tuple[Any, str]] = [
        (steprule.AdaHessian(model), r"AdaHessian \(parameter group 0\).*estimates of the curvature"),
        (steprule.AdamW(model, capturable=True), "capturable=True, and a CUDA graph cannot record"),
        (steprule.SGD(model, lr=0.1, differentiable=True), "Pass differentiable=False"),
        (steprule.SGD(overlapping, lr=0.1), "parameters overlap in memory"),
    ]
    for optimizer, message in refused:
        with pytest.raises(ValueError, match=message):
            steprule.state_on_host(optimizer)
        assert optimizer.elsewhere is None
    optimizer = steprule.state_on_host(steprule.AdamW(model))
    with pytest.raises(ValueError, match="it is in main memory already"):
        steprule.state_on_host(optimizer)
    with pytest.raises(ValueError, match=r"parameter group 1\).*estimates of the curvature"):
        optimizer.add_param_group({"params": [("more", nn.Parameter(base))], "rule": steprule.AdaHessian})
    assert len(optimizer.param_groups) == 1
    backward(model, 0)
    for key, value, message in (
        ("capturable", True, "Pass capturable=False"),
        ("lr", elsewhere, "lr is a tensor on a device. Pass lr as a number"),
    ):
        before = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        optimizer.param_groups[0][key] = before
    optimizer.step()
