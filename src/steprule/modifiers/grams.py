"""Grams."""

from __future__ import annotations

from typing import Any

from steprule.declare import Modifier
from steprule.words import Number, sign


class Grams(Modifier):
    """Take only the size of the change from the rule, and its direction from the gradient of this step.

    When: as Cautious, on a rule with momentum. No element of the change is left out, and it needs no second
    read.

        u ← -sign(g)·|u|

    State: none.
    Source: Cao, Li, Song 2024, "Grams: Gradient Descent with Adaptive Momentum Scaling", algorithm 1,
    https://arxiv.org/abs/2412.17107
    """

    @staticmethod
    def change(h: Any, p: Number, g: Number, u: Number, s: Any, t: Any) -> Number:
        return -sign(g) * abs(u)
