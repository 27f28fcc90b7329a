"""Sums on a GPU, or in Triton's interpreter: those of `exact`, to the last bit."""

from __future__ import annotations

import importlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu import DEVICE, INTERPRETED, pretend_a_gpu, small_chunks
from hypothesis import given as each_of
from hypothesis import strategies as st
from layouts import in_processes, layouts
from test_sharded import twins
from torch import nn

import steprule
from steprule import Elementwise, hyper
from steprule.engine import blocks
from steprule.engine.blocks import Region
from steprule.engine.program import exact, sums
from steprule.engine.runners.kernels.gpu import launch as gpu_launch
from steprule.words import mean, norm

kernels: Any = importlib.import_module("steprule.engine.runners.kernels.gpu.sums")

# Loose vectors and a long one; lines of blocks of 128, 64 and 32, of short blocks, and with a short end.
LONG = (blocks.LOOSE + 300,)
SHAPES = ((), (0,), (5,), (1000,), LONG, (3, 384), (2, 4096), (2, 2304), (5, 45), (4, 97), (3, 200))
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Summed(Elementwise):
    """A step of the parameter's length, against the mean gradient.

    When: never.

        θ ← θ - lr·‖θ‖·mean g

    State: none.
    Source: none.
    """

    lr: float = hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * (mean(g) * norm(p))


