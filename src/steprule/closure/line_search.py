"""How far to go along a direction: the strong Wolfe conditions.

With φ(t) the loss at distance t and φ' its slope, a good t has

    φ(t) ≤ φ(0) + c1·t·φ'(0)      enough decrease        |φ'(t)| ≤ c2·|φ'(0)|      flat enough

Source: Nocedal & Wright 2006, Numerical Optimization, algorithms 3.5 (go further until a good t must lie
in between) and 3.6 (zoom into that bracket), equation 3.59 (the cubic). The choices that the book leaves
open (how far to go on, when to distrust the cubic) are torch's, and so is the order of every operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

# A Python float, or a tensor with one element: both occur, and are mixed where torch.optim mixes them. Rounding
# every one of them to a float would change the last bits of the result.
Scalar: TypeAlias = Any

NARROWEST = 1e-9


class Point(NamedTuple):
    """A place along the direction: the distance, the loss, its slope along the direction, the gradient.

    A loss of infinity means that there is no loss at this place.
    """

    t: Scalar
    value: float
    slope: Tensor
    gradient: Tensor


Look: TypeAlias = Callable[[Scalar], Point]


class Wolfe(NamedTuple):
    """The two conditions on a point, for a search that begins at `start`."""

    start: Point
    c1: float
    c2: float

    def decreases_enough(self, here: Point) -> bool:
        """φ(t) ≤ φ(0) + c1·t·φ'(0)."""
        return not here.value > self.start.value + self.c1 * here.t * self.start.slope

    def is_flat_enough(self, here: Point) -> bool:
        """|φ'(t)| ≤ c2·|φ'(0)|."""
        return bool(abs(here.slope) <= -self.c2 * self.start.slope)


def strong_wolfe(
    look: Look,
    start: Point,
    t: Scalar,
    *,
    trials: int = 25,
    reach: Scalar = 1.0,
    c1: float = 1e-4,
    c2: float = 0.9,
) -> Point:
    """A point that satisfies both conditions; the lowest point of the last bracket if none was found.

    look: evaluates a distance. start: the point at distance 0, with a negative slope. t: the first trial.
    trials: how many more are allowed. reach: the largest element of the direction; a bracket so narrow
    that no parameter can move by 1e-9 ends the search.

    A trial without a loss counts as beyond every good point: the search turns back from it.
    """
    wolfe = Wolfe(start, c1, c2)
    before, here = start, look(t)
    for trial in range(trials):
        rises = trial > 1 and here.value >= before.value
        if rises or not wolfe.decreases_enough(here):
            break
        if wolfe.is_flat_enough(here):
            return here
        if here.slope >= 0:
            break
        nearest, farthest = here.t + 0.01 * (here.t - before.t), here.t * 10
        t = cubic_minimum(before, here, nearest, farthest)
        before, here = here, look(t)
    else:
        return start if start.value <= here.value else here
    return zoom(look, [before, here], wolfe, trials - trial, reach)


def zoom(look: Look, ends: list[Point], wolfe: Wolfe, trials: int, reach: Scalar) -> Point:
    """Shrink the bracket between two points until a trial satisfies both conditions."""
    low, high = lower_first(ends)
    hugs_an_end = False
    for _ in range(trials):
        left, right = sorted((ends[0].t, ends[1].t))
        if (right - left) * reach < NARROWEST:
            break
        t = cubic_minimum(ends[0], ends[1], left, right)
        t, hugs_an_end = kept_off_the_ends(t, left, right, hugs_an_end)
        here = look(t)
        if here.value >= ends[low].value or not wolfe.decreases_enough(here):
            ends[high] = here
            low, high = lower_first(ends)
            continue
        good = wolfe.is_flat_enough(here)
        if not good and here.slope * (ends[high].t - ends[low].t) >= 0:
            ends[high] = ends[low]
        ends[low] = here
        if good:
            break
    return ends[low]


def lower_first(ends: list[Point]) -> tuple[int, int]:
    """The places of the lower and of the higher end."""
    return (0, 1) if ends[0].value <= ends[1].value else (1, 0)


def kept_off_the_ends(t: Scalar, left: Scalar, right: Scalar, hugged_before: bool) -> tuple[Scalar, bool]:
    """The trial, moved inwards if it would shrink the bracket too little; and whether it is close to an end.

    Within a tenth of the width from an end is allowed once in a row; on the end itself, never.
    """
    margin = 0.1 * (right - left)
    if min(right - t, t - left) >= margin:
        return t, False
    if not (hugged_before or t >= right or t <= left):
        return t, True
    return (right - margin if abs(t - right) < abs(t - left) else left + margin), False


def cubic_minimum(one: Point, other: Point, lowest: Scalar, highest: Scalar) -> Scalar:
    """The distance at which the cubic through both values and slopes is smallest, kept inside the bounds.

    If no cubic fits, or it has no minimum, the middle of the bounds.
    """
    middle = (lowest + highest) / 2.0
    left, right = (one, other) if one.t <= other.t else (other, one)
    if left.t == right.t:
        return middle
    d1 = left.slope + right.slope - 3 * (left.value - right.value) / (left.t - right.t)
    square = d1**2 - left.slope * right.slope
    if not square >= 0:
        return middle
    d2 = square.sqrt()
    bend = (right.slope + d2 - d1) / (right.slope - left.slope + 2 * d2)
    t: Scalar = right.t - (right.t - left.t) * bend
    return middle if math.isnan(t) else min(max(t, lowest), highest)
