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
from rules import Case, assert_same, flat
from torch import Tensor

from steprule import Elementwise, hyper
from steprule.engine import cpu_kernel, cpu_launch, reference
from steprule.words import larger, largest, mean, norm
from steprule.words import where as choose

# 0-dim, one, none, primes, over one chunk, over two and a bit, many dimensions.
SHAPES = ((), (1,), (0,), (3,), (97,), (2, 3, 5, 7), (cpu_launch.CHUNK + 1,), (2 * cpu_launch.CHUNK + 5,))
FUSED: dict[str, Any] = {"fused": True, "foreach": None}
LOOP: dict[str, Any] = {"fused": None, "foreach": False}
DEFAULT: dict[str, Any] = {"fused": None, "foreach": None}


def has_kernel(case: Case) -> bool:
    return getattr(case.rule, "traced", False) and not case.sparse_only


def root(x: Tensor) -> Tensor:
    """The correctly rounded root, which IEEE 754 asks of the processor and numpy uses."""
    return torch.as_tensor(np.sqrt(x.detach().resolve_neg().numpy()))


def power(x: Tensor, exponent: Any) -> Tensor:
    """torch's own where it only multiplies and takes roots, otherwise C's."""
    if isinstance(exponent, float) and exponent in cpu_kernel.POWERS:
        return torch.pow(x, exponent)
    return by_c("pow", x, exponent)


def by_c(name: str, x: Tensor, y: Any) -> Tensor:
    """What C's function of two numbers gives for each element, in the precision of x."""
    single = x.dtype == torch.float32
    function = getattr(ctypes.CDLL(None), f"{name}f" if single else name)
    function.restype = ctypes.c_float if single else ctypes.c_double
    function.argtypes = [function.restype] * 2
    y = y.detach() if isinstance(y, Tensor) else torch.tensor(y, dtype=torch.float64)
    xs, ys = (z.to(x.dtype).resolve_neg().numpy() for z in (x.detach(), y))
    call: Any = np.frompyfunc(lambda *given: function(*given), 2, 1)
    return torch.as_tensor(np.asarray(call(xs, ys), dtype=np.float64)).to(x.dtype)


@contextlib.contextmanager
def exact_roots() -> Iterator[None]:
    """Give the reference correctly rounded roots and powers; ATen's may be off in the last place.

    With them, a kernel must equal the reference to the last bit.
    """
    with pytest.MonkeyPatch.context() as patch, exact_powers():
        patch.setitem(reference.WORDS, "sqrt", root)
        yield


@contextlib.contextmanager
def exact_powers() -> Iterator[None]:
    """The powers alone. ATen's in the middle of a tensor round differently from those at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.WORDS, "power", power)
        yield


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
    kernel = case.make(case.parameters(dtype, shapes), **FUSED)
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
