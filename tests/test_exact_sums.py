"""Sums that no order can change: what they mean, and the same bits from every runner and number of threads."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import exact_roots
from rules import numbers
from test_blocks import grids, slices
from torch import Tensor, nn

import steprule
from steprule.engine import blocks
from steprule.engine.blocks import Region
from steprule.engine.program import exact
from steprule.engine.program.exact import Sum


def rational(x: Tensor) -> Fraction:
    return sum((Fraction(y) for y in x.double().reshape(-1).tolist()), Fraction(0))


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 1000])
def test_sums_of_whole_numbers_are_exact(count: int) -> None:
    x = torch.randint(-1000, 1000, (count,), generator=torch.Generator().manual_seed(0)).float()
    (plain,), (squares,) = exact.of_tensors([x], squares=False), exact.of_tensors([x], squares=True)
    assert plain.rounded() == rational(x)
    assert squares.rounded() == rational(x.double().square())


def test_blocks_are_added_without_rounding() -> None:
    """In double, 1 + 1e-30 is 1, and what comes first would decide."""
    x = torch.zeros(1, 5 * 128)
    x[0, 0], x[0, 200], x[0, 300], x[0, 639] = 1e18, 1e-30, -1e18, 1e-30
    (found,) = exact.of_tensors([x], squares=False)
    assert found.rounded() == float(rational(x)) == 2 * float(x[0, 200])


def test_elements_of_vectors_are_added_without_rounding() -> None:
    x = torch.tensor([1e18, 1e-30, -1e18, 1e-30])
    (found,) = exact.of_tensors([x], squares=False)
    assert found.rounded() == 2 * float(x[1])


def test_the_order_in_a_block_is_that_of_16_lanes() -> None:
    x = numbers((1, 128), torch.float32, 1).double()
    lanes = x.reshape(8, 16)
    total = lanes[0].clone()
    for lane in lanes[1:]:
        total += lane
    for half in (8, 4, 2, 1):
        total = total[:half] + total[half:]
    (found,) = exact.of_tensors([x], squares=False)
    assert found.rounded() == float(total[0])


@given(st.lists(st.floats(width=64), max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_doubles(values: list[float]) -> None:
    """Each alone in its block."""
    x = torch.zeros(len(values), 128, dtype=torch.float64)
    x[:, 0] = torch.tensor(values, dtype=torch.float64)
    (found,) = exact.of_tensors([x], squares=False)
    total = Sum()
    for value in reversed(values):
        total = total.plus(exact.of_number(value))
    assert found == total
    if all(map(math.isfinite, values)):
        try:
            assert found.rounded() == float(rational(x))
        except OverflowError:
            assert found.rounded() == (math.inf if rational(x) > 0 else -math.inf)
    else:
        expected = sum(value for value in values if not math.isfinite(value))
        assert found.rounded() == expected or (math.isnan(found.rounded()) and math.isnan(expected))


def test_large_tensors_are_added_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [numbers(shape, torch.float32, i) for i, shape in enumerate([(1000,), (3,), (0,), (40, 30)])]
    wanted = [exact.of_tensors([x], squares=True)[0] for x in tensors]
    for piece in (128, 256, 1024):
        monkeypatch.setattr(exact, "PIECE", piece)
        assert exact.of_tensors(tensors, squares=True) == wanted


@pytest.mark.parametrize("squares", [False, True])
def test_neighbours_in_memory_are_added_up(squares: bool) -> None:
    """Dense tensors in another order of dimensions are read from one end to the other."""
    x = numbers((8, 30, 7, 7), torch.float64, 1)
    last = (x * 10 ** x.sin()).contiguous(memory_format=torch.channels_last)
    rows = last.permute(0, 2, 3, 1)
    assert rows.is_contiguous()
    assert exact.of_tensors([last], squares) == exact.of_tensors([rows], squares)


@given(grids(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_parts_come_to_the_whole(grid: tuple[tuple[int, ...], list[Region]], squares: bool) -> None:
    """Wherever the cuts are, if they cut no block."""
    shape, regions = grid
    x = numbers(shape, torch.float32, 1)
    own = blocks.layout_of_sums(shape)
    parts = exact.of_tensors([x[slices(r)] for r in regions], squares, regions)
    total = Sum()
    for part in parts:
        total = total.plus(part)
    if not any(blocks.cuts(own, r) for r in regions):
        assert [total] == exact.of_tensors([x], squares)
    elif not squares:
        assert total.rounded() == pytest.approx(float(rational(x)), rel=1e-9, abs=1e-9)


# In kernels


def in_a_kernel(x: np.ndarray[Any, Any], squares: bool, begun: int = 0) -> tuple[Sum, float]:
    """What the words of a CPU kernel make of these numbers, in blocks of 128, the first of which was begun."""
    pytest.importorskip("llvmlite")
    from steprule.engine.runners.kernels import cache
    from steprule.engine.runners.kernels.cpu.cut import OF_DOUBLES
    from steprule.engine.runners.kernels.cpu.threads import Job, Kernel

    kind, word = str(x.dtype), "add_squares" if squares else "add_values"
    form = exact.form_of(kind == "float64")
    text = f"""
