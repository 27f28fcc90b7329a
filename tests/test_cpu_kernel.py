"""The results of the fused CPU kernels: the reference's to the last bit, if its roots are exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernels import (
    FUSED,
    LOOP,
    SHAPES,
    Angles,
    Powered,
    Reduced,
    assert_same_numbers,
    both,
    exact_roots,
    has_angles,
    has_kernel,
    odd_points,
    power,
    with_one_nan,
)
from rules import LOOPS, Case, assert_same, by_lines, each, flat, numbers
from torch import Tensor, nn

import steprule
from steprule import Elementwise, hyper, slot
from steprule.engine.runners.kernels import fused
from steprule.engine.runners.kernels.cpu import launch as cpu_launch
from steprule.words import clamp, exp, larger, lerp, log, sign, smaller, sqrt, where

pytest.importorskip("llvmlite", reason="the kernels are compiled by it")

# Random numbers of every size meet random steps here, so half precision really loses some of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@exact_roots()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(has_kernel, among=LOOPS)
def test_every_rule_equals_the_loop_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    kernel, loop = both(case, dtype)
    case.advance(kernel, 4)
    case.advance(loop, 4)
    if case.rule.sums_as_torch:
        torch.testing.assert_close(flat(kernel), flat(loop))
    elif dtype != torch.float64 or (case.elementwise and not has_angles(case)):
        assert_same_numbers(kernel, loop)
    else:  # sums in double are in another order, and angles in double are not C's
        torch.testing.assert_close(flat(kernel), flat(loop), rtol=1e-12, atol=1e-12)
    left = fused.reasons(kernel, kernel.param_groups[0]).values()
    assert all("a stack of matrices" in x or "without elements" in x for x in left)
    assert not left or by_lines(case.rule)


# Two roots in one change; and a root before a sum that cancels, whose units then count for more. In Adafactor,
# the loop takes norms in single precision.
UNITS = {"Adadelta": 4, "RMSprop": 64, "Adafactor": 8}


@each(has_kernel, among=LOOPS)
def test_only_what_a_root_touches_may_differ_from_torchs_own_operations(case: Case) -> None:
    """Two units in the last place of the largest value involved, from equal states."""
    kernel, loop = both(case, torch.float32, ((4099,),))
    for number in range(4):
        old = flat(loop)[0].detach().clone()
        case.advance(kernel, 1, number)
        case.advance(loop, 1, number)
        mine, theirs = flat(kernel)[0].detach(), flat(loop)[0].detach()
        largest_operand = torch.stack([mine.abs(), old.abs(), (theirs - old).abs()]).amax(0)
        unit = torch.exp2(torch.floor(torch.log2(largest_operand))) * torch.finfo(torch.float32).eps
        assert ((mine - theirs).abs() <= UNITS.get(case.name, 2) * unit).all()
        with torch.no_grad():
            mine.copy_(theirs)
            for key, value in loop.state[flat(loop)[0]].items():
                kernel.state[flat(kernel)[0]][key].copy_(value)


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


@exact_roots()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_word_on_odd_values(dtype: torch.dtype) -> None:
    """Infinities, signed zeros, NaN and values near zero, in all pairs."""
    odd = torch.tensor(ODD, dtype=torch.float64).to(dtype)
    count = len(ODD)
    optimizers = []
    for switches in (FUSED, LOOP):
        # The loop again in one vector's width, so that the tail of ATen's loops is covered, too.
        params = [nn.Parameter(odd.repeat(count)), *(nn.Parameter(x.clone()) for x in odd.split(1))]
        optimizer = EveryWord(params, **switches)
        params[0].grad = odd.repeat_interleave(count)
        for place, param in enumerate(params[1:]):
            param.grad = odd[place : place + 1].flip(0)
        optimizer.step()
        optimizers.append(optimizer)
    assert_same_numbers(*optimizers)


@exact_roots()
def test_an_angle_is_rounded_once_on_odd_values() -> None:
    optimizers = []
    for switches in (FUSED, LOOP):
        param, gradient = odd_points(torch.float32)
        optimizers.append(Angles([param], **switches))
        param.grad = gradient
        optimizers[-1].step()
    assert_same_numbers(*optimizers)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_an_angle_is_that_of_torch(dtype: torch.dtype) -> None:
    for switches in (FUSED, LOOP, {"foreach": True}):
        param, gradient = odd_points(dtype)
        optimizer, before = Angles([param], **switches), param.detach().clone()
        param.grad = gradient
        optimizer.step()
        state, eps = optimizer.state[param], torch.finfo(dtype).eps
        half, whole = (torch.full_like(before, x) for x in (-0.5, -1.0))
        wanted = {
            "θ": (param.detach(), torch.atan2(gradient, before)),
            "up": (state["up"], torch.atan2(whole, before) * math.atan2(-0.5, 2.0)),
            "right": (state["right"], torch.atan2(before, half)),
        }
        for given, meant in wanted.values():
            torch.testing.assert_close(given, meant, rtol=4 * eps, atol=0, equal_nan=True)
            assert torch.equal(given.signbit() & ~given.isnan(), meant.signbit() & ~meant.isnan())


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


def test_powers_are_those_of_c_in_double_rounded_once() -> None:
    sizes = [0.0, 1.0, math.inf, 0.5, 2.0, 3.0, 1 / 3, 1e-45, 3e38, 1.0000001, 0.99999994, 150.5, 2.0**24]
    odd = torch.tensor([*sizes, *(-x for x in sizes), math.nan])
    x, y = (z.reshape(-1).clone() for z in torch.meshgrid(odd, odd, indexing="ij"))
    random = torch.Generator().manual_seed(0)
    x = torch.cat((x, torch.randn(4000, generator=random).mul(20).exp()))
    y = torch.cat((y, torch.randn(4000, generator=random).mul(3)))
    param = nn.Parameter(x.clone())
    param.grad = y
    Powered([param], **FUSED).step()
    given, wanted = with_one_nan(param.detach()), with_one_nan(power(x, y))
    assert_same(given, wanted)


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
    """All 65,536 of them, moved by something that is not a half-precision number."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    param = nn.Parameter(every.clone())
    param.grad = numbers((1 << 16,), dtype, 3)
    steprule.SGD([param], lr=1 / 3, **FUSED).step()
    wanted = torch.add(every.float(), param.grad.float(), alpha=-1 / 3).to(dtype)
    assert torch.equal(param.isnan(), wanted.isnan())
    assert_same(param.detach().nan_to_num(7.0), wanted.nan_to_num(7.0))
