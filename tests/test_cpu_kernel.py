"""The fused CPU kernels: the reference's numbers to the last bit, whatever the tensors are like.

ATen's roots are up to one unit off in the last place; a kernel's are correctly rounded. So where it matters the
reference is given correctly rounded roots here, and nothing at all is left to a tolerance.
"""

from __future__ import annotations

import copy
import gc
import math
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import LOOPS, Case, assert_same, each, flat, numbers
from torch import Tensor, nn

import steprule
from steprule import Elementwise, hyper, slot
from steprule.engine import cpu_launch, cpu_threads, fused, kernel_cache, reference
from steprule.words import clamp, exp, larger, largest, lerp, log, mean, norm, sign, smaller, sqrt, where

pytest.importorskip("numba", reason="the kernels are compiled by it")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# 0-dim, one, none, primes, over one chunk, over two and a bit, many dimensions.
SHAPES = ((), (1,), (0,), (3,), (97,), (2, 3, 5, 7), (cpu_launch.CHUNK + 1,), (2 * cpu_launch.CHUNK + 5,))
FUSED: dict[str, Any] = {"fused": True, "foreach": None}
LOOP: dict[str, Any] = {"fused": None, "foreach": False}


def has_kernel(case: Case) -> bool:
    return getattr(case.rule, "traced", False) and not case.sparse_only


def root(x: Tensor) -> Tensor:
    """The correctly rounded root, which IEEE 754 asks of the processor and numpy uses."""
    return torch.as_tensor(np.sqrt(x.detach().numpy()))


@pytest.fixture
def exact_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.WORDS, "sqrt", root)


def assert_same_numbers(given: Any, wanted: Any) -> None:
    """The same parameters and state to the last bit, where any NaN is as good as another."""
    for place, (one, other) in enumerate(zip(flat(given), flat(wanted), strict=True)):
        pairs = {"parameter": (one.detach(), other.detach())}
        assert set(given.state[one]) == set(wanted.state[other])
        pairs |= {key: (given.state[one][key], wanted.state[other][key]) for key in wanted.state[other]}
        for name, pair in pairs.items():
            clean = (torch.where(x.isnan(), torch.full_like(x, math.nan), x) for x in pair)
            assert_same(*clean, f"{name} {place}")


def both(case: Case, dtype: torch.dtype, shapes: Any = SHAPES) -> tuple[Any, Any]:
    """The same optimizer twice: one by kernels, one by the loop that they must equal."""
    kernel = case.make(case.parameters(dtype, shapes), **FUSED)
    return kernel, case.make(case.parameters(dtype, shapes), **LOOP)


@pytest.mark.usefixtures("exact_roots")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(has_kernel, among=LOOPS)
def test_every_rule_equals_the_loop_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    kernel, loop = both(case, dtype)
    case.advance(kernel, 4)
    case.advance(loop, 4)
    assert_same_numbers(kernel, loop)
    assert fused.reasons(kernel, kernel.param_groups[0]) == {}


@each(has_kernel, among=LOOPS)
def test_only_what_a_root_touches_may_differ_from_torchs_own_operations(case: Case) -> None:
    """Two units in the last place of the largest number at hand, from equal states."""
    kernel, loop = both(case, torch.float32, ((4099,),))
    for number in range(4):
        old = flat(loop)[0].detach().clone()
        case.advance(kernel, 1, number)
        case.advance(loop, 1, number)
        mine, theirs = flat(kernel)[0].detach(), flat(loop)[0].detach()
        largest_operand = torch.stack([mine.abs(), old.abs(), (theirs - old).abs()]).amax(0)
        unit = torch.exp2(torch.floor(torch.log2(largest_operand))) * torch.finfo(torch.float32).eps
        if case.name not in INEXACT:
            assert ((mine - theirs).abs() <= 2 * unit).all()
        with torch.no_grad():
            mine.copy_(theirs)
            for key, value in loop.state[flat(loop)[0]].items():
                kernel.state[flat(kernel)[0]][key].copy_(value)


# Two roots in one change; a root before a sum that cancels: more than the last addition's two units.
INEXACT = {"Adadelta", "RMSprop"}


# Words


class EveryWord(Elementwise):
    """Every word that is rounded the same way everywhere, for its odd values.

    When: never.

        θ ← all of it

    State: 8 numbers per parameter.
    Source: none.
    """

    lr: float = hyper(0.37)

    a = slot("a")
    b = slot("b")
    c = slot("c")
    d = slot("d")
    e = slot("e")
    f = slot("f")
    q = slot("q")
    r = slot("r")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        s.a = larger(p, g) - smaller(p, 0.25) * larger(g, -0.0)
        s.b = where(p < g, sign(p), -abs(g)) + (p >= g) * p
        s.c = clamp(p, -h.lr, h.lr) / h.lr + 1.0 / g
        s.d = lerp(p, g, 0.75) + lerp(p, g, h.lr) + lerp(p, g, 1.5)
        s.e = sqrt(abs(p)) * g**2 - g**3
        s.f = where(p == g, 1.0, where(p != 0, h.lr, p > 0.5))
        s.q = p - h.lr * g * p
        s.r = 3.0 - g / p * h.lr
        return -h.lr * p * g