from steprule.engine.runners.kernels.cpu.sums import *
{OF_DOUBLES if form is exact.DOUBLE else ""}
def kernel(job):
    total = sum_of_chunk(job, 0)
    clear(total)
    {word}(total, {kind}_values(job, 0), sums_of_sweep(job), 128, tensors_of_job(job))
    result = rounded_sums(job, 0)
    result[0] = rounded(total, sum_of_tensor(job, 0))
"""
    room = len(x) + 128
    values = np.zeros(2 * room, dtype=x.dtype)
    values[: len(x)] = x
    kept, work, result = np.zeros(form.width, dtype=np.int64), np.zeros(form.width, dtype=np.int64), np.zeros(1)
    job = Job(reductions=len(x), room=room, tensors=begun)
    for name, table in {"values": values, "partials": kept, "sums": work, "rounded": result}.items():
        setattr(job, name, table.ctypes.data)
    Kernel(cache.address_of("sums-test", text)).run(ctypes.addressof(job), 1)
    return exact.from_limbs(kept.tolist()), float(result[0])


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [0, 1, 15, 128, 129, 1000])
def test_a_kernel_adds_as_the_others_do(count: int, dtype: torch.dtype, squares: bool) -> None:
    for scale in (1.0, -1e-3, 1e-25, 1e18, 1e-45):
        x = numbers((1, count), torch.float32, count).to(dtype) * scale
        (wanted,) = exact.of_tensors([x], squares)
        assert wanted == exact.of_tensors([x.double()], squares)[0]
        assert in_a_kernel(x[0].numpy(), squares) == (wanted, wanted.rounded())


@pytest.mark.parametrize("begun", [0, 1, 100, 127])
@pytest.mark.parametrize("count", [5, 40, 300])
def test_a_part_begins_within_a_block(count: int, begun: int) -> None:
    x = numbers((1, count), torch.float32, count)
    region = Region((1, 1000), (1, count), (0, 128 + begun))
    (wanted,) = exact.of_tensors([x], squares=True, regions=[region])
    assert in_a_kernel(x[0].numpy(), squares=True, begun=begun) == (wanted, wanted.rounded())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e200, -1.7e308, 1e-310, -5e-324, -0.0])
def test_a_kernel_meets_odd_numbers(bad: float) -> None:
    x = torch.tensor([[1.0, *[0.0] * 127, bad, -3.0]], dtype=torch.float64)
    (wanted,) = exact.of_tensors([x], squares=False)
    found, result = in_a_kernel(x[0].numpy(), squares=False)
    assert found == wanted
    assert result == wanted.rounded() or (math.isnan(result) and math.isnan(wanted.rounded()))


@pytest.mark.parametrize("scale", [3e38, 1e-38, 1.5e-45])
def test_single_precision_needs_few_limbs(scale: float) -> None:
    x = torch.full((1, 700), scale)
    for squares in (False, True):
        (wanted,) = exact.of_tensors([x.double()], squares)
        assert wanted.units
        assert exact.of_tensors([x], squares) == [wanted]
        assert in_a_kernel(x[0].numpy(), squares) == (wanted, wanted.rounded())


@pytest.mark.parametrize("form", [exact.SINGLE, exact.DOUBLE], ids=["single", "double"])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_limbs_are_rounded_to_the_nearest_double(form: exact.Form, data: st.DataObject) -> None:
    pytest.importorskip("llvmlite")
    from steprule.engine.runners.kernels import cache
    from steprule.engine.runners.kernels.cpu.cut import OF_DOUBLES
    from steprule.engine.runners.kernels.cpu.threads import Job, Kernel

    limb, count = st.integers(-(2**62), 2**62), data.draw(st.integers(0, form.limbs))
    limbs = [*data.draw(st.lists(limb, min_size=count, max_size=count)), *[0] * (form.limbs - count)]
    text = f"""
from steprule.engine.runners.kernels.cpu.sums import *
{OF_DOUBLES if form is exact.DOUBLE else ""}
def kernel(job):
    result = rounded_sums(job, 0)
    result[0] = rounded(sum_of_chunk(job, 0), sum_of_tensor(job, 0))
