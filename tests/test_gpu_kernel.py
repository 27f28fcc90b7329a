"""The GPU kernels: rules, memory, counts on the device; on a GPU, otherwise in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gpu import (
    BLOCK,
    CHUNK,
    DEVICE,
    DTYPES,
    INTERPRETED,
    SHAPES,
    Kernels,
    NoLooking,
    advance,
    assert_same_numbers,
    both,
    by_shape,
    give,
    parameters,
    small_chunks,
)
from kernels import Reduced, exact_roots, has_angles, has_kernel
from rules import LOOPS, Case, assert_same, by_lines, each, flat, numbers, options_on, uses_curvature
from torch import Tensor, nn

import steprule
from steprule.engine import blocks
from steprule.engine.runners.kernels.cache import NoKernel
from steprule.engine.runners.kernels.chunks import chunks
from steprule.engine.runners.kernels.gpu import counters as gpu_counters
from steprule.engine.runners.kernels.gpu import kernel as gpu_kernel
from steprule.engine.runners.kernels.gpu import launch as gpu_launch
from steprule.plain import DOUBLE_WORDS

# Half precision hardly learns, and is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")


@pytest.fixture(autouse=True)
def cut_up_small() -> Iterator[None]:
    with small_chunks():
        yield


# Rules


@exact_roots()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(lambda case: has_kernel(case) and not case.shares, among=LOOPS)
def test_every_rule_equals_the_loop_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    """What shares sums between parameters is in test_levels.py and test_parameter_free.py."""
    given, loop = both(case, dtype)
    program = loop.program(loop.param_groups[0])
    if dtype == torch.float64 and gpu_kernel.why_not(program, dict.fromkeys(program.inputs, dtype)):
        with pytest.raises(NoKernel, match="in double precision"):
            advance(case, given, loop)
        return
    advance(case, given, loop)
    if case.rule.sums_as_torch or case.rule.on_matrices:
        for one, other in zip(flat(given), flat(loop), strict=True):
            torch.testing.assert_close(one.detach().cpu(), other.detach())
        return
    # On a GPU, powers of what is kept once per tensor are ATen's.
    powers = not INTERPRETED and any(slot.per_tensor for slot in program.scalar_slots.values())
    if dtype != torch.float64 or not (by_lines(case.rule) or has_angles(case) or powers):
        assert_same_numbers(given, loop)
        return
    # Sums along rows are in another order, and angles in double are not C's.
    for one, other in zip(flat(given), flat(loop), strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-12, atol=1e-12)


@exact_roots()
def test_slots_wider_than_their_parameter() -> None:
    case = Case(steprule.AdamW)
    given, loop = both(case, torch.bfloat16)
    for optimizer in (given, loop):
        optimizer.init_state()
        for state in optimizer.state.values():
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].float(), state["exp_avg_sq"].half()
    advance(case, given, loop)
    assert_same_numbers(given, loop)


@exact_roots()
def test_tensors_that_have_taken_different_numbers_of_steps() -> None:
    case = Case(steprule.NAdam)
    given, loop = both(case, torch.float32)
    for optimizer in (given, loop):
        optimizer.init_state()
        for place, state in enumerate(optimizer.state.values()):
            state["step"] += 3 * (place % 3)
            state["mu_product"] *= 0.9 ** (place % 3)
    advance(case, given, loop)
    assert_same_numbers(given, loop)


# Memory


def test_nothing_outside_the_tensors_is_touched() -> None:
    """Tensors at odd positions of one buffer, none of them aligned to 16 bytes."""
    lengths = [1, BLOCK, 5, CHUNK + 3, 2]
    for dtype in (torch.float32, torch.bfloat16):
        made: list[Any] = []
        buffers: list[Tensor] = []
        for where in (DEVICE, torch.device("cpu")):
            buffer = torch.full((400,), 7.0, dtype=dtype, device=where)
            starts = [3 + sum(lengths[:i]) + 9 * i for i in range(len(lengths))]
            params = [nn.Parameter(buffer[a : a + n]) for a, n in zip(starts, lengths, strict=True)]
            optimizer = steprule.SGD(params, lr=0.1, foreach=False)
            give(optimizer, 1)
            made.append(optimizer)
            buffers.append(buffer)
        Kernels(made[0]).step()
        made[1].step()
        assert_same(buffers[0].cpu(), buffers[1])


def test_offsets_beyond_32_bits() -> None:
    """A chunk that starts far after its tensor's first element, as in a tensor of 2³⁴ elements."""
    far = 1 << 34
    param = nn.Parameter(numbers((CHUNK,), torch.float32, 1).to(DEVICE))
    param.grad = numbers((CHUNK,), torch.float32, 2).to(DEVICE)
    wanted = torch.add(param.detach(), param.grad, alpha=-0.5)
    kernels = Kernels(steprule.SGD([param], lr=0.5))
    kernels.launch._work.parts[0].chunks[0, 1] = far
    for name, tensor in (("p", param), ("g", param.grad)):
        kernels.launch.place(name, [tensor.data_ptr() - 4 * far])
    kernels.launch.run([kernels.scalars({})], [0])
    assert_same(param.detach(), wanted)


