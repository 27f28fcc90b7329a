"""The GPU kernels: the reference's numbers to the last bit, on a GPU, or in Triton's interpreter without one.

As for the CPU kernels, the reference is given correctly rounded roots here: ATen's are up to one unit off in
the last place. The interpreter is given the fused multiply-add that every GPU has: its own rounds twice. With
both, only sums over a whole tensor and the words that have no exact answer are left to a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gpu import DEVICE, DTYPES, INTERPRETED, NoLooking, assert_same_numbers, give, parameters
from kernels import exact_roots, has_kernel
from rules import LOOPS, Case, assert_same, each, flat, numbers, options_on
from torch import Tensor, nn

import steprule
from steprule import Elementwise, hyper, slot
from steprule.engine import gpu_counters, gpu_launch, reference
from steprule.engine.kernel_cache import NoKernel
from steprule.words import SCALAR_WORDS, clamp, exp, larger, largest, lerp, log, mean, norm, sign, smaller, sqrt
from steprule.words import where as choose

# Half precision hardly learns, and is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")
CHUNK, BLOCK = 64, 16
# 0-dim, one, none, less than a block, a block and one, a chunk, over two and a bit, many dimensions.
SHAPES = ((), (1,), (0,), (3,), (17,), (CHUNK,), (2 * CHUNK + 21,), (2, 3, 5))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors that are cut up as large ones are; and the hardware's multiply-add."""
    monkeypatch.setattr(gpu_launch, "CHUNK", CHUNK)
    monkeypatch.setattr(gpu_launch, "BLOCK", BLOCK)
    if INTERPRETED:
        import triton.language as tl
        from triton.runtime import interpreter

        assert type(tl.sum).__name__ == "InterpretedFunction", "Triton was imported before TRITON_INTERPRET=1"
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused_multiply_add)
    with np.errstate(all="ignore"):
        yield


def fused_multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    operands = [torch.tensor(operand.data) for operand in (z, x, y)]
    return type(z)(as_array(torch.addcmul(*operands)), z.dtype.scalar)


as_array = Tensor.numpy