"""
    kept, work, result = np.array([*limbs, 0, 0, 0]), np.zeros(form.width, dtype=np.int64), np.zeros(1)
    job = Job(partials=kept.ctypes.data, sums=work.ctypes.data, rounded=result.ctypes.data)
    Kernel(cache.address_of("sums-round", text)).run(ctypes.addressof(job), 1)
    assert result[0] == exact.from_limbs(kept.tolist()).rounded()


# In rules and modifiers

RULES = ("LAMB", "LARS", "Prodigy", "DoG", "LDoG", "DoWG", "StableAdamW", "NovoGrad", "DAdaptAdam", "AdamW")
MODIFIERS: dict[str, list[Any]] = {
    "none": [],
    "clipped": [steprule.GlobalNormClip, steprule.Cautious],
    "measured": [steprule.Metrics, steprule.NormClip],
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = ((), (7,), (0,), (130,), (64, 3, 3, 3), (300, 70), (9, 300))


def after_steps(rule: str, modifiers: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    params = [nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(SHAPES)]
    low = {"low_precision": "none"} if dtype == torch.bfloat16 else {}
    made: Any = getattr(steprule, rule)
    optimizer = made(params, modifiers=[x() for x in MODIFIERS[modifiers]], **low, **options)
    for step in range(3):
        for place, param in enumerate(params):
            param.grad = numbers(tuple(param.shape), dtype, 100 * step + place)
        optimizer.step()
    state = [x for param in params for x in optimizer.state[param].values() if isinstance(x, Tensor)]
    return [*map(Tensor.detach, params), *state]


# Each rule with each modifier in one precision, and in each precision with one.
CELLS = [
    (rule, modifiers, DTYPES[(i + j) % 3])
    for i, rule in enumerate(RULES)
    for j, modifiers in enumerate(MODIFIERS)
]


@pytest.mark.parametrize(("rule", "modifiers", "dtype"), CELLS, ids=str)
def test_every_runner_and_any_number_of_threads_give_the_same_bits(
    rule: str, modifiers: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = {"fused": False, "foreach": False}
    pairs = [(loop, {"fused": False, "foreach": True}, False)]
    if pytest.importorskip("llvmlite"):
        from steprule.engine.runners.kernels.cpu import launch, threads

        monkeypatch.setattr(launch, "CHUNK", 1024)
        monkeypatch.setattr(threads, "SMALL", 0)
        pairs += [(loop, {"fused": True}, True), ({"fused": True}, {"fused": True, "threads": 1}, True)]
    for one, other, rounded_once in pairs:
        found: list[list[Tensor]] = []
        for options in (one, other):
            own = dict(options)
            before = torch.get_num_threads()
            torch.set_num_threads(int(own.pop("threads", 2)))
            try:
                if rounded_once:
                    with exact_roots():
                        found.append(after_steps(rule, modifiers, dtype, **own))
                else:
                    found.append(after_steps(rule, modifiers, dtype, **own))
            finally:
                torch.set_num_threads(before)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("runner", [{"fused": False, "foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("size", [1e61, 1e150, 1e-60, 1e-150])
def test_norms_of_very_large_and_very_small_doubles(size: float, runner: dict[str, bool]) -> None:
    if runner.get("fused"):
        pytest.importorskip("llvmlite")
    params = [nn.Parameter(torch.zeros(count, dtype=torch.float64)) for count in (300, 5)]
    for param in params:
        param.grad = torch.full_like(param, size)
    optimizer = steprule.SGD(params, lr=1.0, modifiers=[steprule.GlobalNormClip(size)], **runner)
    optimizer.step()
    assert optimizer.gradient_norm == pytest.approx(size * math.sqrt(305), rel=1e-14, abs=0)
    for param in params:
        torch.testing.assert_close(param.detach(), -param.grad / math.sqrt(305), rtol=1e-12, atol=0)


@pytest.mark.parametrize("modifiers", [[steprule.AdaptiveClip], [steprule.Centralize, steprule.EMA]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_of_all_gradients_is_the_same_bits_beside_rows(
    dtype: torch.dtype, modifiers: list[Any]
) -> None:
    """A program with rows takes it in the blocks of any other."""
    pytest.importorskip("llvmlite")
    found: list[list[float]] = []
    for more, options in (([], {}), (modifiers, {}), (modifiers, {"foreach": False})):
        params = [nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(SHAPES) if 0 not in shape]
        clips: list[Any] = [steprule.GlobalNormClip(), *(x() for x in more)]
        optimizer = steprule.AdamW(params, modifiers=clips, low_precision="none", **options)
        norms: list[float] = []
        for step in range(3):
            for place, param in enumerate(params):
                param.grad = numbers(tuple(param.shape), dtype, 100 * step + place)
            optimizer.step()
            norms.append(optimizer.gradient_norm)
        found.append(norms)
    assert found[0] == found[1] == found[2]