def wide(shape: Any, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of very different sizes."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-30, 30, shape, generator=random).double()
    return (torch.randn(shape, generator=random, dtype=torch.float64) * 2**sizes).to(dtype)


def shares(params: list[Any], gradients: list[Any], regions: list[Region]) -> tuple[Any, list[Any]]:
    """A launch, and what the mean of gradients and the norm of parameters come to."""
    params, gradients = ([x.to(DEVICE) for x in column] for column in (params, gradients))
    optimizer = Summed(list(map(nn.Parameter, params)))
    program = optimizer.program(optimizer.param_groups[0])
    dtypes = {"p": params[0].dtype, "g": gradients[0].dtype}
    with small_chunks(1024, 512):
        launch = gpu_launch.Launch(program, dtypes, [x.shape for x in params], regions, DEVICE)
        launch.place("p", [x.data_ptr() for x in params])
        launch.place("g", [x.data_ptr() for x in gradients])
        rows = torch.zeros(1, program.scalar_count, dtype=launch.dtype, device=DEVICE)
        found = launch.run(rows, [0] * len(params))
    if DEVICE.type != "cpu":
        torch.cuda.synchronize()
    words = [x.word for x in program.passes[0].reductions]
    return launch, list(zip(words, found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_tensors_are_exact(dtype: torch.dtype) -> None:
    params, gradients = ([wide(x, dtype, 10 * i + j) for i, x in enumerate(SHAPES)] for j in range(2))
    gradients[3][17], gradients[5][1, 3] = math.inf, math.nan
    launch, found = shares(params, gradients, [blocks.whole(x) for x in SHAPES])
    assert len(launch._work.parts) == 3  # blocks of up to 32 and 64 elements, and longer ones
    for word, own in found:
        wanted = exact.of_tensors(params if word == "norm" else gradients, word == "norm")
        assert [x.value for x in launch.partials(word, own)] == wanted
        rounded = [x.rounded() for x in wanted]
        assert np.array_equal(own.rounded.cpu().numpy(), rounded, equal_nan=True)
        parts = [sums.Partial(x, math.prod(shape)) for x, shape in zip(wanted, SHAPES, strict=True)]
        assert launch.together(word, own) == sums.together(word, parts)


# Rows, columns between blocks, columns that cut one, and a stretch of a long vector.
CUT = {
    (6, 384): (((0, 2), (0, 384)), ((2, 6), (0, 384))),
    (3, 4096): (((0, 3), (0, 2048)), ((0, 3), (2048, 4096))),
    (4, 200): (((0, 4), (0, 50)), ((0, 4), (50, 200))),
    LONG: (((0, 1000),), ((1000, LONG[0]),)),
}


@pytest.mark.parametrize("shape", CUT, ids=str)
def test_parts_of_a_tensor_have_their_part_of_the_sum(shape: Any) -> None:
    whole = wide(shape, torch.float32, 3)
    parts = [whole[tuple(slice(*x) for x in cut)].contiguous() for cut in CUT[shape]]
    firsts = [tuple(begin for begin, _ in cut) for cut in CUT[shape]]
    regions = [Region(shape, tuple(x.shape), first) for x, first in zip(parts, firsts, strict=True)]
    launch, found = shares(parts, parts, regions)
    for word, own in found:
        wanted = exact.of_tensors(parts, word == "norm", regions)
        assert [x.value for x in launch.partials(word, own)] == wanted


@pytest.mark.parametrize("form", [exact.SINGLE, exact.DOUBLE], ids=["single", "double"])
@each_of(data=st.data())
def test_limbs_are_rounded_to_the_nearest_double(form: exact.Form, data: st.DataObject) -> None:
    limb = st.integers(-(2**50), 2**50) | st.sampled_from([0, 1, -1, 2**31, 2**32, -(2**32)])
    count = form.limbs - 2
    rows = data.draw(st.lists(st.lists(limb, min_size=count, max_size=count), min_size=1, max_size=5))
    zeros = data.draw(st.integers(0, count))
    table = np.zeros((len(rows) + 4, form.width), dtype=np.int64)
    for place, row in enumerate(rows):
        table[place, :count] = row
        table[place, count - zeros : count] = 0
    table[-3, -3], table[-2, -2], table[-1, -1] = 2, 1, 3
    assert np.array_equal(rounded(table, form), exactly(table), equal_nan=True)


@pytest.mark.parametrize("form", [exact.SINGLE, exact.DOUBLE], ids=["single", "double"])
def test_what_is_halfway_goes_to_the_even_double(form: exact.Form) -> None:
    table = np.zeros((12, form.width), dtype=np.int64)
    table[:, 5] = [sign * (2**53 + more) for more in (1, 3) for sign in (1, -1) for _ in range(3)]
    # And a little more or less than halfway, far below.
    table[:, 1] = [0, 1, -1] * 4
    given = rounded(table, form)
    assert np.array_equal(given, exactly(table))
    assert len(set(map(abs, given))) == 3


def rounded(table: Any, form: exact.Form) -> Any:
    """What a kernel makes of rows of limbs."""
    found = torch.zeros(len(table), dtype=torch.float64, device=DEVICE)
    given = torch.as_tensor(table).to(DEVICE), found, torch.tensor([len(table)], device=DEVICE)
    sizes = {"LIMBS": form.limbs, "LOWEST": form.lowest, "BLOCK": 32}
    kernels.round_rows.run(*given, grid=(1,), warmup=False, **sizes)
    return found.cpu().numpy()


def exactly(table: Any) -> list[float]:
    return [exact.from_limbs(row.tolist()).rounded() for row in table]


@pytest.mark.parametrize(("shape", "aligned"), [((64, 147), True), ((9000,), True), ((3, 12345), False)])
def test_a_launch_knows_whether_16_bytes_can_be_loaded_at_a_time(shape: Any, aligned: bool) -> None:
    """Lines of the last one are longer than a chunk, and begin where they do."""
    optimizer = steprule.Lion([nn.Parameter(torch.zeros(shape).bfloat16())], low_precision="stochastic")
    program = optimizer.program(optimizer.param_groups[0])
    dtypes = dict.fromkeys(("p", "g", "m"), torch.bfloat16) | {"rounding_key": torch.int64}
    launch = gpu_launch.Launch(program, dtypes, [shape], [blocks.whole(shape)], DEVICE)
    assert len(launch._work.cut) > 1
    assert launch._aligned() == aligned == all(start % 16 == 0 for start in launch._work.cut[:, 1])


def in_parts(rank: int) -> None:
    """Rules with sums over one parameter, of which each process has a part."""
    with pytest.MonkeyPatch.context() as patch, small_chunks():
        pretend_a_gpu(patch)
        for rule, name in ((steprule.LAMB, "rows"), (steprule.NovoGrad, "columns")):
            twins(partial(stepping, rule), layouts()[name], steps=2)


def stepping(rule: Any, params: Any) -> Any:
    optimizer = rule(params, fused=True)
    assert "gpu_kernel" in optimizer.explain()
    return optimizer


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_parts_in_several_processes_step_as_the_whole(tmp_path: Path) -> None:
    in_processes(2, "in_parts", tmp_path, "test_gpu_sums")
