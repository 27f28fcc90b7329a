"""Random numbers in rules: which ones they are, in every runner, and that they are random."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import in_processes
from papers import draws as meant
from rules import assert_same, flat, numbers
from scipy import special
from torch import nn

import steprule
from steprule import Elementwise, hyper, slot
from steprule.declare import Matrix, Modifier
from steprule.engine import draws
from steprule.words import becomes, coin, gaussian, mean, norm, sqrt, where

RUNNERS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "lists": {"foreach": True},
    "kernel": {"fused": True},
}
# No element, one, several chunks of a kernel, several pieces of a draw.
SHAPES = ((), (0, 3), (5, 7), (3, 40_000), (draws.PIECE + 300,))


class Drawn(Elementwise):
    """What it draws is kept: a coin in the parameter, two gaussians in slots."""

    lr: float = hyper(0.1)
    seed: int = hyper(default=0, at_least=0)

    first, second = slot("first"), slot("second")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.first, s.second = gaussian(), gaussian()
        return becomes(coin())


def drawn(
    shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, steps: int = 1, rule: Any = Drawn, **options: Any
) -> Any:
    optimizer = rule([nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes], **options)
    for _ in range(steps):
        advance(optimizer)
    return optimizer


def advance(optimizer: Any) -> None:
    for param in flat(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()


def assert_drawn(optimizer: Any, step: int, seed: int = 0) -> None:
    """The numbers of the given step, from 0."""
    for place, param in enumerate(flat(optimizer)):
        found = {"first": (0, meant.gaussian), "second": (1, meant.gaussian), "coin": (2, meant.coin)}
        for key, (draw, wanted) in found.items():
            given = param.detach() if key == "coin" else optimizer.state[param][key]
            array = np.asarray(wanted(tuple(param.shape), place, step, draw=draw, seed=seed))
            assert_same(given, torch.from_numpy(array).to(given.dtype))


# Which numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("runner", RUNNERS)
def test_they_are_the_meant_ones_in_every_runner(runner: str, dtype: torch.dtype) -> None:
    for step in range(2):
        assert_drawn(drawn(dtype=dtype, steps=step + 1, seed=7, **RUNNERS[runner]), step, seed=7)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**80 + 3])
def test_every_seed_has_its_own(seed: int) -> None:
    assert_drawn(drawn(((4, 5),), seed=seed), 0, seed)


def test_they_have_nothing_to_do_with_torchs_seed() -> None:
    """So copies of a model stay equal, however each process is seeded."""
    torch.manual_seed(1)
    one = drawn(((50,),), steps=2)
    torch.manual_seed(2)
    torch.randn(3)
    assert_same(drawn(((50,),), steps=2).state_dict(), one.state_dict())


def test_a_parameter_counts_its_own_steps() -> None:
    optimizer = drawn(((6,), (6,)), steps=3)
    one, other = flat(optimizer)
    one.grad = None
    optimizer.step()
    first = {p: optimizer.state[p]["first"] for p in (one, other)}
    for place, (param, step) in enumerate(((one, 2), (other, 3))):
        assert_same(first[param], torch.from_numpy(meant.gaussian((6,), place, step)).float())


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_step_that_is_skipped_draws_nothing(runner: str) -> None:
    optimizer = drawn(((6,),), nonfinite="skip", **RUNNERS[runner])
    (param,) = flat(optimizer)
    param.grad = torch.full((6,), torch.nan)
    optimizer.step()
    advance(optimizer)
    assert_drawn(optimizer, 1)


def test_the_order_in_memory_makes_no_difference() -> None:
    shape = (2, 4, 5, 3)
    for runner in RUNNERS.values():
        start = torch.zeros(shape).to(memory_format=torch.channels_last)
        optimizer = Drawn([nn.Parameter(start)], **{**runner, "fused": None})
        advance(optimizer)
        assert_drawn(optimizer, 0)
    with pytest.raises(RuntimeError, match="not in memory in the order in which random numbers are drawn"):
        advance(Drawn([nn.Parameter(start.clone())], fused=True))


def test_complex_numbers_have_two_each() -> None:
    for runner in ("loop", "lists"):
        optimizer = drawn(((3, 2),), torch.complex64, **RUNNERS[runner])
        (param,) = flat(optimizer)
        wanted = torch.from_numpy(meant.gaussian((3, 2, 2), 0, 0)).float()
        assert_same(torch.view_as_real(optimizer.state[param]["first"]), wanted)


class Lined(Elementwise):
    """Draws between a sum of each row and one of all, in several sweeps."""

    lr: float = hyper(0.1)
    seed: int = hyper(default=0, at_least=0)

    m = slot("m")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        x = gaussian()
        y = x / norm(x, over="row")
        s.m = x
        return where(mean(y) > 2, 1.0, coin() * norm(x, over="all")) * y


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"low_precision": "stochastic"}], ids=str)
def test_each_sweep_draws_the_same_numbers(options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "low_precision" in options else torch.float32
    shapes = ((70, 300), (9000,), (3,))
    loop, kernel = (
        drawn(shapes, dtype, 3, Lined, **options, **RUNNERS[runner]) for runner in ("loop", "kernel")
    )
    for one, other in zip(flat(loop), flat(kernel), strict=True):
        for key, value in loop.state[one].items():
            assert_same(kernel.state[other][key], value)
        torch.testing.assert_close(other, one, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    if not options:
        for param, place in zip(flat(loop), range(3), strict=True):
            wanted = torch.from_numpy(meant.gaussian(tuple(param.shape), place, 2)).float()
            assert_same(loop.state[param]["m"], wanted)


class Jumps(Matrix):
    """A rule on whole matrices that draws."""

    lr: float = hyper(0.1)
    seed: int = hyper(default=3, at_least=0)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return becomes(gaussian())


def test_rules_on_matrices_draw_too() -> None:
    optimizer = drawn(((4, 5),), steps=2, rule=Jumps)
    (param,) = flat(optimizer)
    assert_same(param.detach(), torch.from_numpy(meant.gaussian((4, 5), 0, 1, seed=3)).float())


def on_shards(rank: int) -> None:
    """Draw on the parts of tensors that two processes hold, each seeded in its own way."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(rank)
    shapes, ways = ((101, 64), (7,), (1, 5), (6, 9)), (Shard(0), Shard(0), Shard(0), Shard(1))
    pairs = zip(shapes, ways, strict=True)
    params = [nn.Parameter(distribute_tensor(torch.zeros(x), mesh, [way])) for x, way in pairs]
    optimizer = Drawn(params)
    for _ in range(2):
        advance(optimizer)
    for place, (param, way) in enumerate(zip(params, ways, strict=True)):
        whole = torch.from_numpy(meant.gaussian(tuple(param.shape), place, 1)).float()
        parts = [*whole.chunk(2, way.dim), whole[:0]]
        assert_same(optimizer.state[param]["first"].to_local(), parts[rank])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_the_parts_of_a_tensor_have_what_the_whole_would_have(tmp_path: Path) -> None:
    in_processes(2, "on_shards", tmp_path, __name__)


