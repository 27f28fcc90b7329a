"""Fused steps on real tensors: any layout, anything that changes between steps, threads."""

from __future__ import annotations

import copy
import ctypes
import gc
import re
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEFAULT, FUSED, LOOP, assert_same_numbers, both, exact_roots
from rules import Case, assert_same, flat, numbers
from torch import Tensor, nn

import steprule
from steprule import Elementwise, hyper
from steprule.engine.runners.kernels import cache as kernel_cache
from steprule.engine.runners.kernels import fused
from steprule.engine.runners.kernels.cpu import threads as cpu_threads

pytest.importorskip("llvmlite", reason="the kernels are compiled by it")

# Memory


def strided(shape: tuple[int, ...]) -> Tensor:
    """Every second element of a larger tensor."""
    return numbers((*shape[:-1], 2 * shape[-1]), torch.float32, 5)[..., ::2]


LAYOUTS = {
    "channels last": lambda: numbers((4, 3, 5, 6), torch.float32, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: numbers((31, 17), torch.float32, 5).t(),
    "strided": lambda: strided((9, 11)),
}


@exact_roots()
@pytest.mark.parametrize("gradients", ["alike", "contiguous"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_in_any_order(layout: str, gradients: str) -> None:
    """Dense in another order is fine; the rest goes to the loop, by name, and no other memory is written."""
    made: list[Any] = []
    for switches in (LOOP, DEFAULT):
        param = nn.Parameter(LAYOUTS[layout]())
        optimizer = steprule.AdamW([("odd", param), ("even", nn.Parameter(torch.ones(3)))], **switches)
        for step in range(3):
            gradient = numbers(tuple(param.shape), torch.float32, 50 + step)
            param.grad = torch.empty_like(param).copy_(gradient) if gradients == "alike" else gradient
            flat(optimizer)[1].grad = torch.ones(3)
            optimizer.step()
        made.append(optimizer)
    assert_same_numbers(*made)
    if layout == "strided":
        assert_same(*(flat(x)[0].detach()._base for x in made), "what the parameter is a view of")
    dense = layout != "strided" and gradients == "alike"
    assert ("'odd' by the reference" in made[1].explain()) == (not dense)


def test_sums_over_memory_in_any_order() -> None:
    """Sums go by neighbours in memory, in the kernel and in the loop."""
    rules: list[Any] = [lambda *x, **y: steprule.LAMB(*x, **y)]
    rules += [lambda *x, **y: steprule.AdamW(*x, modifiers=[steprule.GlobalNormClip(0.1)], **y)]
    with exact_roots():
        for rule in rules:
            made: list[Any] = []
            for switches in (FUSED, LOOP):
                wide = numbers((300, 200), torch.float64, 1).t()
                last = numbers((8, 30, 7, 7), torch.float64, 2).contiguous(memory_format=torch.channels_last)
                optimizer = rule([nn.Parameter(wide), nn.Parameter(last)], **switches)
                for number in range(3):
                    for place, param in enumerate(flat(optimizer)):
                        values = numbers(param.shape, torch.float64, 2 * number + place)
                        param.grad = torch.empty_like(param).copy_(values * 10 ** values.sin())
                    optimizer.step()
                made.append(optimizer)
            assert "reference" not in made[0].explain()
            assert_same_numbers(*made)


@pytest.mark.parametrize("runner", [DEFAULT, {"foreach": True}], ids=str)
def test_parameters_that_overlap_are_stepped_in_turn(runner: dict[str, Any]) -> None:
    made: list[Any] = []
    for switches in (LOOP, runner):
        whole = numbers((100,), torch.float32, 1)
        params = [nn.Parameter(x) for x in (whole[10:20], whole, whole[30:40], torch.ones(2))]
        for place, param in enumerate(params):
            param.grad = numbers(tuple(param.shape), torch.float32, place)
        optimizer = steprule.SGD(params, lr=0.25, weight_decay=0.5, **switches)
        optimizer.step()
        made.append(optimizer)
    assert_same_numbers(*made)
    assert made[1].explain().count("shares memory") == (3 if runner is DEFAULT else 0)


def test_asking_for_the_kernel_by_name_raises_where_it_cannot_run() -> None:
    param = nn.Parameter(strided((4, 4)))
    param.grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"Adam: fused=True is not available: .*: its gradient has another"):
        steprule.Adam([param], fused=True).step()


def test_a_kernel_that_cannot_be_made_leaves_the_work_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, text: str) -> Any:
        raise ImportError("llvmlite needs another Python")

    monkeypatch.setattr(kernel_cache, "_loaded", {})
    monkeypatch.setattr(kernel_cache, "_obtain", fail)
    kernel, loop = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    kernel.grad = loop.grad = torch.ones(5)
    optimizer = steprule.Adam([kernel])
    optimizer.step()
    steprule.Adam([loop], **LOOP).step()
    assert_same(kernel.detach(), loop.detach())
    assert "llvmlite needs another Python" in optimizer.explain()
    with pytest.raises(RuntimeError, match="llvmlite needs another Python"):
        steprule.Adam([kernel], fused=True).step()


def test_the_gradient_is_not_written_and_the_tape_hears_of_the_step() -> None:
    param = nn.Parameter(torch.ones(5))
    param.grad = torch.linspace(-1, 1, 5)
    optimizer = steprule.SGD([param], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, **FUSED)
    stale = (param**2).sum()
    optimizer.step()
    assert_same(param.grad, torch.linspace(-1, 1, 5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_a_step_allocates_next_to_nothing() -> None:
    params = [nn.Parameter(torch.ones(1 << 20)) for _ in range(4)]
    optimizer = steprule.AdamW(params, **FUSED)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    gc.collect()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        tracemalloc.start()
        optimizer.step()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert peak + allocated < 1 << 20


# What makes a plan invalid


def swap_gradients(optimizer: Any) -> None:
    for param in flat(optimizer):
        param.grad = None if param.grad is None else param.grad.clone()


def drop_a_gradient(optimizer: Any) -> None:
    flat(optimizer)[1].grad = None


def reload(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def replace_a_slot(optimizer: Any) -> None:
    state = optimizer.state[flat(optimizer)[0]]
    if "exp_avg" in state:
        state["exp_avg"] = state["exp_avg"] * 2


def move_a_slot(optimizer: Any) -> None:
    state = optimizer.state[flat(optimizer)[0]]
    if "exp_avg" in state:
        state["exp_avg"].data = state["exp_avg"] * 3


def rewind_a_count(optimizer: Any) -> None:
    state = optimizer.state[flat(optimizer)[2]]
    if "step" in state:
        state["step"].fill_(1)


def move_a_parameter(optimizer: Any) -> None:
    param = flat(optimizer)[0]
    param.data = param.data * 2


def turn_a_parameter(optimizer: Any) -> None:
    """Other dimensions, other memory, the same object."""
    param = flat(optimizer)[1]
    param.data = param.data.reshape(param.shape[::-1]).clone()
    param.grad = None
    optimizer.state.pop(param, None)


def swap_a_parameter(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    old = group["params"][2]
    group["params"][2] = new = nn.Parameter(old.detach() + 1)
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def widen_a_parameter(optimizer: Any) -> None:
    param = flat(optimizer)[2]
    param.grad = None
    param.data = param.data.double()
    for key, value in optimizer.state[param].items():
        optimizer.state[param][key] = value.double() if value.dim() else value


def add_a_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.linspace(0, 1, 7))], "lr": 0.5})


def change_lr(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def decay(optimizer: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1


def tensor_lr(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def turn_a_gradient(optimizer: Any) -> None:
    """The same values in another order in memory, and back again at the next step."""
    param = flat(optimizer)[1]
    if param.grad is not None:
        param.grad = param.grad.t().contiguous().t()


def narrow_a_gradient(optimizer: Any) -> None:
    param = flat(optimizer)[0]
    if param.grad is not None:
        param.grad.data = param.grad.data.to(torch.bfloat16)


EVENTS = [
    narrow_a_gradient,
    swap_gradients,
    drop_a_gradient,
    reload,
    replace_a_slot,
    move_a_slot,
    rewind_a_count,
    move_a_parameter,
    turn_a_parameter,
    swap_a_parameter,
    widen_a_parameter,
    add_a_group,
    change_lr,
    decay,
    tensor_lr,
    turn_a_gradient,
]


def assert_equal_through(events: Any, rule: Any) -> None:
    optimizers: list[Any] = []
    for switches in (LOOP, DEFAULT):
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((5,), (4, 6), (33,))]
        optimizers.append(rule(params, lr=0.1, **switches))
    for step, event in enumerate(events):
        for optimizer in optimizers:
            for place, param in enumerate(flat(optimizer)):
                param.grad = numbers(tuple(param.shape), param.dtype, 100 * step + place)
            event(optimizer)
            optimizer.step()
    assert_same_numbers(*reversed(optimizers))


@exact_roots()
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("rule", [steprule.NAdam, steprule.Adagrad])
def test_nothing_remembered_survives(rule: Any, event: Any) -> None:
    assert_equal_through([change_lr, event, change_lr, event, swap_gradients], rule)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(EVENTS), min_size=2, max_size=8))
def test_nothing_remembered_survives_any_sequence(events: Any) -> None:
    with exact_roots():
        assert_equal_through(events, steprule.NAdam)


def test_a_gradient_that_changes_its_form_between_steps() -> None:
    """Dense, then sparse, then dense; and one that does not fit its parameter is refused, not read."""
    made: list[Any] = []
    for switches in (LOOP, DEFAULT):
        params = [nn.Parameter(numbers((6, 4), torch.float32, i)) for i in range(2)]
        optimizer = steprule.SGD(params, lr=0.1, momentum=0.9, **switches)
        for step in range(5):
            for place, param in enumerate(params):
                gradient = numbers((6, 4), torch.float32, 10 * step + place)
                param.grad = gradient.to_sparse(1) if step % 2 and place else gradient
            optimizer.step()
        made.append(optimizer)
    assert_same_numbers(*made)
    param.grad = torch.ones(6, 4)
    param.grad.data = torch.ones(5)
    with pytest.raises(RuntimeError, match="size"):
        made[1].step()


def test_what_was_refused_is_taken_once_it_fits() -> None:
    param = nn.Parameter(numbers((4, 6), torch.float32, 1))
    optimizer = steprule.Adam([param], **DEFAULT)
    group = optimizer.param_groups[0]
    for gradient, refused in ((torch.ones(6, 4).t(), True), (torch.ones(4, 6), False)):
        param.grad = gradient
        optimizer.step()
        assert bool(fused.reasons(optimizer, group)) == refused


@exact_roots()
def test_parameters_that_joined_late_have_their_own_count() -> None:
    case = Case(steprule.NAdam)
    kernel, loop = both(case, torch.float32, ((5,), (4, 3), (7,)))
    for optimizer in (kernel, loop):
        case.advance(optimizer, 3, without={1})
        case.advance(optimizer, 2, first=3)
        case.advance(optimizer, 2, first=5, without={0})
    assert_same_numbers(kernel, loop)


class Late(Elementwise):
    """A rule that shows the count it was given.

    When: the tests look at the largest count.

        θ ← θ - (t - 2²⁴)

    State: none.
    Source: none.
    """

    lr: float = hyper(1.0)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -(t - 2.0**24) * g


def test_counts_keep_their_own_precision() -> None:
    """A count in single precision stops at the largest whole number that it can represent exactly."""
    made: list[Any] = []
    for switches in (FUSED, LOOP):
        param = nn.Parameter(torch.zeros(3))
        param.grad = torch.ones(3)
        optimizer = Late([param], **switches)
        optimizer.init_state()
        optimizer.state[param]["step"].fill_(2.0**24 - 1)
        for _ in range(3):
            optimizer.step()
        made.append(optimizer)
    assert (flat(made[0])[0] == 0).all()
    assert_same_numbers(*made)


def test_a_count_that_no_table_holds_is_left_to_the_loop() -> None:
    param = nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = steprule.Adam([param], **DEFAULT)
    optimizer.init_state()
    optimizer.state[param]["step"] = torch.tensor(3)
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 4
    assert "its state 'step' is not a single float32 or float64" in optimizer.explain()


def test_a_step_that_fails_counts_nothing() -> None:
    param = nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = steprule.Adam([param], **FUSED)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["betas"] = (1.0, 0.999)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 1
    assert_same(param.detach(), before)


@exact_roots()
def test_a_copy_goes_its_own_way() -> None:
    case = Case(steprule.AdamW)
    kernel, loop = both(case, torch.float32, ((5,), (4, 3)))
    for optimizer in (kernel, loop):
        case.advance(optimizer, 2)
    twin = copy.deepcopy(kernel)
    case.advance(twin, 2, first=9)
    case.advance(kernel, 1, first=2)
    case.advance(loop, 1, first=2)
    assert_same_numbers(kernel, loop)


def test_no_gradient_is_kept_alive() -> None:
    param = nn.Parameter(torch.ones(10))
    optimizer = steprule.AdamW([param], **FUSED)
    param.grad = torch.ones(10)
    alive = torch.multiprocessing.reductions.StorageWeakRef(param.grad.untyped_storage())
    optimizer.step()
    optimizer.zero_grad()
    assert alive.expired()


# Threads


def test_the_number_of_threads_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    library = cpu_threads.openmp()
    if library is None:
        pytest.skip("no OpenMP library shared with torch")

    def parallel(kernel: int, job: int, number: int, flags: int) -> None:
        place = cpu_threads.Job.shares.offset
        asked.append((number, ctypes.c_int64.from_address(job + place).value))
        library.parallel(kernel, job, number, flags)

    monkeypatch.setattr(cpu_threads, "openmp", lambda: library._replace(parallel=parallel))
    before = torch.get_num_threads()
    param = nn.Parameter(torch.ones(1 << 20))
    param.grad = torch.ones_like(param)
    optimizer = steprule.Lion([param], lr=0.5, **FUSED)
    try:
        for count in (2, 3, 1, 4):
            torch.set_num_threads(count)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert asked == [(2, 2), (3, 3), (4, 4)], "as many shares of the work as threads"
    assert (param == -1).all()


def test_optimizers_in_several_threads_at_once() -> None:
    wanted = nn.Parameter(numbers((100_003,), torch.float32, 1))
    mine = [nn.Parameter(wanted.detach().clone()) for _ in range(4)]

    def train(param: nn.Parameter) -> None:
        optimizer = steprule.AdamW([param], **FUSED)
        for step in range(10):
            param.grad = numbers((100_003,), torch.float32, step)
            optimizer.step()

    threads = [threading.Thread(target=train, args=(param,)) for param in mine]
    for thread in threads:
        thread.start()
    train(wanted)
    for thread in threads:
        thread.join()
    assert_same([x.detach() for x in mine], [wanted.detach()] * len(mine))


def test_one_optimizer_in_several_threads_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []
    together: list[int] = []
    run = fused.Batch.step

    def watched(self: fused.Batch, values: Any) -> None:
        inside.append(1)
        together.append(len(inside))
        time.sleep(1e-3)
        run(self, values)
        inside.pop()

    monkeypatch.setattr(fused.Batch, "step", watched)
    param = nn.Parameter(torch.zeros(200_000))
    param.grad = torch.ones_like(param)
    optimizer = steprule.Lion([param], lr=1.0, **FUSED)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(10)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 30
    assert (param == -30).all()


# What explain tells


def test_explain_says_where_the_kernel_can_be_read_and_why_it_runs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(steprule.AdamW)
    optimizer = case.make(**FUSED)
    assert "kernel:" not in optimizer.explain()
    case.advance(optimizer)
    (file,) = re.findall(r"kernel: (.*\.py)$", optimizer.explain(), re.MULTILINE)
    assert "def kernel(job):" in Path(file).read_text(encoding="utf-8")
    monkeypatch.setattr(cpu_threads, "alone", lambda: "it rains")
    assert "on the calling thread alone: it rains" in optimizer.explain()
