"""The kinds of weight decay, each one line of mathematics. A rule never contains its own.

| mode      | what is decayed                    | name in the literature                          |
|-----------|------------------------------------|-------------------------------------------------|
| l2        | g ← g + λ·θ                        | L2 regularization                               |
| decoupled | θ ← θ·(1 - lr·λ), before the step  | Loshchilov & Hutter 2019, torch's AdamW         |
| absolute  | θ ← θ·(1 - λ), before the step     | decay independent of lr (labml's `absolute`)    |
| independent | θ ← θ·(1 - λ·lr/peak_lr)         | Loshchilov & Hutter's own form, η·λ             |
| corrected | θ ← θ·(1 - λ·lr²/peak_lr)          | AdamC, Defazio 2025                             |
| cautious  | decoupled, where u·θ ≤ 0           | Chen et al. 2025                                |

`lr` is the group's current lr, so these follow a schedule; `peak_lr` is the one that the group was made with.
Sources: https://arxiv.org/abs/1711.05101, https://arxiv.org/abs/2506.02285, https://arxiv.org/abs/2510.12402.
"""

from __future__ import annotations

from typing import Any

from steprule.declare import Decay
from steprule.words import Number, larger, where


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


class Independent(Decay, mode="independent"):
    """Shrink the parameter by λ, times where the schedule is now."""

    remembers_lr = True

    @staticmethod
    def parameter(h: Any, p: Number, u: Any, s: Any, t: Any) -> Number:
        return p * (1 - h.weight_decay * (h.lr / larger(h.peak_lr, 1e-300)))


class Corrected(Decay, mode="corrected"):
    """Shrink the parameter by lr·λ, times where the schedule is now."""

    remembers_lr = True

    @staticmethod
    def parameter(h: Any, p: Number, u: Any, s: Any, t: Any) -> Number:
        return p * (1 - h.lr * h.weight_decay * (h.lr / larger(h.peak_lr, 1e-300)))


class CautiousDecay(Decay, mode="cautious"):
    """Shrink by lr·λ what the change does not move away from zero."""

    sees_change = True

    @staticmethod
    def parameter(h: Any, p: Number, u: Any, s: Any, t: Any) -> Number:
        return where(u * p <= 0, p * (1 - h.lr * h.weight_decay), p)
