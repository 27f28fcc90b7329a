"""Metrics."""

from __future__ import annotations

from typing import Any

from steprule.declare import Modifier, hyper, scalar_slot, slot
from steprule.words import Number, norm


class Metrics(Modifier):
    """Measure gradients, updates and weights while a step has them; `optimizer.metrics()` gives the numbers.

    When: you want to log norms without further passes over memory. List it before other modifiers to measure
    the gradients before clipping. With every=n it measures the first step and then every n-th; the others run
    as if it were not there, and `optimizer.metrics()` goes on giving the last numbers.

        ‖g‖, ‖θ' - θ‖ and ‖θ'‖ of every tensor

    State: 3 values per tensor (gradient_norm, update_norm, weight_norm), and how many steps a group has taken.
    """

    acts = "first"

    every: int = hyper(default=1, at_least=1, meaning="from one step that is measured to the next")

    gradient_norm = scalar_slot("gradient_norm")
    update_norm = scalar_slot("update_norm")
    weight_norm = scalar_slot("weight_norm")
    steps = slot("steps", per="group")

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        s.gradient_norm = norm(g)
        return g

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        s.update_norm = norm(new - p)
        s.weight_norm = norm(new)
        return new
