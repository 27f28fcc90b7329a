"""OrthoGrad."""

from __future__ import annotations

from typing import Any

from steprule.declare import Modifier
from steprule.words import Number, norm, total, where


class OrthoGrad(Modifier):
    """Take out of the gradient what only makes the weights of the tensor longer or shorter.

    When: training goes on after all examples are classified correctly and the loss falls only because the
    weights grow, so that the network never generalizes.

        o = g - ⟨g, θ⟩/‖θ‖² · θ         g where θ is 0
        g ← o·‖g‖/‖o‖                   unchanged where g is parallel to θ, as it always is for a single number

    State: none.
    Differs: from the paper, which steps with o itself; the authors' code gives it the length of g, as here,
    even where g is parallel to θ and nothing but rounding is left of o.
    Source: Prieto, Barsbey, Mediano, Birdal 2025, "Grokking at the Edge of Numerical Stability", ⊥Grad,
    https://arxiv.org/abs/2501.04697
    """

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        size = total(p * p)
        o = g - where(size > 0, total(g * p) / size, 0.0) * p
        length, whole = norm(o), norm(g)
        return where(length > 1e-6 * whole, o * (whole / length), g)
