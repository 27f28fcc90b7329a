"""Kernels on rows and columns: they equal the loop in every storage, and say what they leave to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import FUSED, LOOP, assert_same_numbers, exact_roots
from rules import assert_same, flat, numbers
from test_rows import MEANING, Both, ColumnWise, RowWise, Stacked
from test_storage_runners import STORAGES
from torch import Tensor, nn

from steprule import Elementwise, explain, hyper, slot
from steprule.declare import scalar_slot
from steprule.engine.runners.kernels.cpu import cut
from steprule.words import (
    clamp,
    ema_sq,
    exp,
    larger,
    largest,
    lerp,
    log,
    mean,
    norm,
    sign,
    smaller,
    sqrt,
    total,
    where,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")

# Rows of a block, of several, and longer than a chunk; many rows; several lines in a row; vectors.
SHAPES = ((400, 90), (17, 256), (3, 5000), (2000, 3), (41, 2, 70), (5000,), (5,), (), (1, 1))


def advance(optimizer: Any, steps: int = 3) -> Any:
    for step in range(steps):
        for place, param in enumerate(flat(optimizer)):
            gradient = numbers(tuple(param.shape), param.dtype, 100 * step + place)
            param.grad = torch.empty_like(param).copy_(gradient)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("rule", MEANING)
def test_the_kernel_equals_the_loop_in_every_storage(rule: Any, name: str) -> None:
    dtype, options = STORAGES[name]
    if name == "fp16" and rule is Both:
        options = {"state_dtype": {"variance": "bf16"}}
    shapes = [x for x in SHAPES if rule is not Stacked or len(x) < 3]
    with exact_roots():
        kernel, loop = (
            advance(rule([nn.Parameter(numbers(x, dtype, 5)) for x in shapes], **options, **switches))
            for switches in (FUSED, LOOP)
        )
        assert_same_numbers(kernel, loop)


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("rule", [RowWise, Both])
def test_the_kernel_on_a_gpu_equals_the_loop_in_every_storage(rule: Any, name: str, on_a_gpu: Any) -> None:
    from gpu import small_chunks

    dtype, options = STORAGES[name]
    if name == "fp16" and rule is Both:
        options = {"state_dtype": {"variance": "bf16"}}
    # Of 8-bit codes: rows of several blocks, rows of one, and a vector that is one row.
    with exact_roots(), small_chunks(2048, 1024):
        kernel, loop = (
            advance(rule([nn.Parameter(numbers(x, dtype, 5)) for x in shapes], **options, **switches), 2)
            for shapes in [((6, 768), (50, 90), (5000,))]
            for switches in ({}, LOOP)
        )
    assert_same_numbers(kernel, loop)
    if options.get("state_dtype") == "int8":
        assert "by the reference" not in explain(kernel)


@pytest.mark.parametrize("rule", [ColumnWise, Both])
def test_nothing_is_looked_at_on_a_gpu(rule: Any, on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import NoLooking

    optimizer = advance(rule([nn.Parameter(numbers((5, 3), torch.float32, 5))], capturable=True), 2)
    with monkeypatch.context() as looking, NoLooking():
        looking.setattr(Tensor, "numpy", None)
        optimizer.step()


class EveryWord(Elementwise):
    """Every word on values per row, on values per column, and on both, as numbers and as conditions."""

    lr: float = hyper(default=0.25)
    r = slot("r", per="row")
    c = slot("c", per="column", starts=0.5)
    kept = slot("kept")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        ends = []
        for x, y, old in (
            (mean(g, over="row"), norm(p, over="row"), s.r),
            (total(p, over="column"), largest(g, over="column"), s.c),
        ):
            z = clamp(sqrt(abs(x)) - exp(-y) + log(abs(y) + 1.5), -2.0, 2.0) * sign(x) + h.lr
            z = where(x > y, z, smaller(larger(z, y), 0.75)) + ema_sq(old, z, 0.5) * (y >= 0.1)
            z = lerp(z, where(t > 1, 2 * h.lr, y), h.lr) - x**2 * y + abs(z) ** -0.5 + (x == y) + 0.5 * (x != y)
            ends.append(
                (z + 1 / (abs(y) + 1) - (-x)) / (2 + abs(y)) + where(z < 9, 0.125, x) * where(1, h.lr, z)
            )
        s.r, s.c = ends
        s.kept = where(s.r > s.c, s.r * g, s.c) + (s.r <= s.c) * p + where(1.0, s.r, p)
        largest_row = largest(s.r, over="column") + mean(s.c, over="row") + total(s.r > 0.3, over="column")
        return (
            -h.lr * (s.kept + lerp(s.r, s.c, 0.3) + larger(p, s.r) * smaller(s.c, g)) / larger(1.0, largest_row)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("runner", ["kernel", "gpu"])
def test_every_word_on_rows_and_columns(runner: str, dtype: torch.dtype, request: Any) -> None:
    if runner == "gpu":
        request.getfixturevalue("on_a_gpu")
    shapes = ((6, 20), (33, 2), (3, 2, 2), (17,), (1,), ())
    with exact_roots():
        given, wanted = (
            advance(EveryWord([nn.Parameter(numbers(x, dtype, 5)) for x in shapes], **switches))
            for switches in ({}, LOOP)
        )
    assert "by the reference" not in explain(given)
    # Exponentials and logarithms on a device are not C's in the last place of a double.
    within = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    for one, other in zip(flat(given), flat(wanted), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), **within)
        for key, value in wanted.state[other].items():
            torch.testing.assert_close(given.state[one][key], value, **within)


@pytest.mark.parametrize("rule", MEANING)
def test_sums_in_double_differ_only_by_their_order(rule: Any) -> None:
    made = [
        advance(rule([nn.Parameter(numbers(x, torch.float64, 5)) for x in SHAPES], **switches))
        for switches in ({}, LOOP)
    ]
    for one, other in zip(*map(flat, made), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-13, atol=1e-14)


def last_bits(x: Any) -> Any:
    """What is left of a sum behind its first bits, so that a slot in single precision shows its last ones."""
    return x * 2.0**36 % 1.0


class Summed(Elementwise):
    """Sums over tensors and over all, of what is stored and of what is made of rows and columns.

    The largest of a row or column is the same in every order.
    """

    lr: float = hyper(default=0.25)
    m = slot("m")
    r = slot("r", per="row")
    a = scalar_slot("a")
    b = scalar_slot("b")
    c = scalar_slot("c")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.r = larger(s.r, largest(abs(g), over="row"))
        u = g / (s.r + largest(abs(p), over="column"))
        s.a = last_bits(norm(g, over="all")) + last_bits(total(s.m, over="tensor"))
        s.b = last_bits(total(u, over="group")) + largest(u, over="tensor")
        s.c = mean(u * p > 0, over="tensor") + last_bits(norm(p, over="tensor")) + largest(s.r, over="column")
        s.m = lerp(s.m, u, 0.125)
        return -h.lr * s.m / (1 + norm(u, over="all"))


@pytest.mark.parametrize("name", STORAGES)
def test_sums_are_the_same_bits_as_the_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that begin and end within rows, in chunks of several threads."""
    from steprule.engine.runners.kernels.cpu import threads

    dtype, options = STORAGES[name]
    monkeypatch.setattr(cut, "CHUNK", 1024)
    monkeypatch.setattr(threads, "SMALL", 0)
    shapes = (*SHAPES, (600, 7), (130, 128), (9, 301))
    before = torch.get_num_threads()
    made: list[Any] = []
    try:
        for switches, count in ((LOOP, 1), (FUSED, 1), (FUSED, 2)):
            torch.set_num_threads(count)
            params = [nn.Parameter(numbers(x, dtype, 5 + i)) for i, x in enumerate(shapes)]
            with exact_roots():
                made.append(advance(Summed(params, **options, **switches)))
    finally:
        torch.set_num_threads(before)
    loop, *kernels = made
    for kernel in kernels:
        assert "by the reference" not in explain(kernel)
        assert_same_numbers(kernel, loop)


