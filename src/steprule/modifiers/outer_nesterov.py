"""OuterNesterov."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, hyper, parameter, slot
from steprule.words import Number


class OuterNesterov(Modifier):
    """Every k steps, take the way of these steps as one gradient and step with Nesterov momentum on it.

    When: pre-training of language models with AdamW or Muon; it costs two copies of the weights,
    and time in every k-th step only. A parameter without a gradient in that step is left out of it.
    With momentum=0 it is Lookahead.

        after every k-th step:
            d = a - θ                   a starts as the parameter
            b ← μ·b + d
            a ← a - η·(d + μ·b)
            θ ← a

    State: 2 values per element (slow, momentum_buffer), and how many steps a group has taken.
    Source: Kallusky, Rao, Nandavanam, Shi 2025, "SNOO: Step-K Nesterov Outer Optimizer",
    https://arxiv.org/abs/2510.15830; DiLoCo and MuLoCo do the same over several workers.
    """

    acts = "last"
    not_with: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("ScheduleFree", "ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "Lookahead"),
            "both decide where the weights go on from.",
        ),
        "Hyperball": "a step from one point of the ball along another step leaves it.",
    }

    every: int = hyper(default=30, at_least=1, meaning="k, the number of steps that make one gradient")
    outer_lr: float = hyper(default=0.7, at_least=0, meaning="η, the step size of the outer step")
    momentum: float = hyper(default=0.5, at_least=0, below=1, meaning="μ, decay of b")

    slow = slot("slow", starts=parameter)
    b = slot("momentum_buffer")
    steps = slot("steps", per="group")

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        d = s.slow - new
        s.b = h.momentum * s.b + d
        s.slow = s.slow - h.outer_lr * (d + h.momentum * s.b)
        return s.slow
