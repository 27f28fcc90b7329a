"""ScheduleFree."""

from __future__ import annotations

from typing import Any

from steprule.declare import Modifier, hyper, parameter, scalar_slot, slot
from steprule.words import Number, larger, lerp, where


class ScheduleFree(Modifier):
    """An average of the weights in place of a falling learning rate, for any rule.

    When: the number of steps is not known beforehand. `optimizer.eval()` puts the average into the model. Give
    the rule no momentum of its own, since β takes its place.

        z ← z + u                       u: the rule's change with its decay, at y
        x ← (1-c)·x + c·z               c = w/Σw with w = (largest lr so far)²
        θ = y = (1-β)·z + β·x           evaluate at x

    State: 1 value per element (z), 2 per tensor (lr_max, weight_sum).
    Source: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky 2024, "The Road Less Scheduled", algorithm 1,
    https://arxiv.org/abs/2405.15682; the authors' ScheduleFreeWrapper decays at z.
    """

    momentum: float = hyper(default=0.9, above=0, below=1, meaning="β, between z (0) and the average (1)")

    z = slot("z", starts=parameter)
    lr_max = scalar_slot("lr_max")
    weight_sum = scalar_slot("weight_sum")

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        x = ScheduleFree.evaluate(h, p, s, None)
        s.z = s.z + (new - p)
        s.lr_max = larger(s.lr_max, h.lr)
        weight = s.lr_max * s.lr_max
        s.weight_sum = s.weight_sum + weight
        c = where(s.weight_sum > 0, weight / larger(s.weight_sum, 1e-300), 0.0)
        return lerp(s.z, lerp(x, s.z, c), h.momentum)

    @staticmethod
    def evaluate(h: Any, p: Number, s: Any, t: Any) -> Number:
        return lerp(p, s.z, 1 - 1 / h.momentum)
