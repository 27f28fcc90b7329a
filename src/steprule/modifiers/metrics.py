"""Metrics."""

from __future__ import annotations

from typing import Any

from steprule.declare import Modifier, scalar_slot
from steprule.words import Number, norm


class Metrics(Modifier):
    """Measure gradients, updates and weights while a step has them; `optimizer.metrics()` gives the numbers.

    When: you want to log norms without further passes over memory. List it before other modifiers to measure
    the gradients before clipping.

        ‖g‖, ‖θ' - θ‖ and ‖θ'‖ of every tensor

    State: 3 values per tensor (gradient_norm, update_norm, weight_norm).
    """

    gradient_norm = scalar_slot("gradient_norm")
    update_norm = scalar_slot("update_norm")
    weight_norm = scalar_slot("weight_norm")

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        s.gradient_norm = norm(g)
        return g

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        s.update_norm = norm(new - p)
        s.weight_norm = norm(new)
        return new