class Kernels:
    """Steps an optimizer of one group by its kernels alone, with its counts on the host or on the device."""

    def __init__(self, optimizer: Any, counts: str = "host"):
        self.optimizer = optimizer
        (self.group,) = optimizer.param_groups
        self.params = [p for p in self.group["params"] if p.grad is not None]
        self.states = [optimizer.state_of(p, self.group) for p in self.params]
        self.program = optimizer.program(self.group)
        self.columns = {"p": self.params, "g": [p.grad for p in self.params]}
        for letter, declared in self.program.slots.items():
            self.columns[letter] = [state[declared.key] for state in self.states]
        dtypes = {name: column[0].dtype for name, column in self.columns.items()}
        lengths = [p.numel() for p in self.params]
        self.launch = gpu_launch.Launch(self.program, dtypes, lengths, DEVICE)
        keys = ["step"] * ("step" in self.states[0])
        keys += [declared.key for declared in self.program.scalar_slots.values()]
        arguments = (self.program, keys, self.states, DEVICE, self.launch.dtype)
        self.counters = gpu_counters.DeviceCounters(*arguments) if counts == "device" else None

    def step(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        self.columns["g"] = [p.grad for p in self.params]
        for name, column in self.columns.items():
            self.launch.place(name, [x.data_ptr() for x in column])
        with torch.no_grad():
            if self.counters is None:
                self.launch.run([self._scalars(s) for s in self.states], np.arange(len(self.states)))
                return
            scaling = None
            if (grad_scale, found_inf) != (None, None):
                scaling = self.counters.scaling(grad_scale, found_inf)
            scalars, rows, after = self.counters.next(self.group)
            self.launch.run(scalars, rows, scaling)
            self.counters.advance(after, scaling)

    def _scalars(self, state: dict[str, Any]) -> list[float]:
        state.get("step", torch.zeros(())).add_(1)
        own = {letter: state[slot.key].item() for letter, slot in self.program.scalar_slots.items()}
        t = state["step"].item() if "step" in state else math.nan
        operands, new = self.program.scalars(self.group, t, own)
        for letter, value in zip(self.program.scalar_outputs, new, strict=True):
            state[self.program.scalar_slots[letter].key].fill_(value)
        return [float(x) for x in operands]


def both(case: Case, dtype: torch.dtype, shapes: Any = SHAPES, **options: Any) -> tuple[Any, Any]:
    """The same optimizer twice: one for the kernels, one for the loop that they must equal."""
    made = [case.rule(parameters(shapes, dtype, where), **case.options, **options) for where in (DEVICE, "cpu")]
    made[1].param_groups[0]["foreach"] = False
    return made[0], made[1]


def advance(case: Case, given: Any, loop: Any) -> None:
    """Three steps of both from the same gradients."""
    give(given, 0)
    kernels = Kernels(given)
    for step in range(3):
        for optimizer in (given, loop):
            give(optimizer, step)
            case.prepare(optimizer)
        kernels.step()
        loop.step()


# Rules


@exact_roots()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(has_kernel, among=LOOPS)
def test_every_rule_equals_the_loop_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    given, loop = both(case, dtype)
    advance(case, given, loop)
    assert_same_numbers(given, loop)


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


# Words


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
    """Infinities, zeros, what is not a number, what is almost zero: each against each.

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


class Powered(Elementwise):
    """A power of numbers by numbers.

    When: never.

        θ ← θ^g

    State: none.
    Source: none.
    """

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return steprule.words.becomes(p**g)


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


class Reduced(Elementwise):
    """Reductions over the tensor, one of them of what another one gave.

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


def in_double(x: Tensor, sum_of: Any) -> Tensor:
    return sum_of(x.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_are_those_of_double_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit if they are rounded to single, as two orders of a sum in double then are almost always."""
    monkeypatch.setitem(reference.WORDS, "mean", lambda x: in_double(x, torch.mean))
    monkeypatch.setitem(reference.WORDS, "norm", lambda x: in_double(x, lambda y: y.square().sum().sqrt()))
    shapes = [shape for shape in SHAPES if math.prod(shape)]
    given, loop = both(Case(Reduced), dtype, shapes)
    advance(Case(Reduced), given, loop)
    if dtype != torch.float64:
        assert_same_numbers(given, loop)
    for one, other in zip(flat(given), flat(loop), strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-13, atol=1e-14)


def test_reductions_come_out_the_same_every_time() -> None:
    results: list[Tensor] = []
    for _ in range(2):
        param = nn.Parameter(numbers((9 * CHUNK + 7,), torch.float32, 1).to(DEVICE))
        param.grad = numbers((9 * CHUNK + 7,), torch.float32, 2).to(DEVICE)
        Kernels(Reduced([param])).step()
        results.append(param.detach())
    assert_same(results[0], results[1])


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
    """Single numbers of all sizes into half ones: ties, the largest, subnormal ones, what is no number."""
    monkeypatch.setattr(gpu_launch, "CHUNK", 1 << 13)
    monkeypatch.setattr(gpu_launch, "BLOCK", 1 << 10)
    bits = torch.arange(-(1 << 31), 1 << 31, 104729).to(torch.int32)
    ties = (torch.arange(-(1 << 15), 1 << 15, 37) * 65536 + 32768).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), torch.tensor(ODD)])
    optimizer = steprule.SGD([nn.Parameter(torch.zeros(len(values), dtype=dtype, device=DEVICE))], lr=1.0)
    (param,), (group,) = flat(optimizer), optimizer.param_groups
    gradient, program = -values.to(DEVICE), optimizer.program(group)
    launch = gpu_launch.Launch(program, {"p": dtype, "g": torch.float32}, [len(values)], DEVICE)
    launch.place("p", [param.data_ptr()])
    launch.place("g", [gradient.data_ptr()])
    launch.run([program.scalars(group, math.nan, {})[0]], np.zeros(1, dtype=np.int64))
    given, wanted = param.detach().cpu(), (values + 0.0).to(dtype)
    assert torch.equal(given.isnan(), wanted.isnan())
    assert_same(given.nan_to_num(7.0), wanted.nan_to_num(7.0))


# Memory


def test_nothing_outside_the_tensors_is_touched() -> None:
    """Tensors at odd places of one buffer, none of them where 16 bytes begin."""
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
    """A chunk that starts far behind its tensor's first entry, as in a tensor of 2³⁴ numbers."""
    far = 1 << 34
    param = nn.Parameter(numbers((CHUNK,), torch.float32, 1).to(DEVICE))
    param.grad = numbers((CHUNK,), torch.float32, 2).to(DEVICE)
    wanted = torch.add(param.detach(), param.grad, alpha=-0.5)
    kernels = Kernels(steprule.SGD([param], lr=0.5))
    kernels.launch._chunks[0, 1] = far
    for name, tensor in (("p", param), ("g", param.grad)):
        kernels.launch.place(name, [tensor.data_ptr() - 4 * far])
    kernels.launch.run([kernels._scalars({})], np.zeros(1, dtype=np.int64))
    assert_same(param.detach(), wanted)


def test_chunks_of_a_tensor_of_more_than_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_launch, "CHUNK", 1 << 20)
    length = (1 << 34) + 5
    chunks = gpu_launch._chunks(np.array([3, length]))
    assert chunks[0].tolist() == [0, 0, 3]
    assert chunks[-1].tolist() == [1, 1 << 34, 5]
    assert chunks[:, 2].sum() == length + 3


class Sent:
    """What a launch sends to the device and starts there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch: gpu_launch.Launch):
        self.arrays: list[Any] = []
        self.launches: list[dict[str, Any]] = []
        send, (kernel, _) = launch._send, launch._kernels[0]
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


def test_a_kernel_that_does_not_compile_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*tables: Any, **options: Any) -> Any:
        raise RuntimeError("no such word")

    monkeypatch.setattr(gpu_launch.Launch, "_launch", fail)
    with pytest.raises(NoKernel, match="no kernel could be made"):
        Kernels(with_gradients())


# Counts on the device


@exact_roots()
@each(lambda case: has_kernel(case) and bool(case.options or not options_on(case.rule)), among=LOOPS)
def test_counts_on_the_device_give_the_same_numbers_and_are_never_looked_at(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scalars are made of ATen's double powers and roots rather than C's, and rounded to single last."""
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
    assert set(gpu_counters.WORDS) == set(SCALAR_WORDS)
    values = {
        "sqrt": [(2.0,), (0.0,), (-1.0,)],
        "exp": [(1.5,), (-30.0,)],
        "log": [(2.0,), (0.0,), (-1.0,)],
        "sign": [(2.0,), (-0.5,), (0.0,)],
        "larger": [(1.0, 2.0), (2.0, 1.0), (math.nan, 1.0)],
        "smaller": [(1.0, 2.0), (2.0, 1.0), (math.nan, 1.0)],
        "as_stored": [(0.1,), (1e-30,)],
        "select": [(True, 0.1, 0.2), (False, 0.1, 0.2)],
    }
    for word, rows in values.items():
        for row in rows:
            tables = [torch.tensor([x], dtype=torch.float64) for x in row]
            given = gpu_counters.WORDS[word](*tables).item()
            assert given == pytest.approx(SCALAR_WORDS[word](*row), rel=1e-15, nan_ok=True), (word, row)


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