@pytest.mark.parametrize("rule", [RowWise, ColumnWise, Both])
def test_the_number_of_threads_does_not_show(rule: Any) -> None:
    results: list[Tensor] = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            param = nn.Parameter(numbers((1500, 301), torch.float32, 1))
            results.append(flat(advance(rule([param], **FUSED), 2))[0].detach())
    finally:
        torch.set_num_threads(before)
    assert_same(results[1:], results[:1] * 2)


@pytest.mark.parametrize("rule", [RowWise, ColumnWise, Both])
def test_rows_in_another_order_of_memory(rule: Any) -> None:
    """Channels-last rows are together in memory; transposed ones, and what has a slot per column, are not."""
    with exact_roots():
        made: list[Any] = []
        for switches in ({}, LOOP):
            last = numbers((6, 4, 3, 3), torch.float32, 2).contiguous(memory_format=torch.channels_last)
            transposed = numbers((30, 20), torch.float32, 1).t()
            made.append(advance(rule([nn.Parameter(last), nn.Parameter(transposed)], **switches)))
    for one, other in zip(*map(flat, made), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-5, atol=1e-6)
    text = explain(made[0])
    assert "parameter 1 by the reference: its rows are not one after the other in memory" in text
    assert ("parameter 0 by the reference" in text) == (rule is not RowWise)


def test_stacks_and_tensors_without_elements_are_left_to_the_loop() -> None:
    params = [nn.Parameter(numbers(x, torch.float32, 1)) for x in ((2, 3, 4), (0, 4), (3, 4))]
    text = explain(advance(Stacked(params)))
    assert "runner: cpu_kernel" in text
    assert "parameter 0 by the reference: it is a stack of matrices (3 dimensions)" in text
    assert "parameter 1 by the reference: it has rows or columns without elements" in text
    assert "parameter 2 by the reference" not in text


def test_sums_of_columns_take_little_memory() -> None:
    for rows, columns in ((50_000, 768), (4096, 4096), (128, 30_000), (768, 3072), (3, 10), (1, 10**6)):
        together = cut.rows_together(rows, columns, with_columns=True)
        chunks = -(-rows // together)
        assert chunks == 1 or 8 * chunks * columns <= 4 * rows * columns / 32
