"""Three kinds of weight decay, each one line of mathematics. A rule never contains its own.

| mode      | what is decayed                    | name in the literature                          |
|-----------|------------------------------------|-------------------------------------------------|
| l2        | g ← g + λ·θ                        | L2 regularization                               |
| decoupled | θ ← θ·(1 - lr·λ), before the step  | Loshchilov & Hutter 2019, torch's AdamW         |
| absolute  | θ ← θ·(1 - λ), before the step     | decay independent of lr (labml's `absolute`)    |

`lr` is the group's current lr, so decoupled decay follows a schedule.
"""

from __future__ import annotations

from typing import Any

from steprule.declare import decay_mode
from steprule.words import Number


@decay_mode("gradient")
def l2(h: Any, p: Number, g: Number) -> Number:
    """Add the gradient of λ/2·‖θ‖²."""
    return g + h.weight_decay * p


@decay_mode("parameter")
def decoupled(h: Any, p: Number) -> Number:
    """Shrink the parameter by lr·λ."""
    return p * (1 - h.lr * h.weight_decay)


@decay_mode("parameter")
def absolute(h: Any, p: Number) -> Number:
    """Shrink the parameter by λ, whatever the lr."""
    return p * (1 - h.weight_decay)
