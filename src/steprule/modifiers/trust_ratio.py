"""TrustRatio."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier
from steprule.words import Number, norm, where


class TrustRatio(Modifier):
    """Make the change of every tensor as long as lr times the tensor itself.

    When: very large batches. On Adam it gives LAMB without its decay, on SGD it is LARS's idea.

        u ← u · ‖θ‖ / ‖u/lr‖          unchanged where either norm is 0

    State: none.
    Differs: NVIDIA's RelativeUpdate is the same, but leaves a tensor of zeros at zero.
    Source: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
    algorithm 2, https://arxiv.org/abs/1904.00962
    """

    not_with: ClassVar[dict[str, str]] = {
        "LAMB": "the rule scales its change in this way already.",
        "LARS": "the rule scales its change in this way already.",
        "Hyperball": "both decide how long the change is.",
    }

    @staticmethod
    def change(h: Any, p: Number, g: Number, u: Number, s: Any, t: Any) -> Number:
        length, weight = norm(u), norm(p)
        ratio = where(weight > 0, where(length > 0, h.lr * weight / length, 1.0), 1.0)
        return u * ratio
