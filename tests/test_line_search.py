"""The strong Wolfe search alone, on functions of one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe

from steprule.closure.line_search import Point, cubic_minimum, kept_off_the_ends, strong_wolfe

Function = Callable[[Tensor], Tensor]


def more_thuente_1(t: Tensor) -> Tensor:
    return -t / (t**2 + 2)


def more_thuente_2(t: Tensor) -> Tensor:
    return (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4


def wavy(t: Tensor) -> Tensor:
    return (t - 3) ** 2 + torch.sin(5 * t)


def barrier(t: Tensor) -> Tensor:
    """NaN from 1 on."""
    return -5 * t - torch.log(1 - t)


FUNCTIONS: list[Function] = [
    lambda t: (t - 1) ** 2,
    lambda t: (t - 40) ** 4,
    lambda t: torch.cosh(t - 0.01),
    lambda t: torch.sqrt(1 + (t - 7) ** 2),
    more_thuente_1,
    more_thuente_2,
    wavy,
]
FIRST = [1e-4, 0.1, 1.0, 10.0, 300.0]


class Watched:
    """A function of one number that records where it was evaluated."""

    def __init__(self, function: Function, dtype: torch.dtype = torch.float64):
        self.function, self.dtype = function, dtype
        self.places: list[float] = []
        self.start = self.at(0.0)

    def at(self, t: Any) -> Point:
        place = torch.as_tensor(float(t), dtype=self.dtype).requires_grad_()
        value = self.function(place)
        (slope,) = torch.autograd.grad(value, place)
        finite = bool(value.isfinite() and slope.isfinite())
        return Point(t, value.item() if finite else math.inf, slope, slope[None])

    def look(self, t: Any) -> Point:
        self.places.append(float(t))
        return self.at(t)


def assert_wolfe(watched: Watched, found: Point, c1: float, c2: float) -> None:
    """The two conditions, from the function itself rather than from what the search says."""
    here, start = watched.at(found.t), watched.start
    assert here.value == found.value
    assert here.value <= start.value + c1 * float(found.t) * start.slope.item()
    assert abs(here.slope.item()) <= c2 * abs(start.slope.item())


@pytest.mark.parametrize("c2", [0.9, 0.1])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("place", range(len(FUNCTIONS)))
def test_both_conditions_hold(place: int, first: float, c2: float) -> None:
    watched = Watched(FUNCTIONS[place])
    found = strong_wolfe(watched.look, watched.start, first, trials=40, c2=c2)
    assert_wolfe(watched, found, 1e-4, c2)


@given(lowest=st.floats(0.01, 50), steepness=st.floats(0.01, 100), power=st.sampled_from([2, 4, 6]))
def test_both_conditions_hold_for_any_bowl(lowest: float, steepness: float, power: int) -> None:
    watched = Watched(lambda t: steepness * (t / lowest - 1) ** power)
    found = strong_wolfe(watched.look, watched.start, 1.0, trials=60, c2=0.3)
    assert_wolfe(watched, found, 1e-4, 0.3)


@given(
    first=st.sampled_from(FIRST),
    lowest=st.floats(0.1, 30),
    waves=st.floats(0.0, 3),
    frequency=st.floats(0.5, 20),
    trials=st.integers(0, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=150)
def test_every_trial_is_torchs(
    first: float, lowest: float, waves: float, frequency: float, trials: int, dtype: torch.dtype
) -> None:
    watched = Watched(lambda t: (t / lowest - 1) ** 2 + waves * torch.cos(frequency * t), dtype)
    assume(watched.start.slope < 0)
    found = strong_wolfe(watched.look, watched.start, first, trials=trials)
    seen: list[float] = []

    def objective(_: None, t: Any, d: Tensor) -> tuple[float, Tensor]:
        seen.append(float(t))
        here = watched.at(t)
        return here.value, here.gradient

    start, d = watched.start, torch.ones(1, dtype=dtype)
    value, _, t, _ = _strong_wolfe(
        objective, None, first, d, start.value, start.gradient, start.slope, max_ls=trials
    )
    assert (found.value, float(found.t), watched.places) == (value, float(t), seen)


@given(
    table=st.lists(st.tuples(st.floats(-9, 1), st.floats(-3, 3)), min_size=1, max_size=9),
    first=st.sampled_from(FIRST),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=400)
def test_every_turn_is_torchs(table: list[tuple[float, float]], first: float, dtype: torch.dtype) -> None:
    """The same answers, however unusual, lead to the same next trial."""
    start = Point(0, 0.0, torch.tensor(-1.0, dtype=dtype), torch.tensor([-1.0], dtype=dtype))

    def answer(places: list[float], t: Any) -> Point:
        value, slope = table[len(places) % len(table)]
        places.append(float(t))
        gradient = torch.tensor([slope], dtype=dtype)
        return Point(t, value, gradient[0], gradient)

    def objective(_: None, t: Any, d: Tensor) -> tuple[float, Tensor]:
        here = answer(theirs, t)
        return here.value, here.gradient

    ours: list[float] = []
    theirs: list[float] = []
    found = strong_wolfe(lambda t: answer(ours, t), start, first, trials=12)
    value, _, t, _ = _strong_wolfe(
        objective, None, first, -start.gradient, 0.0, start.gradient, start.slope, max_ls=12
    )
    assume(not any(math.isnan(place) for place in theirs))
    assert (found.value, float(found.t), ours) == (value, float(t), theirs)


def test_a_good_first_trial_is_taken_at_once() -> None:
    watched = Watched(lambda t: (t - 1) ** 2)
    found = strong_wolfe(watched.look, watched.start, 0.7)
    assert found.t == 0.7
    assert watched.places == [0.7]


def test_a_parabola_is_solved_by_one_cubic() -> None:
    watched = Watched(lambda t: (t - 1) ** 2)
    found = strong_wolfe(watched.look, watched.start, 5.0, c2=0.01)
    assert float(found.t) == pytest.approx(1)
    assert len(watched.places) == 2


@pytest.mark.parametrize("trials", range(6))
def test_the_trials_are_counted_and_the_best_is_kept(trials: int) -> None:
    watched = Watched(wavy)
    found = strong_wolfe(watched.look, watched.start, 30.0, trials=trials, c2=1e-9)
    assert len(watched.places) == trials + 1
    assert found.value <= watched.start.value
    assert found.t == 0 or float(found.t) in watched.places


@pytest.mark.parametrize("first", [1.0, 2.0, 1000.0])
def test_it_turns_back_where_the_function_ends(first: float) -> None:
    watched = Watched(barrier)
    assert watched.at(first).value == math.inf
    found = strong_wolfe(watched.look, watched.start, first)
    assert 0 < float(found.t) < 1
    assert_wolfe(watched, found, 1e-4, 0.9)


def test_it_turns_back_after_going_on_too_far() -> None:
    watched = Watched(barrier)
    found = strong_wolfe(watched.look, watched.start, 0.3, c2=0.1)
    assert_wolfe(watched, found, 1e-4, 0.1)


def test_nothing_but_the_start_is_defined() -> None:
    watched = Watched(lambda t: -t * (math.nan if t > 0 else 1))
    found = strong_wolfe(watched.look, watched.start, 1.0)
    assert found.t == 0
    assert found.value == watched.start.value


def test_a_bracket_too_narrow_to_move_anything_ends_the_search() -> None:
    watched = Watched(lambda t: (t - 1) ** 2)
    strong_wolfe(watched.look, watched.start, 5.0, reach=1e-10, c2=0.01)
    assert len(watched.places) == 1


def at(t: Any, function: Function) -> Point:
    return Watched(function).at(t)


def cubic(t: Tensor) -> Tensor:
    """Lowest at 2, highest at -1."""
    return 2 * t**3 - 3 * t**2 - 12 * t


def test_the_cubic_is_exact_for_a_cubic() -> None:
    ends = at(1.0, cubic), at(5.0, cubic)
    assert float(cubic_minimum(*ends, 1.0, 5.0)) == pytest.approx(2)
    assert float(cubic_minimum(*reversed(ends), 1.0, 5.0)) == pytest.approx(2)
    assert cubic_minimum(*ends, 2.5, 5.0) == 2.5
    assert cubic_minimum(*ends, 1.0, 1.5) == 1.5


def test_without_a_minimum_the_bound_or_the_middle_is_taken() -> None:
    line = [at(t, lambda t: -3 * t) for t in (0.0, 1.0)]
    assert cubic_minimum(*line, 1.01, 10.0) == 10.0
    falling = [at(t, lambda t: -(t**3) - t) for t in (0.0, 1.0)]
    assert cubic_minimum(*falling, 2.0, 4.0) == 3.0
    assert cubic_minimum(line[0], line[0], 0.0, 1.0) == 0.5
    assert cubic_minimum(line[0], line[1]._replace(value=math.inf), 0.0, 1.0) == 0.5


def test_a_trial_may_hug_an_end_once() -> None:
    assert kept_off_the_ends(0.5, 0.0, 1.0, True) == (0.5, False)
    assert kept_off_the_ends(0.05, 0.0, 1.0, False) == (0.05, True)
    assert kept_off_the_ends(0.05, 0.0, 1.0, True) == (0.1, False)
    assert kept_off_the_ends(0.95, 0.0, 1.0, True) == (0.9, False)
    assert kept_off_the_ends(1.0, 0.0, 1.0, False) == (0.9, False)
    assert kept_off_the_ends(0.0, 0.0, 1.0, False) == (0.1, False)
