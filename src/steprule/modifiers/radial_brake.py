"""RadialBrake."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, hyper
from steprule.words import Number, norm, where


class RadialBrake(Modifier):
    """Let the norm of a tensor grow by only a part of what a step would make it grow.

    When: in place of weight decay for hidden matrices, as Hyperball, but without fixing their norm.

        θ' the new parameter        ‖θ'‖ > ‖θ‖:  θ' ← θ'·(‖θ‖ + s·(‖θ'‖ - ‖θ‖))/‖θ'‖

    State: none.
    Differs: its first form, in modded-nanogpt, takes the part of the change along θ for the growth.
    Source: KellerJordan/modded-nanogpt 2026, track 3, https://github.com/KellerJordan/modded-nanogpt; in this
    form in NVIDIA's Emerging-Optimizers.
    """

    not_with: ClassVar[dict[str, str]] = {
        "Hyperball": "the norm of every tensor stays as it is already.",
        **dict.fromkeys(
            ("ScheduleFree", "ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam"),
            "the average is found from weights that nothing else has changed.",
        ),
    }

    growth: float = hyper(default=0.5, at_least=0, at_most=1, meaning="s, the part of the growth that is kept")

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        before, after = norm(p), norm(new)
        return new * where(after > before, (before + h.growth * (after - before)) / after, 1.0)
