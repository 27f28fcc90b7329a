"""The kinds of weight decay, each one line of mathematics. A rule never contains its own.

| mode      | what is decayed                    | name in the literature                          |
|-----------|------------------------------------|-------------------------------------------------|
| l2        | g ← g + λ·θ                        | L2 regularization                               |
| decoupled | θ ← θ·(1 - lr·λ), before the step  | Loshchilov & Hutter 2019, torch's AdamW         |
| absolute  | θ ← θ·(1 - λ), before the step     | decay independent of lr (labml's `absolute`)    |

`lr` is the group's current lr, so decoupled decay follows a schedule.
"""

from __future__ import annotations

from typing import Any

from steprule.declare import Decay
from steprule.words import Number


class L2(Decay, mode="l2"):
    """Add the gradient of λ/2·‖θ‖²."""

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        return g + h.weight_decay * p


class Decoupled(Decay, mode="decoupled"):
    """Shrink the parameter by lr·λ."""

    @staticmethod
    def parameter(h: Any, p: Number, u: Any, s: Any, t: Any) -> Number:
        return p * (1 - h.lr * h.weight_decay)


class Absolute(Decay, mode="absolute"):
    """Shrink the parameter by λ, whatever the lr."""

    @staticmethod
    def parameter(h: Any, p: Number, u: Any, s: Any, t: Any) -> Number:
        return p * (1 - h.weight_decay)
