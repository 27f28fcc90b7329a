"""Steps on a GPU, by `step()`; test_gpu_kernel tests what the kernels compute without a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu import DTYPES, INTERPRETED, assert_close_numbers, assert_same_numbers, give, parameters
from kernels import exact_roots, has_angles, has_kernel
from rules import LOOPS, Case, each, flat
from torch import nn

import steprule
from steprule.engine import plans
from steprule.engine.runners.kernels import fused
from steprule.engine.runners.kernels.gpu import launch as gpu_launch

pytestmark = [
    pytest.mark.gpu,
    # Half precision hardly learns, and is meant here.
    pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*rounded to 0:UserWarning"),
    # What torch says of its own tools.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning"),
    pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device, and Triton's compiler"),
]
SHAPES = ((), (1,), (0,), (97,), (2, 3, 5, 7), (gpu_launch.CHUNK + 1,), (2 * gpu_launch.CHUNK + 5,))
CUDA = torch.device("cuda:0")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@exact_roots()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(has_kernel, among=LOOPS)
def test_every_rule_equals_the_loop_on_the_cpu_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    """Products of matrices, rows of stacks and angles in double are rounded in another order."""
    given = case.rule(parameters(SHAPES, dtype), **case.options)
    loop = case.rule(parameters(SHAPES, dtype, "cpu"), **case.options)
    loop.param_groups[0]["foreach"] = False
    for step in range(4):
        for optimizer in (given, loop):
            give(optimizer, step)
            case.prepare(optimizer)
            optimizer.step()
    assert "runner: gpu_kernel" in given.explain()
    left = fused.reasons(given, given.param_groups[0])
    assert all("stack of matrices" in reason for reason in left.values())
    if case.rule.on_matrices or left or (has_angles(case) and dtype == torch.float64):
        assert_close_numbers(given, loop, TOLERANCE[dtype])
    else:
        assert_same_numbers(given, loop)


def test_a_step_is_one_launch_and_a_schedule_compiles_nothing() -> None:
    optimizer = steprule.AdamW(parameters(SHAPES, torch.float32))
    give(optimizer, 0)
    optimizer.step()
    (plan,) = plans.of(optimizer).plans.values()
    (kernel,) = (x.kernel for x in plan.batches[0].launch._kernels)
    before = sum(len(entry[0]) for entry in kernel.device_caches.values())
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for lr in (0.1, 0.2, 0.3):
            optimizer.param_groups[0].update(lr=lr, betas=(0.9 - lr, 0.99), weight_decay=lr)
            optimizer.step()
        torch.cuda.synchronize()
    started = [event.name for event in profile.events() if event.name == "kernel"]
    assert len(started) == 3
    assert sum(len(entry[0]) for entry in kernel.device_caches.values()) == before


def test_a_step_waits_for_nothing_and_allocates_next_to_nothing() -> None:
    for options in ({}, {"fused": True}, {"capturable": True}):
        params = [nn.Parameter(torch.ones(1 << 20, device=CUDA)) for _ in range(4)]
        optimizer = steprule.AdamW(params, **options)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("rule", [steprule.AdamW, steprule.NAdam, steprule.RAdam, steprule.SGD])
def test_a_captured_step_is_replayed_with_a_new_lr_and_a_new_count(rule: Any) -> None:
    switch = {"fused": True} if rule is steprule.SGD else {"capturable": True}
    lr = torch.tensor(0.01, dtype=torch.float64, device=CUDA)
    captured = rule(parameters(SHAPES, torch.float32), lr=lr, **switch)
    eager = rule(parameters(SHAPES, torch.float32), lr=0.01)
    for optimizer in (captured, eager):
        give(optimizer, 0)
    static = [p.grad for p in flat(captured)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 4):
        lr.fill_(0.01 / step)
        eager.param_groups[0]["lr"] = 0.01 / step
        give(eager, step)
        for kept, fresh in zip(static, (p.grad for p in flat(eager)), strict=True):
            kept.copy_(fresh)
        graph.replay()
        eager.step()
    for one, other in zip(flat(captured), flat(eager), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert captured.state[one].get("step", 6) == 6
    give(captured, 9)  # an eager step between replays has its own table of addresses
    give(eager, 9)
    captured.step()
    eager.step()
    graph.replay()
    for kept, param in zip(static, flat(eager), strict=True):
        param.grad = kept.clone()
    eager.step()
    for one, other in zip(flat(captured), flat(eager), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_without_capturable_is_refused() -> None:
    optimizer = steprule.AdamW(parameters(SHAPES, torch.float32))
    give(optimizer, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("rule", [steprule.AdamW, steprule.NAdam, steprule.Lion, steprule.ASGD])
def test_a_gradient_scaler_with_forced_infinities(rule: Any, options: dict[str, Any]) -> None:
    given = rule(parameters(SHAPES, torch.float32), **options)
    wanted = rule(parameters(SHAPES, torch.float32))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    assert given._step_supports_amp_scaling == bool(options)
    for step in range(6):
        scale = scaler.get_scale() if step else 2.0**10
        scaler.scale(torch.zeros((), device=CUDA))
        give(given, step, scale)
        if step in (0, 3):
            flat(given)[3].grad[5] = math.inf if step else math.nan
        else:
            give(wanted, step)
            wanted.step()
        scaler.step(given)
        scaler.update()
    assert scaler.get_scale() == 2.0**8
    for one, other in zip(flat(given), flat(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert given.state[one].get("step", 4) == 4


HOST = {
    "plain": (torch.float32, {}),
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "master": (torch.bfloat16, {"low_precision": "master", "state_dtype": "bf16"}),
    "clipped": (torch.float32, {"modifiers": [steprule.GlobalNormClip(0.1)], "nonfinite": "skip"}),
}


@pytest.mark.parametrize("kept", HOST)
@pytest.mark.parametrize("rule", [steprule.AdamW, steprule.Lion, steprule.NAdam])
def test_state_in_main_memory(rule: Any, kept: str) -> None:
    """The numbers of the same step on the CPU, also of state that was on the GPU meanwhile."""
    dtype, options = HOST[kept]
    given = steprule.state_on_host(rule(parameters(SHAPES, dtype), **options))
    wanted = rule(parameters(SHAPES, dtype, "cpu"), **options)
    for step in range(4):
        for optimizer in (given, wanted):
            give(optimizer, step)
            if step == 2:
                flat(optimizer)[3].grad = None
            optimizer.step()
    assert_same_numbers(given, wanted)
    assert all(x.is_cpu for state in given.state.values() for x in state.values())
    assert all(x.pinned for x in given.elsewhere._twins.values())
    assert "runner: cpu_kernel" in given.explain()
    there = rule(parameters(SHAPES, dtype), **options)
    there.load_state_dict(given.state_dict())
    given.load_state_dict(there.state_dict())
    given.offload_state()
    for optimizer in (given, wanted):
        give(optimizer, 5)
        optimizer.step()
    assert_same_numbers(given, wanted)
    assert all(x.is_cpu for state in given.state.values() for x in state.values())


@pytest.mark.parametrize("kept", ["plain", "int8", "master"])
def test_state_in_main_memory_is_stepped_beside_the_backward_pass(kept: str) -> None:
    """On streams of the caller's own, too, where gradients are freed before they are copied."""
    dtype, options = HOST[kept]
    model = nn.ParameterList(parameters(SHAPES, dtype))
    given = steprule.state_on_host(steprule.AdamW(model, **options))
    wanted = steprule.AdamW(parameters(SHAPES, dtype, "cpu"), **options)
    steprule.step_in_backward(model, given)
    for step in range(4):
        give(wanted, step)
        wanted.step()
        with torch.cuda.stream(torch.cuda.Stream()):
            pairs = zip(flat(given), flat(wanted), strict=True)
            loss: Any = sum((p * q.grad.to(CUDA)).sum() for p, q in pairs)
            loss.backward()
        assert all(p.grad is None for p in flat(given))
    assert_same_numbers(given, wanted)
    assert all(x.is_cpu for state in given.state.values() for x in state.values())


def test_state_in_main_memory_takes_none_on_the_gpu() -> None:
    params = [nn.Parameter(torch.ones(1 << 20, device=CUDA)) for _ in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = steprule.state_on_host(steprule.AdamW(params))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


def test_state_in_main_memory_with_a_gradient_scaler() -> None:
    """The scaler unscales on the GPU, also with fused=True."""
    given = steprule.state_on_host(steprule.AdamW(parameters(SHAPES, torch.float32), fused=True))
    wanted = steprule.AdamW(parameters(SHAPES, torch.float32, "cpu"))
    assert not given._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for step in range(3):
        scale = scaler.get_scale() if step else 2.0**10
        scaler.scale(torch.zeros((), device=CUDA))
        give(given, step, scale)
        if step == 1:
            flat(given)[3].grad[5] = math.inf
        else:
            give(wanted, step)
            wanted.step()
        scaler.step(given)
        scaler.update()
    assert_same_numbers(given, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_group_on_two_devices() -> None:
    params = [nn.Parameter(torch.ones(99, device=f"cuda:{i % 2}")) for i in range(4)]
    for param in params:
        param.grad = torch.ones_like(param)
    steprule.SGD(params, lr=0.5).step()
    assert all((param == 0.5).all() for param in params)