ODD = [0.0, -0.0, 1.0, -1.0, 0.25, 0.37, -0.37, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 1e-45, 3e38, 2.5]


@pytest.mark.usefixtures("exact_roots")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_word_on_odd_values(dtype: torch.dtype) -> None:
    """Infinities, signed zeros, what is not a number, what is almost zero: each against each."""
    odd = torch.tensor(ODD, dtype=torch.float64).to(dtype)
    count = len(ODD)
    optimizers = []
    for switches in (FUSED, LOOP):
        # The loop once more in one vector's width, so that the tail of ATen's loops is met as well.
        params = [nn.Parameter(odd.repeat(count)), *(nn.Parameter(x.clone()) for x in odd.split(1))]
        optimizer = EveryWord(params, **switches)
        params[0].grad = odd.repeat_interleave(count)
        for place, param in enumerate(params[1:]):
            param.grad = odd[place : place + 1].flip(0)
        optimizer.step()
        optimizers.append(optimizer)
    assert_same_numbers(*optimizers)


class Curves(Elementwise):
    """Words that have no exact answer.

    When: never.

        θ ← e^θ + log|θ| + |θ|^1.7 + 2^g

    State: none.
    Source: none.
    """

    lr: float = hyper(1.7)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return exp(p) + log(abs(p)) + abs(p) ** h.lr + 2.0**g


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_exp_log_and_power_are_close(dtype: torch.dtype) -> None:
    params = [nn.Parameter(numbers((4099,), dtype, 1)) for _ in range(2)]
    for param, switches in zip(params, (FUSED, LOOP), strict=True):
        param.grad = numbers((4099,), dtype, 2)
        Curves([param], **switches).step()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*(x.detach() for x in params), rtol=8 * eps, atol=32 * eps)


class Reduced(Elementwise):
    """Reductions over the tensor, one of them of what another one gave.

    When: never.

        θ ← θ - lr·(g - mean g)·‖θ‖ / ‖g - mean g‖ / max|θ|

    State: none.
    Source: none.
    """

    lr: float = hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        g = g - mean(g)
        return -h.lr * (g * (norm(p) / (norm(g) + 1e-3)) / larger(largest(abs(p)), 1e-3))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_reductions_cut_the_program_into_passes(dtype: torch.dtype) -> None:
    shapes = [shape for shape in SHAPES if math.prod(shape)]
    made = [[nn.Parameter(numbers(s, dtype, i)) for i, s in enumerate(shapes)] for _ in range(2)]
    for params, switches in zip(made, (FUSED, LOOP), strict=True):
        optimizer = Reduced(params, **switches)
        for step in range(3):
            for place, param in enumerate(params):
                param.grad = numbers(tuple(param.shape), dtype, 10 * step + place)
            optimizer.step()
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=rtol, atol=rtol)