def test_chunks_of_a_tensor_of_more_than_32_bits() -> None:
    length = (1 << 34) + 5
    cut = chunks(np.array([3, length]), 1 << 20)
    assert cut[0].tolist() == [0, 0, 3]
    assert cut[-1].tolist() == [1, 1 << 34, 5]
    assert cut[:, 2].sum() == length + 3


class Sent:
    """What a launch sends to the device, and the kernels it starts there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch: gpu_launch.Launch):
        self.arrays: list[Any] = []
        self.launches: list[dict[str, Any]] = []
        send, kernel = launch._send, launch._kernels[0].kernel
        run = kernel.run

        def note_array(array: Any, dtype: Any = None) -> Tensor:
            self.arrays.append(array)
            return send(array, dtype)

        def note_launch(*tables: Any, **options: Any) -> Any:
            self.launches.append(options)
            return run(*tables, **options)

        monkeypatch.setattr(launch, "_send", note_array)
        monkeypatch.setattr(kernel, "run", note_launch)


def test_one_launch_for_all_tensors_and_addresses_sent_only_when_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = steprule.AdamW(parameters(SHAPES, torch.float32))
    give(optimizer, 0)
    kernels = Kernels(optimizer)
    kernels.step()
    sent = Sent(monkeypatch, kernels.launch)
    for lr in (0.1, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        kernels.step()
    assert len(sent.launches) == 2
    assert [len(array) for array in sent.arrays] == [len(SHAPES)] * 2  # the scalars, and nothing else
    kept = [p.grad for p in flat(optimizer)]
    give(optimizer, 1)
    kernels.step()
    assert len(sent.arrays) == 4
    assert len(kept) == len(SHAPES)
    assert sent.launches[-1]["ALIGNED"]
    assert not sent.launches[-1]["enable_fp_fusion"]


def test_a_tensor_may_change_its_row_of_scalars_at_any_step() -> None:
    optimizer = steprule.SGD([nn.Parameter(torch.ones(5, device=DEVICE)) for _ in range(2)])
    for param in flat(optimizer):
        param.grad = torch.ones_like(param)
    kernels = Kernels(optimizer)
    kernels.step()
    first = kernels.program.scalars[0].function
    scalars = [first({**kernels.group, "lr": lr}, math.nan, {})[0] for lr in (0.0, 0.25)]
    for rows in ([0, 0], [0, 1], [1, 0]):
        before = [param.detach().clone() for param in flat(optimizer)]
        kernels.launch.run(scalars, rows)
        for param, old, row in zip(flat(optimizer), before, rows, strict=True):
            assert_same(param.detach(), old - 0.25 * row)


def test_a_gradient_at_an_odd_address_is_not_read_16_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.ones(40, device=DEVICE))
    param.grad = torch.ones(41, device=DEVICE)[1:]
    kernels = Kernels(steprule.SGD([param], lr=0.5))
    sent = Sent(monkeypatch, kernels.launch)
    kernels.step()
    assert not sent.launches[-1]["ALIGNED"]
    assert_same(param.detach(), torch.full_like(param, 0.5))


def test_a_captured_step_has_a_pointer_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.ones(4, device=DEVICE))
    param.grad = torch.ones_like(param)
    kernels = Kernels(steprule.SGD([param], lr=0.5), "device")
    kernels.step()
    own = kernels.launch._sent[1]
    monkeypatch.setattr(gpu_launch, "_captured", [])
    monkeypatch.setattr(gpu_launch, "_capturing", lambda device: True)
    kernels.step()
    ((launch, table),) = gpu_launch._captured
    assert launch is kernels.launch
    assert table is not own
    assert_same(table, own)


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_launch, "find_spec", lambda name: None if name == "triton" else object())
    monkeypatch.setattr(gpu_launch, "missing", gpu_launch.missing.__wrapped__)
    with pytest.raises(NoKernel, match="triton is not installed"):
        Kernels(with_gradients())


def test_a_device_that_triton_does_not_know_has_no_kernel() -> None:
    assert gpu_launch.missing(torch.device("mps")) == "Triton makes no kernels for mps"


def with_gradients() -> Any:
    optimizer = steprule.SGD(parameters(SHAPES, torch.float32))
    give(optimizer, 0)
    return optimizer


def test_no_kernel_takes_whole_numbers() -> None:
    optimizer = steprule.SGD(parameters(SHAPES, torch.float32))
    program = optimizer.program(optimizer.param_groups[0])
    with pytest.raises(NoKernel, match=r"'g' in torch\.int32"):
        gpu_launch.Launch(program, {"p": torch.float32, "g": torch.int32}, [(1,)], [blocks.whole((1,))], DEVICE)


def test_a_kernel_that_does_not_compile_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*tables: Any, **options: Any) -> Any:
        raise RuntimeError("no such word")

    monkeypatch.setattr(gpu_launch.Launch, "_launch", fail)
    with pytest.raises(NoKernel, match="no kernel could be made"):
        Kernels(with_gradients())


# Counts on the device


@exact_roots()
@each(
    lambda case: (
        has_kernel(case)
        and not (case.shares or by_shape(case) or (uses_curvature(case.rule) and not INTERPRETED))
        and bool(case.options or not options_on(case.rule))
    ),
    among=LOOPS,
)
def test_counts_on_the_device_give_the_same_numbers_and_are_never_looked_at(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scalars use ATen's double powers and roots instead of C's, and are rounded to single at the end."""
    given, loop = both(case, torch.float32, SHAPES[:5])
    given.init_state()
    for place, state in enumerate(given.state.values()):
        state.get("step", torch.zeros(())).fill_(place % 3)
    loop.load_state_dict(given.state_dict())
    given.param_groups[0]["lr"] = torch.tensor(given.param_groups[0]["lr"], dtype=torch.float64, device=DEVICE)
    kernels = None
    for step in range(4):
        for optimizer in (given, loop):
            give(optimizer, step)
            case.prepare(optimizer)
        kernels = kernels or Kernels(given, "device")
        with monkeypatch.context() as looking, NoLooking():
            looking.setattr(Tensor, "numpy", None)
            kernels.step()
        loop.step()
    for one, other in zip(flat(given), flat(loop), strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=3e-7, atol=3e-7)
        for key, value in loop.state[other].items():
            torch.testing.assert_close(given.state[one][key].cpu(), value, rtol=3e-7, atol=1e-9)


