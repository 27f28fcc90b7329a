"""The language of rules: any formula has the same, correct result in every runner."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from formulas import (
    EXACT,
    FLOATS,
    advance,
    assert_all_right,
    assert_meant,
    drawn,
    give,
    make,
    parameter_of_all,
    results,
    rule_of,
    rule_of_all,
    words_in,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rules import assert_same, flat
from torch import nn

from steprule import Elementwise, hyper, slot
from steprule.engine import storage
from steprule.words import largest, mean, norm, where

# Half precision hardly learns, and is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")


@settings(max_examples=40)
@given(parts=drawn(), dtype=st.sampled_from([*FLOATS, torch.complex64]))
def test_the_loop_and_lists_come_to_what_a_formula_means(parts: Any, dtype: torch.dtype) -> None:
    rule = rule_of(*parts)
    with np.errstate(all="ignore"):
        loop = advance(make(rule, dtype, foreach=False))
        assert_same(results(advance(make(rule, dtype, foreach=True))), results(loop))
        assert_meant(parts, loop, dtype)


@settings(max_examples=6)
@given(parts=drawn(), dtype=st.sampled_from(FLOATS))
def test_the_kernel_comes_to_what_a_formula_means(parts: Any, dtype: torch.dtype) -> None:
    with np.errstate(all="ignore"):
        assert_meant(parts, advance(make(rule_of(*parts), dtype, fused=True)), dtype)


@settings(max_examples=6)
@given(parts=drawn(EXACT), dtype=st.sampled_from(FLOATS))
def test_the_kernel_equals_the_loop_where_every_word_is_exact(parts: Any, dtype: torch.dtype) -> None:
    """Even for sums: taken in double, their order makes no difference in float32."""
    assume(dtype != torch.float64 or not {"norm", "mean"} & set.union(*map(words_in, parts[:4])))
    rule = rule_of(*parts)
    loop = advance(make(rule, dtype, foreach=False))
    assert_same(results(advance(make(rule, dtype, fused=True))), results(loop))


RUNNERS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "lists": {"foreach": True},
    "kernel": {"fused": True},
}


@pytest.mark.parametrize("runner", RUNNERS)
def test_what_a_formula_comes_to(runner: str) -> None:
    optimizer = rule_of_all()([parameter_of_all()], **RUNNERS[runner])
    assert_all_right(optimizer, optimizer.step)


def swap(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
    s.m, s.n = s.n, s.m
    return -h.lr * g


def keep(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
    s.m, s.n = p, g
    return -h.lr * g


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_slots_take_over_old_values(runner: str, dtype: torch.dtype) -> None:
    """Of each other, of the parameter, of the gradient: as they were before the step."""
    if dtype.is_complex and runner == "kernel":
        pytest.skip("no kernel takes complex parameters")

    class Mine(Elementwise):
        lr: float = hyper(0.5)
        m = slot("m", starts=5.0)
        n = slot("n", starts=3.0)

    for update in (swap, keep):
        rule = type("Mine", (Mine,), {"update": staticmethod(update), "__module__": __name__})
        optimizer = make(rule, dtype, ((4,),), **RUNNERS[runner])
        (param,) = flat(optimizer)
        before = param.detach().clone()
        give(optimizer, 0)
        optimizer.step()
        state = optimizer.state[param]
        if update is keep:
            assert_same([state["m"], state["n"]], [before, param.grad])
        else:
            both = complex(1, 1) if dtype.is_complex else 1
            assert state["m"].eq(3 * both).all()
            assert state["n"].eq(5 * both).all()


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_plain_number_too_small_for_float32_is_not_zero(runner: str) -> None:
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return where(t * 1e-60, g, 0.0)

    rule = type("Mine", (Elementwise,), {"update": staticmethod(update), "__module__": __name__})
    param = nn.Parameter(torch.zeros(2))
    optimizer = rule([param], **RUNNERS[runner])
    param.grad = torch.ones(2)
    optimizer.step()
    assert param.tolist() == [1, 1]


@pytest.mark.parametrize("runner", RUNNERS)
def test_reductions_of_nothing(runner: str) -> None:
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return mean(g) + norm(p) + largest(p)

    rule = type("Mine", (Elementwise,), {"update": staticmethod(update), "__module__": __name__})
    optimizer = make(rule, torch.float32, ((0,), (0, 3)), **RUNNERS[runner])
    give(optimizer, 0)
    optimizer.step()


def test_reductions_refuse_some_rows() -> None:
    class Rows(Elementwise):
        gradients = "rows"
        lr: float = hyper(0.5)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return -h.lr * g / norm(p)

    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))]
    optimizer = Rows(params)
    params[0].grad, params[1].grad = torch.ones(3, 2), torch.ones(3, 2).to_sparse()
    with pytest.raises(
        RuntimeError, match=r"Rows takes mean, norm or largest .* parameter 1 has only some rows"
    ):
        optimizer.step()
    assert params[0].eq(1).all()


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_values_of_a_whole_tensor_in_few_bits(kind: str) -> None:
    """A plain number, a reduction and a mask go into slots of every storage."""

    class Mine(Elementwise):
        lr: float = hyper(0.5)
        m = slot("m")
        n = slot("n")
        k = slot("k")

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            s.m, s.n, s.k = h.lr, largest(p) - largest(p) + 2.0, g > 0
            return 0.0

    for runner in ("loop", "kernel"):
        param = nn.Parameter(torch.ones(5000))
        optimizer = Mine([param], state_dtype=kind, **RUNNERS[runner])
        param.grad = torch.ones(5000)
        optimizer.step()
        for key, wanted in (("m", 0.5), ("n", 2.0), ("k", 1.0)):
            given = storage.load(optimizer.state[param], key).float()
            torch.testing.assert_close(given, torch.full((5000,), wanted), rtol=0.15, atol=0)


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_optional_number_in_a_pair_is_decided_when_the_program_is_built(runner: str) -> None:
    class Mine(Elementwise):
        pair: tuple[float | None, float] = hyper((None, 2.0))

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            first, second = h.pair
            return g * second if first is None else g * first

    for pair, wanted in (((None, 2.0), 2.0), ((3.0, 2.0), 3.0)):
        param = nn.Parameter(torch.zeros(2))
        optimizer = Mine([param], pair=pair, **RUNNERS[runner])
        param.grad = torch.ones(2)
        optimizer.step()
        assert param.tolist() == [wanted] * 2
