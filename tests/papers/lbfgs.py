"""L-BFGS: Newton's direction from the last few changes of position and gradient.

    s = t·d of the step before          y = g - g₋₁          kept when y·s > 1e-10, newest last
    d = -H·g by the two-loop recursion, H₀ = (y·s)/(y·y) of the newest pair; -g at first
    t = lr·min(1, 1/‖g‖₁) at first, then lr; or found by the strong Wolfe search from there
    x ← x + t·d

One call of `step` makes up to max_iter such iterations and max_eval evaluations, and stops early
when max|g| ≤ tolerance_grad, g·d > -tolerance_change, max|t·d| ≤ tolerance_change or the loss
changed by less than tolerance_change. `maximize` minimizes the negative function.

The search finds t with  f(t) ≤ f(0) + c1·t·f'(0)  and  |f'(t)| ≤ c2·|f'(0)|,  c1 = 1e-4, c2 = 0.9.
Its choices where the book leaves them open (how far to extrapolate, when to leave the cubic's
minimum) are those of torch.optim.LBFGS, which come from Schmidt's minFunc.
Source: Liu & Nocedal 1989, https://doi.org/10.1007/BF01589116; Nocedal & Wright 2006, Numerical
Optimization, alg. 7.4 (direction), 3.5 and 3.6 (search), eq. 3.59 (cubic)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

C1, C2 = 1e-4, 0.9
SMALLEST_CURVATURE = 1e-10


class Point(NamedTuple):
    """Where the search has looked: distance t along d, value, gradient, slope g·d."""

    t: float
    value: float
    gradient: np.ndarray
    slope: float


def minimize(
    function: Callable[[np.ndarray], float],
    gradient: Callable[[np.ndarray], np.ndarray],
    theta: np.ndarray,
    iterations: int,
    **hyper: Any,
) -> list[np.ndarray]:
    """Return θ after each of `iterations` calls of `step`."""
    state = init(theta)
    path = []
    for _ in range(iterations):
        theta = step(theta, function, gradient, state, **hyper)
        path.append(theta)
    return path


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"n_iter": 0, "func_evals": 0, "old_dirs": [], "old_stps": []}


def step(
    theta: np.ndarray,
    function: Callable[[np.ndarray], float],
    gradient: Callable[[np.ndarray], np.ndarray],
    state: dict[str, Any],
    *,
    lr: float = 1.0,
    max_iter: int = 20,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    history_size: int = 100,
    line_search_fn: str | None = None,
    maximize: bool = False,
) -> np.ndarray:
    sign = -1.0 if maximize else 1.0
    max_eval = max_iter * 5 // 4 if max_eval is None else max_eval
    x = theta.ravel()

    def evaluate(place: np.ndarray) -> tuple[float, np.ndarray]:
        state["func_evals"] += 1
        shaped = place.reshape(theta.shape)
        return sign * float(function(shaped)), sign * gradient(shaped).ravel()

    evaluated_before = state["func_evals"]
    value, g = evaluate(x)
    if largest(g) <= tolerance_grad:
        return theta

    for iteration in range(1, max_iter + 1):
        state["n_iter"] += 1
        d = direction(g, state, history_size)
        first = state["n_iter"] == 1
        t = lr * min(1.0, 1.0 / np.sum(np.abs(g))) if first else lr
        state.update(d=d, t=t, prev_flat_grad=g, prev_loss=value)
        if g @ d > -tolerance_change:
            break
        if line_search_fn == "strong_wolfe":
            remaining = max_eval - (state["func_evals"] - evaluated_before)
            start = Point(0.0, value, g, g @ d)
            found = strong_wolfe(evaluate, x, d, start, t, remaining, tolerance_change)
            t, value, g = found.t, found.value, found.gradient
            state["t"] = t
        x = x + t * d
        if iteration == max_iter:
            break
        if line_search_fn is None:
            value, g = evaluate(x)
        if (
            state["func_evals"] - evaluated_before >= max_eval
            or largest(g) <= tolerance_grad
            or largest(t * d) <= tolerance_change
            or abs(value - state["prev_loss"]) < tolerance_change
        ):
            break
    return x.reshape(theta.shape)


def direction(g: np.ndarray, state: dict[str, Any], history_size: int) -> np.ndarray:
    """Return -H·g, after taking the step before into the history."""
    if state["n_iter"] == 1:
        state["H_diag"] = 1.0
        return -g
    y, s = g - state["prev_flat_grad"], state["t"] * state["d"]
    if y @ s > SMALLEST_CURVATURE:
        state["old_dirs"] = [*state["old_dirs"], y][-history_size:]
        state["old_stps"] = [*state["old_stps"], s][-history_size:]
        state["H_diag"] = (y @ s) / (y @ y)

    pairs = list(zip(state["old_dirs"], state["old_stps"], strict=True))
    q, weights = -g, []
    for y, s in reversed(pairs):
        weights.append((s @ q) / (y @ s))
        q = q - weights[-1] * y
    r = state["H_diag"] * q
    for (y, s), weight in zip(pairs, reversed(weights), strict=True):
        r = r + (weight - (y @ r) / (y @ s)) * s
    return r


def strong_wolfe(
    evaluate: Callable[[np.ndarray], tuple[float, np.ndarray]],
    x: np.ndarray,
    d: np.ndarray,
    start: Point,
    t: float,
    budget: int,
    tolerance_change: float,
) -> Point:
    """Alg. 3.5: go further until a good point lies in between, then zoom.

    `budget` trials are allowed after the first.
    """

    def look(t: float) -> Point:
        value, g = evaluate(x + t * d)
        return Point(t, value, g, g @ d)

    before, here = start, look(t)
    for trial in range(budget):
        if here.value > start.value + C1 * here.t * start.slope or (trial > 1 and here.value >= before.value):
            break
        if abs(here.slope) <= -C2 * start.slope:
            return here
        if here.slope >= 0:
            break
        near, far = here.t + 0.01 * (here.t - before.t), 10 * here.t
        t = cubic_minimum(before, here, near, far)
        before, here = here, look(t)
    else:
        return start if start.value <= here.value else here
    bracket = [before, here]
    return zoom(look, bracket, start, budget - trial, tolerance_change / largest(d))


def zoom(
    look: Callable[[float], Point],
    bracket: list[Point],
    start: Point,
    budget: int,
    smallest_width: float,
) -> Point:
    """Alg. 3.6: shrink the bracket around a point that satisfies both conditions."""
    low, high = lower_first(bracket)
    near_an_end = False
    for _ in range(budget):
        left, right = sorted((bracket[0].t, bracket[1].t))
        if right - left < smallest_width:
            break
        t = cubic_minimum(bracket[0], bracket[1], left, right)
        margin = 0.1 * (right - left)
        close = min(right - t, t - left) < margin
        if close and (near_an_end or t >= right or t <= left):
            t = right - margin if right - t < t - left else left + margin
            close = False
        near_an_end = close

        here = look(t)
        if here.value > start.value + C1 * t * start.slope or here.value >= bracket[low].value:
            bracket[high] = here
            low, high = lower_first(bracket)
            continue
        done = abs(here.slope) <= -C2 * start.slope
        if not done and here.slope * (bracket[high].t - bracket[low].t) >= 0:
            bracket[high] = bracket[low]
        bracket[low] = here
        if done:
            break
    return bracket[low]


def cubic_minimum(one: Point, other: Point, smallest: float, largest_t: float) -> float:
    """Where the cubic through both values and slopes is least, kept inside the bounds."""
    a, b = (one, other) if one.t <= other.t else (other, one)
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.t - b.t)
    square = d1**2 - a.slope * b.slope
    if square < 0:
        return (smallest + largest_t) / 2
    d2 = np.sqrt(square)
    # A straight line divides by zero: its minimum is at infinity, and the bound is taken.
    with np.errstate(divide="ignore"):
        t = b.t - (b.t - a.t) * ((b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2))
    return float(min(max(t, smallest), largest_t))


def lower_first(bracket: list[Point]) -> tuple[int, int]:
    """Positions of the lower and the higher end of the bracket."""
    return (0, 1) if bracket[0].value <= bracket[1].value else (1, 0)


def largest(x: np.ndarray) -> float:
    """The largest absolute value."""
    return float(np.max(np.abs(x)))
