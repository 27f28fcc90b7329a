"""State in codes and 16-bit parameters with extra bits: GPU kernels store the same bits as the loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu import DEVICE, Kernels, NoLooking, advance, assert_same_numbers, both, give, parameters, small_chunks
from kernels import exact_roots, has_kernel
from rules import LOOPS, Case, each, flat, options_on
from test_storage_runners import KEPT, STORAGES, can_keep
from torch import Tensor, nn

import steprule
from steprule.engine import blocks, storage

# Updates that round away in 16 bits do not matter in these tests.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")
# Blocks that end early and blocks that fill a chunk, lines that end within a block, and blocks of 90 and of 32.
# Codes are for tensors of this size and more.
SHAPES = ((storage.SMALLEST + 600,), (storage.SMALLEST,), (15, 300), (50, 90), (2, 2304))


@pytest.fixture(autouse=True)
def a_few_blocks_a_chunk() -> Iterator[None]:
    with small_chunks(16 * blocks.BLOCK, 8 * blocks.BLOCK):
        yield


@exact_roots()
@pytest.mark.parametrize("name", KEPT)
@each(lambda case: has_kernel(case) and (case.options or not options_on(case.rule)), among=LOOPS)
def test_the_kernel_keeps_what_the_loop_keeps(case: Case, name: str) -> None:
    if not can_keep(case, name):
        pytest.skip("the rule refuses this storage")
    dtype, options = STORAGES[name]
    given, loop = both(case, dtype, SHAPES, **options)
    advance(case, given, loop)
    assert_same_numbers(given, loop)


@exact_roots()
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e-18, 1e15, float("inf"), float("nan")])
@pytest.mark.parametrize("rule", [steprule.AdamW, steprule.Lion, steprule.AdaBelief])
def test_codes_of_extreme_numbers_are_the_loops(rule: Any, size: float) -> None:
    """One block of only this value, and one with a single extreme value."""
    case = Case(rule)
    given, loop = both(case, torch.float32, SHAPES[1:2], state_dtype="int8")
    give(given, 0)
    kernels = Kernels(given)
    for step in range(2):
        for optimizer in (given, loop):
            give(optimizer, step)
            (param,) = flat(optimizer)
            param.grad[:256] *= size
            param.grad[700] *= size
        kernels.step()
        loop.step()
    (one,), (other,) = flat(given), flat(loop)
    for slot in rule.slots.values():
        if storage.holds(loop.state[other], slot.key) and not slot.per_tensor:
            pair = [storage.load(o.state[p], slot.key).cpu() for o, p in ((given, one), (loop, other))]
            assert torch.equal(*(x.isfinite() for x in pair))
            assert torch.equal(*(torch.where(x.isfinite(), x, 0.0) for x in pair))


def test_a_skipped_step_leaves_the_keys_and_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = steprule.AdamW(parameters(SHAPES, torch.float32), state_dtype="int8")
    give(optimizer, 0)
    kernels = Kernels(optimizer, "device")
    kernels.step()
    before = [{key: value.clone() for key, value in state.items()} for state in kernels.states]
    found = torch.ones(1, device=DEVICE)
    with monkeypatch.context() as looking, NoLooking():
        looking.setattr(Tensor, "numpy", None)
        kernels.step(torch.tensor(8.0, device=DEVICE), found)
    for state, kept in zip(kernels.states, before, strict=True):
        assert all(torch.equal(state[key], kept[key]) for key in kept)
    kernels.step(torch.tensor(8.0, device=DEVICE), found * 0)
    for state, kept in zip(kernels.states, before, strict=True):
        assert not torch.equal(state["slot_rounding_key"], kept["slot_rounding_key"])


def test_nothing_behind_a_tensor_is_touched() -> None:
    """Codes, scales and parameters of a tensor that ends within a block."""
    length = storage.SMALLEST + 5
    param = nn.Parameter(torch.randn(length, device=DEVICE))
    optimizer = steprule.AdamW([param], state_dtype="int8")
    give(optimizer, 0)
    optimizer.init_state()
    state, wide = optimizer.state[param], {}
    for key in ("exp_avg_codes", "exp_avg_sq_codes", "exp_avg_scale", "exp_avg_sq_scale"):
        wide[key] = torch.full((state[key].numel() + 300,), 7, dtype=state[key].dtype, device=DEVICE)
        state[key] = wide[key][: state[key].numel()].copy_(state[key])
    Kernels(optimizer).step()
    for key, buffer in wide.items():
        assert (buffer[state[key].numel() :] == 7).all(), key
