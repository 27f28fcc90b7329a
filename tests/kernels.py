"""What the tests of the fused kernels share: the same optimizer by kernels and by the loop, and exact roots."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rules import Case, assert_same, by_lines, flat, in_words
from torch import Tensor

from steprule import Elementwise, hyper, slot
from steprule.engine.runners import eager
from steprule.engine.runners.kernels.cpu import launch as cpu_launch
from steprule.engine.runners.kernels.cpu.printer import POWERS
from steprule.words import atan2, becomes, larger, largest, mean, norm
from steprule.words import where as choose

# 0-dim, one, none, primes, over one chunk, over two and a bit, many dimensions.
SHAPES = ((), (1,), (0,), (3,), (97,), (2, 3, 5, 7), (cpu_launch.CHUNK + 1,), (2 * cpu_launch.CHUNK + 5,))
FUSED: dict[str, Any] = {"fused": True, "foreach": None}
LOOP: dict[str, Any] = {"fused": None, "foreach": False}
DEFAULT: dict[str, Any] = {"fused": None, "foreach": None}


def has_kernel(case: Case) -> bool:
    return in_words(case.rule) and case.any_shape and not case.sparse_only


def has_angles(case: Case) -> bool:
    """Whether the step takes angles, which in double precision are one or two units off in the last place."""
    optimizer = case.make()
    return any(x.word == "atan2" for x in optimizer.program(optimizer.param_groups[0]).instructions)


def root(x: Tensor) -> Tensor:
    """The correctly rounded root, which IEEE 754 asks of the processor and numpy uses."""
    return torch.as_tensor(np.sqrt(x.detach().resolve_neg().cpu().numpy())).to(x.device)


def power(x: Tensor, exponent: Any) -> Tensor:
    """torch's own where it only multiplies and takes roots, otherwise C's in double precision, rounded once."""
    if isinstance(exponent, (int, float)) and exponent in POWERS:
        return torch.pow(x, exponent)
    function = ctypes.CDLL(None).pow
    function.restype = ctypes.c_double
    function.argtypes = [function.restype] * 2
    return element_by_element(function, x, exponent)


def element_by_element(function: Any, x: Any, y: Any) -> Tensor:
    """What a function of two numbers gives for each element, in the precision of the tensor."""
    dtype = (x if isinstance(x, Tensor) else y).dtype
    given = (z.detach() if isinstance(z, Tensor) else torch.tensor(z, dtype=torch.float64) for z in (x, y))
    call: Any = np.frompyfunc(lambda *pair: function(*pair), 2, 1)
    with np.errstate(all="ignore"):
        result = call(*(z.to(dtype).resolve_neg().numpy() for z in given))
    return torch.as_tensor(np.asarray(result, dtype=np.float64)).to(dtype)


def angle(y: Any, x: Any) -> Tensor:
    """The angle that C's double precision gives, rounded once."""
    return element_by_element(math.atan2, y, x)


@contextlib.contextmanager
def exact_roots() -> Iterator[None]:
    """Give the reference roots and angles that are rounded once, and C's powers; ATen's may be a unit off.

    With them, a kernel must equal the reference to the last bit.
    """
    with pytest.MonkeyPatch.context() as patch, exact_powers():
        patch.setitem(eager.WORDS, "sqrt", root)
        yield


@contextlib.contextmanager
def exact_powers() -> Iterator[None]:
    """Powers and angles alone. ATen's in the middle of a tensor round differently from those at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(eager.WORDS, "power", power)
        patch.setitem(eager.WORDS, "atan2", angle)
        yield


class Angles(Elementwise):
    """Angles of points, of both coordinates and with one of them given.

    When: never.

        θ ← atan2(g, θ)

    State: 2 values per element (up, right).
    Source: none.
    """

    lr: float = hyper(-0.5)

    up = slot("up")
    right = slot("right")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        s.up = atan2(2 * h.lr, p) * atan2(h.lr, 2.0)
        s.right = atan2(p, h.lr)
        return becomes(atan2(g, p))


class Powered(Elementwise):
    """A power of elements by elements.

    When: never.

        θ ← θ^g

    State: none.
    Source: none.
    """

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return becomes(p**g)


# What is special to an angle, next to numbers of all sizes.
ODD = [0.0, -0.0, 1.0, -1.0, 0.25, -0.37, math.inf, -math.inf, math.nan, 1e-30, -1e-30, 3e30, 2.5, 0.66, 1e-3]


def odd_points(dtype: torch.dtype, device: Any = "cpu") -> tuple[Any, Tensor]:
    """A parameter and its gradient: all pairs of odd numbers."""
    odd = torch.tensor(ODD, dtype=torch.float64).to(dtype).to(device)
    return torch.nn.Parameter(odd.repeat(len(ODD))), odd.repeat_interleave(len(ODD))


def assert_same_numbers(given: Any, wanted: Any) -> None:
    """The same parameters and state to the last bit, where any NaN is as good as another."""
    for place, (one, other) in enumerate(zip(flat(given), flat(wanted), strict=True)):
        pairs = {"parameter": (one.detach(), other.detach())}
        assert set(given.state[one]) == set(wanted.state[other])
        pairs |= {key: (given.state[one][key], wanted.state[other][key]) for key in wanted.state[other]}
        for name, pair in pairs.items():
            assert_same(*map(with_one_nan, pair), f"{name} {place}")


def with_one_nan(x: Tensor) -> Tensor:
    """The same numbers, where every NaN has the same bits."""
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x) if x.is_floating_point() else x


def both(case: Case, dtype: torch.dtype, shapes: Any = SHAPES) -> tuple[Any, Any]:
    """The same optimizer twice: one by kernels, one by the loop that they must equal."""
    # Of what has rows and columns, kernels leave some to the loop, which fused=True does not allow.
    kernel = case.make(case.parameters(dtype, shapes), **(DEFAULT if by_lines(case.rule) else FUSED))
    return kernel, case.make(case.parameters(dtype, shapes), **LOOP)


class Reduced(Elementwise):
    """Reductions over the tensor, one of them of another one's result.

    When: never.

        θ ← θ - lr·(g - mean g)·‖θ‖ / ‖g - mean g‖ / max|θ|

    State: none.
    Source: none.
    """

    lr: float = hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        g = g - mean(g)
        ratio = norm(p) / (norm(g) + 1e-3)
        return -h.lr * (g * choose(ratio > 2.0, 2.0, ratio) / larger(largest(abs(p)), 1e-3))