def test_words_of_scalars_are_the_same_on_tables() -> None:
    assert set(gpu_counters.WORDS) == set(DOUBLE_WORDS)
    values = {
        "sqrt": [(2.0,), (0.0,), (-1.0,)],
        "exp": [(1.5,), (-30.0,)],
        "log": [(2.0,), (0.0,), (-1.0,)],
        "atan2": [(1.0, 2.0), (-1.0, -2.0), (0.0, 0.0), (0.0, -1.0)],
        "sign": [(2.0,), (-0.5,), (0.0,)],
        "larger": [(1.0, 2.0), (2.0, 1.0), (math.nan, 1.0)],
        "smaller": [(1.0, 2.0), (2.0, 1.0), (math.nan, 1.0)],
        "as_stored": [(0.1,), (1e-30,)],
        "select": [(True, 0.1, 0.2), (False, 0.1, 0.2)],
        "power": [(2.0, 0.3), (0.0, -1.0), (-8.0, 1.0), (-8.0, 0.5)],
    }
    assert set(values) == set(DOUBLE_WORDS)
    for word, rows in values.items():
        for row in rows:
            tables = [torch.tensor([x], dtype=torch.float64) for x in row]
            given = gpu_counters.WORDS[word](*tables).item()
            assert given == pytest.approx(DOUBLE_WORDS[word](*row), rel=1e-15, nan_ok=True), (word, row)


# Gradient scalers


def unscaled(optimizer: Any, factor: Tensor) -> None:
    for param in flat(optimizer):
        param.grad = param.grad * factor.item()


@exact_roots()
@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
def test_scaled_gradients_are_unscaled_as_a_scaler_would(scale: float) -> None:
    given, loop = both(Case(steprule.NAdam), torch.float32)
    grad_scale = torch.tensor(scale, device=DEVICE)
    give(given, 1, scale)
    give(loop, 1, scale)
    before = [p.grad.clone() for p in flat(given)]
    Kernels(given, "device").step(grad_scale, torch.zeros(1, device=DEVICE))
    unscaled(loop, torch.tensor(scale).double().reciprocal().float())
    loop.step()
    assert_same([p.grad for p in flat(given)], before)
    assert_same_numbers(given, loop)


@pytest.mark.parametrize("rule", [steprule.NAdam, steprule.ASGD, steprule.SGD, Reduced])
def test_a_step_that_is_skipped_moves_nothing(rule: Any) -> None:
    optimizer = rule(parameters(SHAPES, torch.float32), lr=0.1)
    give(optimizer, 0)
    kernels = Kernels(optimizer, "device")
    kernels.step()
    state = [{k: v.clone() for k, v in s.items()} for s in kernels.states]
    before = [p.detach().clone() for p in flat(optimizer)]
    give(optimizer, 1, math.inf)
    with NoLooking():
        found = torch.ones(1, device=DEVICE)
        kernels.step(torch.tensor(8.0, device=DEVICE), found)
    assert_same([p.detach() for p in flat(optimizer)], before)
    assert_same(kernels.states, state)
    give(optimizer, 1)
    kernels.step(None, found * 0)
    assert not torch.equal(flat(optimizer)[5], before[5])
