"""The words of GPU kernels: the reference's results to the last bit, on a GPU or in Triton's interpreter.

As for the CPU kernels, the reference is given correctly rounded roots here: ATen's are up to one unit off in
the last place. The interpreter is given the fused multiply-add that every GPU has: its own rounds twice. With
both, only sums over a whole tensor and the words that have no exact answer are left to a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu import (
    CHUNK,
    DEVICE,
    DTYPES,
    SHAPES,
    Kernels,
    advance,
    assert_same_numbers,
    both,
    small_chunks,
)
from kernels import Angles, Powered, Reduced, exact_roots, odd_points
from rules import Case, assert_same, flat, numbers
from torch import Tensor, nn

import steprule
from steprule import Elementwise, hyper, slot
from steprule.engine import blocks
from steprule.engine.runners.kernels.cache import NoKernel
from steprule.engine.runners.kernels.gpu import launch as gpu_launch
from steprule.words import clamp, exp, larger, lerp, log, sign, smaller, sqrt
from steprule.words import where as choose

# Half precision hardly learns, and is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")


@pytest.fixture(autouse=True)
def cut_up_small() -> Iterator[None]:
    with small_chunks():
        yield


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
        s.a = larger(p, g) - smaller(p, 0.25) * larger(g, h.lr)
        s.b = choose(p < g, sign(p), -abs(g)) + (p >= g) * p
        s.c = clamp(p, -h.lr, 0.7) / h.lr + 1.0 / g
        s.d = lerp(p, g, 0.75) + lerp(p, g, h.lr) + lerp(p, g, 1.5)
        s.e = sqrt(abs(p)) * g**2 - g**3 + abs(g) ** -0.5 * p**-2
        s.f = choose(p == g, 1.0, choose(p != 0, h.lr, p > 0.5))
        s.q = p - h.lr * g * p
        s.r = -(3.0 - g / p * h.lr)
        return -h.lr * p * g


ODD = [0.0, -0.0, 1.0, -1.0, 0.25, 0.37, -0.37, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 1e-45, 3e38, 2.5]


@exact_roots()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_word_on_odd_values(dtype: torch.dtype) -> None:
    """Infinities, zeros, NaN and values near zero, in all pairs.

    Of two zeros, hardware takes the positive one for the larger, ATen the second one.
    """
    odd = torch.tensor(ODD, dtype=torch.float64).to(dtype)
    made = [EveryWord([nn.Parameter(odd.repeat(len(ODD)).to(where))]) for where in (DEVICE, "cpu")]
    for optimizer in made:
        param = flat(optimizer)[0]
        param.grad = odd.repeat_interleave(len(ODD)).to(param.device)
    Kernels(made[0]).step()
    made[1].param_groups[0]["foreach"] = False
    made[1].step()
    assert_same_numbers(*made, signed_zeros=False)


def test_a_zero_keeps_its_sign() -> None:
    param = nn.Parameter(torch.zeros(4, device=DEVICE))
    param.grad = torch.zeros(4, device=DEVICE)
    optimizer = steprule.SGD([param], lr=0.1, maximize=True, momentum=0.9)
    Kernels(optimizer).step()
    assert optimizer.state[param]["momentum_buffer"].signbit().all()


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


def test_exp_log_and_power_are_close() -> None:
    """Each is rounded once from double precision; ATen's are up to 4 units off in the last place."""
    params = [nn.Parameter(numbers((300,), torch.float32, 1).to(where)) for where in (DEVICE, "cpu")]
    for param in params:
        param.grad = numbers((300,), torch.float32, 2).to(param.device)
    Kernels(Curves(params[:1])).step()
    Curves(params[1:], foreach=False).step()
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(params[0].detach().cpu(), params[1].detach(), rtol=8 * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_an_angle_is_that_of_torch_on_odd_values(dtype: torch.dtype) -> None:
    """Rounded once from double precision, in which it is one or two units off in the last place."""
    made: list[Any] = []
    for where in (DEVICE, "cpu"):
        param, gradient = odd_points(dtype, where)
        made.append(Angles([param], foreach=False))
        param.grad = gradient
    Kernels(made[0]).step()
    made[1].step()
    eps = torch.finfo(dtype).eps
    (one,), (other,) = map(flat, made)
    pairs = [(one.detach(), other.detach())]
    pairs += [(made[0].state[one][key], made[1].state[other][key]) for key in ("up", "right")]
    for given, meant in ((x.cpu(), y) for x, y in pairs):
        torch.testing.assert_close(given, meant, rtol=4 * eps, atol=0, equal_nan=True)
        assert torch.equal(given.signbit() & ~given.isnan(), meant.signbit() & ~meant.isnan())


def test_a_power_is_that_of_c_on_odd_values() -> None:
    values = [*(x for x in ODD if abs(x) > 1e-30 or x == 0 or x != x), 2.0, 3.0, -2.0, -3.0, 0.5]
    odd = torch.tensor(values, dtype=torch.float32)
    base, exponent = odd.repeat(len(odd)), odd.repeat_interleave(len(odd))
    param = nn.Parameter(base.clone().to(DEVICE))
    param.grad = exponent.to(DEVICE)
    Kernels(Powered([param])).step()
    wanted = torch.pow(base.double(), exponent.double()).float()
    torch.testing.assert_close(param.detach().cpu(), wanted, rtol=2e-7, atol=0, equal_nan=True)
    assert torch.equal(param.detach().cpu().signbit() & ~wanted.isnan(), wanted.signbit() & ~wanted.isnan())


def test_no_kernel_takes_powers_in_double_precision() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))
    param.grad = torch.ones_like(param)
    with pytest.raises(NoKernel, match="powers in double precision"):
        Kernels(Powered([param]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_are_those_of_double_precision(dtype: torch.dtype) -> None:
    """Bit for bit in single precision, where two orders of a sum in double almost always give the same."""
    shapes = [shape for shape in SHAPES if math.prod(shape)]
    given, loop = both(Case(Reduced), dtype, shapes)
    advance(Case(Reduced), given, loop)
    if dtype != torch.float64:
        assert_same_numbers(given, loop)
    for one, other in zip(flat(given), flat(loop), strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-13, atol=1e-14)


def test_reductions_over_many_chunks_come_out_right_and_the_same_every_time() -> None:
    """More chunks than a block has lanes."""
    start, gradient = (numbers((20 * CHUNK + 7,), torch.float32, seed) for seed in (1, 2))
    results: list[Tensor] = []
    for _ in range(2):
        param = nn.Parameter(start.clone().to(DEVICE))
        param.grad = gradient.to(DEVICE)
        Kernels(Reduced([param])).step()
        results.append(param.detach().cpu())
    assert_same(results[0], results[1])
    p, g = start.double(), gradient.double() - gradient.double().mean()
    wanted = p - 0.1 * g * (p.norm() / (g.norm() + 1e-3)).clamp(max=2.0) / p.abs().max()
    torch.testing.assert_close(results[0].double(), wanted, rtol=3e-7, atol=3e-8)


def test_what_is_not_a_number_is_the_largest() -> None:
    params = [nn.Parameter(torch.ones(3 * CHUNK, device=DEVICE)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    with torch.no_grad():
        params[0][CHUNK + 5] = math.nan
    Kernels(Reduced(params)).step()
    assert params[0].isnan().all()
    assert not params[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_stores_round_to_nearest_even(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single precision of all sizes into half: ties, the largest, subnormal values, NaN."""
    monkeypatch.setattr(gpu_launch, "CHUNK", 1 << 13)
    monkeypatch.setattr(gpu_launch, "BLOCK", 1 << 10)
    bits = torch.arange(-(1 << 31), 1 << 31, 104729).to(torch.int32)
    ties = (torch.arange(-(1 << 15), 1 << 15, 37) * 65536 + 32768).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), torch.tensor(ODD)])
    optimizer = steprule.SGD([nn.Parameter(torch.zeros(len(values), dtype=dtype, device=DEVICE))], lr=1.0)
    (param,), (group,) = flat(optimizer), optimizer.param_groups
    gradient, program = -values.to(DEVICE), optimizer.program(group)
    launch = gpu_launch.Launch(
        program, {"p": dtype, "g": torch.float32}, [values.shape], [blocks.whole(values.shape)], DEVICE
    )
    launch.place("p", [param.data_ptr()])
    launch.place("g", [gradient.data_ptr()])
    launch.run([program.scalars[0].function(group, math.nan, {})[0]], [0])
    given, wanted = param.detach().cpu(), (values + 0.0).to(dtype)
    assert torch.equal(given.isnan(), wanted.isnan())
    assert_same(given.nan_to_num(7.0), wanted.nan_to_num(7.0))
