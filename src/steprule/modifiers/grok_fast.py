"""GrokFast."""

from __future__ import annotations

from typing import Any

from steprule.declare import Modifier, hyper, scalar_slot, slot
from steprule.words import Number, ema, where


class GrokFast(Modifier):
    """Amplify what stays in the gradient over many steps, by adding their average to it.

    When: the training loss is low long before the validation loss falls, as on small algorithmic data sets.

        e ← g at the first step, then α·e + (1-α)·g
        g ← g + λ·e

    State: 1 value per element (average), 1 per tensor (steps).
    Source: Lee, Kang, Kim, Lee 2024, "Grokfast: Accelerated Grokking by Amplifying Slow Gradients",
    Grokfast-EMA, https://arxiv.org/abs/2405.20233
    """

    decay: float = hyper(default=0.98, at_least=0, below=1, meaning="α, how much of the average stays")
    strength: float = hyper(default=2.0, at_least=0, meaning="λ, how much of the average is added")

    average = slot("average")
    steps = scalar_slot("steps")

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        s.average = where(s.steps == 0, g, ema(s.average, g, h.decay))
        s.steps = s.steps + 1
        return g + h.strength * s.average
