"""Sharpness-aware minimization."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, hyper
from steprule.words import Number, norm


class SAM(Modifier):
    """Take the gradient where the loss is nearly the highest in a small ball around the weights.

    When: generalization matters more than time: every step needs the loss twice. Give `step` a closure, or call
    `optimizer.climb()` after the first backward pass and `optimizer.step()` after the second one, as with a
    GradScaler.

        θ' = θ + ρ·g/(‖g‖ + 1e-12)              ‖g‖ over all parameters
        the rule steps from θ with the gradient at θ'

    State: none between steps; a copy of the weights while they are at θ'.
    Source: Foret, Kleiner, Mobahi, Neyshabur 2021, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization", algorithm 1, https://arxiv.org/abs/2010.01412
    """

    rho: float = hyper(default=0.05, at_least=0, meaning="ρ, the radius of the ball")

    @staticmethod
    def climb(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        return p + (h.rho / (norm(g, over="all") + 1e-12)) * g


class ASAM(Modifier):
    """SAM in a ball that is wide along large weights, so that rescaling layers does not change it.

    When: as SAM, for networks whose layers differ much in scale.

        θ' = θ + ρ·θ²·g/(‖θ·g‖ + 1e-12)         ‖·‖ over all parameters
        the rule steps from θ with the gradient at θ'

    State: none between steps; a copy of the weights while they are at θ'.
    Source: Kwon, Kim, Park, Choi 2021, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks", algorithm 1, https://arxiv.org/abs/2102.11600
    """

    not_with: ClassVar[dict[str, str]] = {"SAM": "both say where the gradient is taken."}

    rho: float = hyper(default=0.5, at_least=0, meaning="ρ, the radius of the ball")

    @staticmethod
    def climb(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        return p + (h.rho / (norm(p * g, over="all") + 1e-12)) * (p * p * g)
