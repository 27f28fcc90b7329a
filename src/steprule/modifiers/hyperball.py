"""Hyperball."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, scalar_slot
from steprule.words import Number, norm, where


class Hyperball(Modifier):
    """Keep the norm of every tensor as it was at the start; lr is the length of a step relative to it.

    When: hidden matrices, most of all with Muon or AdamW, in place of weight decay, which must be 0.

        R = ‖θ‖ at the first step
        θ' = θ + lr·R·u/‖u‖           θ ← R·θ'/‖θ'‖

    State: 1 value per tensor (radius).
    Source: Wen et al. 2025, "Hyperball Optimization", https://whenwen.github.io/wd_blog
    """

    not_with: ClassVar[dict[str, str]] = {
        "weight_decay": "the norm of every tensor stays as it is. Set weight_decay=0.",
        "TrustRatio": "both decide how long the change is.",
        "Lookahead": "between two points of the ball, the weights are inside of it.",
        **dict.fromkeys(
            ("ScheduleFree", "ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam"),
            "averages of points on a ball are inside of it.",
        ),
    }

    radius = scalar_slot("radius")

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        s.radius = where(s.radius == 0, norm(p), s.radius)
        u = new - p
        length = norm(u)
        there = p + u * where(length > 0, h.lr * s.radius / length, 0.0)
        return there * where(s.radius > 0, s.radius / norm(there), 1.0)