# State


class Walk(Modifier):
    seed: int = hyper(default=1, at_least=0)

    @staticmethod
    def gradient(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return g + coin()


def with_noise(runner: str = "loop", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    params = [nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(((90, 60), (7,)))]
    modifiers = [Walk(), steprule.Noise(0.5, seed=4)]
    return steprule.AdamW(params, lr=0.01, modifiers=modifiers, **options, **RUNNERS[runner])


@pytest.mark.parametrize(
    ("runner", "low"),
    [
        *((runner, None) for runner in RUNNERS),
        *itertools.product(("loop", "kernel"), ("kahan", "stochastic")),
    ],
)
def test_a_resumed_run_draws_what_the_first_would_have(runner: str, low: str | None) -> None:
    options = (torch.float32, {}) if low is None else (torch.bfloat16, {"low_precision": low})
    whole = with_noise(runner, options[0], **options[1])
    for _ in range(3):
        advance(whole)
    file = io.BytesIO()
    torch.save([whole.state_dict(), [p.detach() for p in flat(whole)]], file)
    file.seek(0)
    state, params = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    resumed = with_noise(runner, options[0], **options[1])
    advance(resumed)
    resumed.load_state_dict(state)
    with torch.no_grad():
        for param, value in zip(flat(resumed), params, strict=True):
            param.copy_(value)
    for optimizer in (whole, resumed):
        for _ in range(3):
            advance(optimizer)
    assert_same([p.detach() for p in flat(resumed)], [p.detach() for p in flat(whole)])
    assert_same(resumed.state_dict(), whole.state_dict())


def test_the_key_is_there_before_the_first_step_and_only_where_something_draws() -> None:
    optimizer = with_noise()
    optimizer.init_state()
    keys = [optimizer.state[p]["noise_key"] for p in flat(optimizer)]
    assert keys[0] != keys[1]
    assert {x.dtype for x in keys} == {torch.int64}
    plain = steprule.AdamW([nn.Parameter(torch.ones(3))])
    plain.init_state()
    assert not any("noise_key" in state for state in plain.state.values())
    advance(optimizer)
    assert [int(optimizer.state[p]["noise_key"]) for p in flat(optimizer)] == [int(x) for x in keys]


def test_loading_reports_a_key_that_nothing_draws_by() -> None:
    saved = with_noise()
    advance(saved)
    other = steprule.AdamW([nn.Parameter(p.detach().clone()) for p in flat(saved)], lr=0.01)
    report = other.load_state_dict(saved.state_dict(), strict=False)
    assert any("noise_key" in line for line in report.unexpected)
    packed, report = steprule.convert_state(saved.state_dict(), to="torch")
    assert "noise_key" in report.dropped
    assert not any("noise_key" in state for state in packed["state"].values())


class Estimates(Drawn):
    """Draws for its curvature, too."""

    curvature = slot("curvature")

    @staticmethod
    def estimate(h: Any, p: Any, d: Any, s: Any, t: Any) -> None:
        s.curvature = d * gaussian()


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_estimate_of_the_curvature_draws_numbers_of_its_own(runner: str) -> None:
    optimizer = drawn(((5,),), rule=Estimates, **RUNNERS[runner])
    (param,) = flat(optimizer)
    optimizer.update_hessian({param: torch.ones(5)})
    advance(optimizer)
    assert_drawn(optimizer, 2)
    wanted = torch.from_numpy(meant.gaussian((5,), 0, 1)).float()
    assert_same(optimizer.state[param]["curvature"], wanted)


def test_a_gradient_scaler_that_skips_a_step() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = drawn(((6,),))
    (param,) = flat(optimizer)
    for bad in (float("inf"), 0.0):
        scaler.scale((param * bad).sum() + 0 * param.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        param.grad = None
    assert_drawn(optimizer, 1)


# Randomness


def test_gaussians_have_the_distribution_that_is_promised() -> None:
    """For bits in the middle, in the tail and next to 0; every one of the tail's last 2²⁰."""
    last = 2**31
    for tails in (np.arange(2**20), np.arange(0, last, 2017), np.arange(last - 2**18, last)):
        size = draws._gaussian(torch.from_numpy(tails)).double().numpy()
        wanted = (tails + 0.5) / 2**32
        given = special.ndtr(-size)
        assert abs(given - wanted).max() < 1e-6
        assert abs(given / wanted - 1).max() < 5e-4
        assert_same(draws._gaussian(torch.from_numpy(tails + last)), -torch.from_numpy(size).float())
    assert 6.33 < float(draws._gaussian(torch.tensor([0]))) < 6.34


COUNT = 500_000


def key_of(place: int = 0, seed: int = 0) -> int:
    """The noise key of a parameter before its first step."""
    optimizer = drawn(((1,),) * (place + 1), steps=0, seed=seed)
    optimizer.init_state()
    return int(optimizer.state[flat(optimizer)[place]]["noise_key"])


def sample(key: int, draw: int = 0) -> np.ndarray:
    return draws.drawn("gaussian", draw, key, torch.empty(COUNT), torch.float64).numpy()


def test_a_sample_has_the_moments_and_the_distribution() -> None:
    x = sample(key_of())
    error = COUNT**-0.5
    assert abs(x.mean()) < 4 * error
    assert abs((x**2).mean() - 1) < 4 * error * 2**0.5
    assert abs((x**3).mean()) < 4 * error * 15**0.5
    assert abs((x**4).mean() - 3) < 4 * error * 96**0.5
    # Kolmogorov and Smirnov: beyond 1.95 standard errors once in a thousand samples.
    steps = np.arange(COUNT + 1) / COUNT
    below = special.ndtr(np.sort(x))
    assert max((below - steps[:-1]).max(), (steps[1:] - below).max()) < 1.95 * error
    coins = draws.drawn("coin", 0, 3 << 32, torch.empty(COUNT), torch.float32)
    assert set(coins.tolist()) == {-1.0, 1.0}
    assert abs(float(coins.mean())) < 4 * error


def test_what_differs_in_anything_is_independent() -> None:
    """Elements, parameters, steps, draws: neither the numbers nor their squares go together."""
    start = key_of()
    x = sample(start)
    others = [x, sample(start, draw=1), sample(key_of(place=1)), sample(key_of(seed=1))]
    others += [sample(start + steps) for steps in (1, 2, 2**31)]
    for one, other in itertools.combinations(others, 2):
        for a, b in ((one, other), (one**2 - 1, other**2 - 1)):
            assert abs(correlation(a, b)) < 4.5 * COUNT**-0.5
    for lag in (1, 2, 3, 4, 8, 16, 64, 255, 256, 257, 1024, 65536):
        for a in (x, x**2 - 1):
            assert abs(correlation(a[lag:], a[:-lag])) < 4.5 * COUNT**-0.5


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return (a * b).mean() / np.sqrt((a**2).mean() * (b**2).mean())


def test_elements_beyond_four_thousand_million_have_numbers_of_their_own() -> None:
    places = torch.arange(100) + 2**32
    bits = draws._bits(key_of(), 0, places)
    assert not set(bits.tolist()) & set(draws._bits(key_of(), 0, places - 2**32).tolist())
    assert_same(bits, torch.from_numpy(meant.bits(places.numpy(), 0, 0).astype(np.int64)))


# Langevin dynamics


@pytest.mark.parametrize("runner", RUNNERS)
def test_it_samples_the_posterior_of_a_normal_distribution(runner: str) -> None:
    """It is N(0, 1) for a loss of θ²/2: 4,000 chains, after they have forgotten where they started."""
    param = nn.Parameter(torch.full((4000,), 3.0))
    options = {"modifiers": [steprule.Noise(2**0.5)], **RUNNERS[runner]}
    optimizer = steprule.SGD([param], lr=0.1, **options)
    for _ in range(100):
        param.grad = param.detach().clone()
        optimizer.step()
    # Steps of this size make the variance 2/(2 - lr).
    assert abs(float(param.detach().mean())) < 4 / 4000**0.5
    assert abs(float(param.detach().var()) - 1 / 0.95) < 4 * 2**0.5 / 4000**0.5


# Errors


class Unseeded(Elementwise):
    lr: float = hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return -h.lr * gaussian()


class UnseededMatrix(Matrix):
    lr: float = hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return -h.lr * coin()


class UnseededModifier(Modifier):
    @staticmethod
    def change(h: Any, p: Any, g: Any, u: Any, s: Any, t: Any) -> Any:
        return sqrt(h.lr) * coin() * u


class Evaluates(Drawn):
    @staticmethod
    def evaluate(h: Any, p: Any, s: Any, t: Any) -> Any:
        return p + gaussian()


def test_who_draws_declares_a_seed() -> None:
    message = r"draws random numbers, and nothing says where they start. Declare `seed: int = hyper\("
    with pytest.raises(TypeError, match=rf"^Unseeded\.update: gaussian\(\) {message}"):
        drawn(rule=Unseeded)
    with pytest.raises(TypeError, match=rf"^UnseededMatrix\.update: coin\(\) {message}"):
        drawn(rule=UnseededMatrix)
    with pytest.raises(TypeError, match=rf"^UnseededModifier\.change: coin\(\) {message}"):
        steprule.SGD([nn.Parameter(torch.ones(2))], modifiers=[UnseededModifier()])
    for seed, error in ((-1, ValueError), (0.5, TypeError)):
        with pytest.raises(error, match=r"^Noise: seed = .*, must be"):
            steprule.Noise(seed=seed)


def test_there_is_nothing_to_draw_outside_of_a_step() -> None:
    with pytest.raises(RuntimeError, match=r"^gaussian\(\) draws random numbers for a step\. Call it in"):
        gaussian()
    optimizer = drawn(((3,),), rule=Evaluates)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"Evaluates\.evaluate: gaussian\(\) draws random numbers"):
        optimizer.eval()
    assert_same(optimizer.state_dict(), before)
