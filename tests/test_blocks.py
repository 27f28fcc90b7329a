"""Lines and blocks: what every part of a tensor has to agree on with the whole."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steprule.engine import blocks
from steprule.engine.blocks import Layout, Region

CPU = torch.device("cpu")
LAYOUTS = (blocks.layout, blocks.layout_of_sums)


@pytest.mark.parametrize(
    ("shape", "expected"),
    {
        (): Layout((), 1, 1),
        (7,): Layout((), 7, 7),
        (0,): Layout((), 0, 1),
        (1000,): Layout((), 1000, 128),
        (4096,): Layout((), 4096, 128),
        (6, 5): Layout((6,), 5, 5),
        (6, 0): Layout((6,), 0, 1),
        (300, 70): Layout((300,), 70, 70),
        (2, 1000): Layout((2,), 1000, 128),
        (2, 4096): Layout((2,), 4096, 128),
        (2, 11008): Layout((2,), 11008, 32),
        (2, 14336): Layout((2,), 14336, 128),
        (2, 4608): Layout((2,), 4608, 64),
        (2, 2052): Layout((2,), 2052, 128),
        (64, 3, 3, 3): Layout((64,), 27, 27),
        (64, 64, 3, 3): Layout((64,), 576, 128),
        (64, 64, 7, 7): Layout((64, 64), 49, 49),
        (768, 1, 7, 7): Layout((768, 1), 49, 49),
        (8, 256, 512): Layout((8, 256), 512, 128),
    }.items(),
)
def test_known_shapes(shape: tuple[int, ...], expected: Layout) -> None:
    assert blocks.layout(shape) == expected


def test_elements_of_short_vectors_are_blocks_of_sums() -> None:
    assert blocks.layout_of_sums((1 << 16,)) == Layout((), 1 << 16, 1)
    assert blocks.layout_of_sums(((1 << 16) + 1,)) == Layout((), (1 << 16) + 1, 128)
    assert blocks.layout_of_sums((5, 3)) == blocks.layout((5, 3))


@pytest.mark.parametrize("line", [2048, 2304, 4096, 8192, 11008, 12288, 13824, 28672])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_eight_processes_can_share_wide_lines(line: int, processes: int) -> None:
    for shape, dimension in (((3, line), 1), ((line,), 0)):
        size = line // processes
        for process in range(processes):
            local, first = list(shape), [0] * len(shape)
            local[dimension], first[dimension] = size, process * size
            region = Region(shape, tuple(local), tuple(first))
            assert not blocks.cuts(blocks.layout(shape), region)


shapes = st.lists(st.integers(0, 40), max_size=4).map(tuple) | st.tuples(
    st.integers(1, 3), st.integers(1, 3) | st.just(1), st.sampled_from([100, 129, 200, 256, 300, 2304])
)


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """A shape, and the regions that cuts along each dimension make of it."""
    shape = draw(shapes.filter(lambda x: math.prod(x) < 20_000))
    cuts: list[list[int]] = []
    for size in shape:
        step = draw(st.sampled_from([1, 1, 3, 32, 128]))
        inner = draw(st.lists(st.integers(0, size // step).map(lambda x, s=step: x * s), max_size=2))
        cuts.append(sorted([0, *inner, size]))
    parts = product(*(list(pairwise(x)) for x in cuts))
    regions = [Region(shape, tuple(b - a for a, b in part), tuple(a for a, _ in part)) for part in parts]
    return shape, regions


def slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(region.first, region.shape, strict=True))


@given(grids(), st.sampled_from(LAYOUTS))
@settings(max_examples=150, deadline=None)
def test_parts_have_the_numbers_of_the_whole(grid: tuple[tuple[int, ...], list[Region]], kind: object) -> None:
    shape, regions = grid
    own: Layout = kind(shape)  # type: ignore[operator]
    assert own.lines * own.line == math.prod(shape)
    numbers, inside = blocks.places(own, blocks.whole(shape), CPU)
    flat = numbers * own.block + inside
    if own.line % own.block == 0:
        assert torch.equal(flat.reshape(-1), torch.arange(flat.numel()))
    assert len(flat.reshape(-1).unique()) == flat.numel()
    order = blocks.positions(blocks.whole(shape), CPU)
    assert torch.equal(order.reshape(-1), torch.arange(order.numel()))
    sizes = torch.bincount(numbers.reshape(-1), minlength=math.prod(own.scales))
    for region in regions:
        here, where = blocks.places(own, region, CPU)
        assert torch.equal(here, numbers[slices(region)])
        assert torch.equal(where, inside[slices(region)])
        assert torch.equal(blocks.positions(region, CPU), order[slices(region)])
        counted = torch.bincount(here.reshape(-1), minlength=len(sizes))
        cut = bool(((counted > 0) & (counted < sizes)).any())
        assert blocks.cuts(own, region) == cut
        scales = blocks.scales_of(own, region)
        if not cut and not region.empty:
            kept = torch.arange(math.prod(own.scales)).reshape(own.scales)[slices(scales)]
            assert torch.equal(kept.reshape(-1), here.reshape(-1).unique())
            assert kept.shape == scales.shape


@given(grids(), st.sampled_from(LAYOUTS))
@settings(max_examples=150, deadline=None)
def test_runs_are_the_lines_of_a_part(grid: tuple[tuple[int, ...], list[Region]], kind: object) -> None:
    shape, regions = grid
    own: Layout = kind(shape)  # type: ignore[operator]
    for region in regions:
        part = blocks.part_of(own, region)
        order = blocks.positions(region, CPU).reshape(-1)
        if part is None:
            assert len(own.leading) < len(shape) - 1  # only of a line that several dimensions hold
            continue
        lines = [number + i for count, number in part.runs for i in range(count)]
        found = [line * own.line + part.place + i for line in lines for i in range(part.width)]
        assert found == order.tolist()
        rows_cut = len(shape) < 2 or region.shape[1:] == region.whole[1:]
        assert len(part.runs) <= 1 or not rows_cut