def test_reductions_do_not_depend_on_the_number_of_threads() -> None:
    results: list[Tensor] = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            param = nn.Parameter(numbers((20 * cpu_launch.CHUNK + 7,), torch.float32, 1))
            param.grad = numbers(tuple(param.shape), torch.float32, 2)
            Reduced([param], **FUSED).step()
            results.append(param.detach())
    finally:
        torch.set_num_threads(before)
    assert_same(results[1:], results[:1] * 2)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_every_half_precision_number_is_read_and_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """All 65,536 of them, moved by something that is no half-precision number."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    param = nn.Parameter(every.clone())
    param.grad = numbers((1 << 16,), dtype, 3)
    steprule.SGD([param], lr=1 / 3, **FUSED).step()
    wanted = torch.add(every.float(), param.grad.float(), alpha=-1 / 3).to(dtype)
    assert torch.equal(param.isnan(), wanted.isnan())
    assert_same(param.detach().nan_to_num(7.0), wanted.nan_to_num(7.0))


# Memory


def strided(shape: tuple[int, ...]) -> Tensor:
    """Every second entry of a larger tensor."""
    return numbers((*shape[:-1], 2 * shape[-1]), torch.float32, 5)[..., ::2]


LAYOUTS = {
    "channels last": lambda: numbers((4, 3, 5, 6), torch.float32, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: numbers((31, 17), torch.float32, 5).t(),
    "strided": lambda: strided((9, 11)),
    "expanded": lambda: numbers((1, 7), torch.float32, 5).expand(1, 7)[:, ::7].expand(5, 1),
}


@pytest.mark.usefixtures("exact_roots")
@pytest.mark.parametrize("gradients", ["alike", "contiguous"])
@pytest.mark.parametrize("layout", ["channels last", "transposed", "strided"])
def test_memory_in_any_order(layout: str, gradients: str) -> None:
    """Dense in another order is fine; the rest goes to the loop, by name, and nothing else is written."""
    made: list[Any] = []
    for switches in (LOOP, {"fused": None, "foreach": None}):
        param = nn.Parameter(LAYOUTS[layout]())
        optimizer = steprule.AdamW([("odd", param), ("even", nn.Parameter(torch.ones(3)))], **switches)
        for step in range(3):
            gradient = numbers(tuple(param.shape), torch.float32, 50 + step)
            param.grad = torch.empty_like(param).copy_(gradient) if gradients == "alike" else gradient
            flat(optimizer)[1].grad = torch.ones(3)
            optimizer.step()
        made.append(optimizer)
    assert_same_numbers(*made)
    assert_same(*(flat(x)[0].detach()._base for x in made), "what the parameter is a view of") if (
        layout == "strided"
    ) else None
    dense = layout != "strided" and gradients == "alike"
    assert ("'odd' by the reference" in made[1].explain()) == (not dense)


def test_parameters_that_overlap_are_stepped_in_turn() -> None:
    made: list[Any] = []
    for switches in (LOOP, {"fused": None, "foreach": None}):
        whole = numbers((100,), torch.float32, 1)
        params = [nn.Parameter(x) for x in (whole[10:20], whole, whole[30:40], torch.ones(2))]
        for place, param in enumerate(params):
            param.grad = numbers(tuple(param.shape), torch.float32, place)
        optimizer = steprule.Lion(params, **switches)
        optimizer.step()
        made.append(optimizer)
    assert_same_numbers(*made)
    assert made[1].explain().count("shares memory") == 3


def test_asking_for_the_kernel_by_name_raises_where_it_cannot_run() -> None:
    param = nn.Parameter(strided((4, 4)))
    param.grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"Adam: fused=True was asked for, but .*: its gradient lies"):
        steprule.Adam([param], fused=True).step()


def test_a_kernel_that_cannot_be_made_leaves_the_work_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, text: str) -> Any:
        raise ImportError("numba needs another numpy")

    monkeypatch.setattr(kernel_cache, "_loaded", {})
    monkeypatch.setattr(kernel_cache, "_obtain", fail)
    kernel, loop = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    kernel.grad = loop.grad = torch.ones(5)
    optimizer = steprule.Adam([kernel])
    optimizer.step()
    steprule.Adam([loop], **LOOP).step()
    assert_same(kernel.detach(), loop.detach())
    assert "numba needs another numpy" in optimizer.explain()
    with pytest.raises(RuntimeError, match="numba needs another numpy"):
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


# What a plan must not survive


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
    """The same numbers in another order in memory, and at the next step back again."""
    param = flat(optimizer)[1]
    if param.grad is not None:
        param.grad = param.grad.t().contiguous().t()


EVENTS = [
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
    for switches in (LOOP, {"fused": None, "foreach": None}):
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


@pytest.mark.usefixtures("exact_roots")
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("rule", [steprule.NAdam, steprule.Adagrad])
def test_nothing_remembered_survives(rule: Any, event: Any) -> None:
    assert_equal_through([change_lr, event, change_lr, event, swap_gradients], rule)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(EVENTS), min_size=2, max_size=8))
def test_nothing_remembered_survives_any_sequence(events: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.WORDS, "sqrt", root)
        assert_equal_through(events, steprule.NAdam)


@pytest.mark.usefixtures("exact_roots")
def test_parameters_that_joined_late_have_their_own_count() -> None:
    case = Case(steprule.NAdam)
    kernel, loop = both(case, torch.float32, ((5,), (4, 3), (7,)))
    for optimizer in (kernel, loop):
        case.advance(optimizer, 3, without={1})
        case.advance(optimizer, 2, first=3)
        case.advance(optimizer, 2, first=5, without={0})
    assert_same_numbers(kernel, loop)


@pytest.mark.usefixtures("exact_roots")
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
    asked: list[int] = []
    library = cpu_threads.openmp()
    if library is None:
        pytest.skip("no OpenMP library shared with torch")

    def parallel(kernel: int, job: int, number: int, flags: int) -> None:
        asked.append(number)
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
    assert asked == [2, 3, 4]
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


def test_one_optimizer_in_several_threads_takes_turns() -> None:
    param = nn.Parameter(torch.zeros(200_000))
    param.grad = torch.ones_like(param)
    optimizer = steprule.Lion([param], lr=1.0, **FUSED)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(20)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (param == -60).all()
