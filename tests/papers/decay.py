"""What happens to θ and g before any rule sees them: maximize, then weight decay.

    maximize     g ← -g
    L2           g ← g + λ·θ             the default of torch's rules
    decoupled    θ ← θ·(1 - lr·λ)        AdamW (Loshchilov & Hutter 2019, alg. 2)
    absolute     θ ← θ·(1 - λ)           decoupled and independent of lr

    own          part of the rule's formula, where a plain number means that

Source: https://arxiv.org/abs/1711.05101; the order is that of torch.optim.
"""

from typing import NamedTuple

import numpy as np


class WeightDecay(NamedTuple):
    """λ with the way it acts, where a plain number would mean the rule's own way."""

    weight_decay: float = 0.0
    weight_decouple: bool = True
    absolute: bool = False


def prepare(
    theta: np.ndarray,
    gradient: np.ndarray,
    *,
    lr: float,
    weight_decay: float | WeightDecay,
    maximize: bool,
    decoupled: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (θ, g) for the rule; `decoupled` says what a plain number means to it."""
    if maximize:
        gradient = -gradient
    if not isinstance(weight_decay, WeightDecay):
        weight_decay = WeightDecay(weight_decay, weight_decouple=decoupled)
    amount, decouple, absolute = weight_decay
    if not decouple:
        return theta, gradient + amount * theta
    return theta * (1 - (amount if absolute else lr * amount)), gradient


def own(weight_decay: float | WeightDecay) -> tuple[float, WeightDecay]:
    """The λ of the rule's own formula, and the decay to do before it: a plain number is the first."""
    if isinstance(weight_decay, WeightDecay):
        return 0.0, weight_decay
    return weight_decay, WeightDecay()
