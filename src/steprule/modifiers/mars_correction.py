"""MARSCorrection."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, hyper, slot
from steprule.words import Number, is_matrix, larger, norm


class MARSCorrection(Modifier):
    """Correct the gradient of a matrix by how it changed since the last step.

    When: language models with large batches, with the rule that you have; the rule MARS is AdamW with this.

        c = g + γ·β/(1-β)·(g - g of the last step)         (0 before the first)
        g ← c / max(1, ‖c‖)                                 (norm of the tensor; vectors stay as they are)

    β is the rule's β1 or its momentum, or 0.95 if it has neither.

    State: 1 value per element of a matrix (last_grad).
    Source: Yuan, Liu, Wu, Zhou, Gu 2024, "MARS: Unleashing the Power of Variance Reduction for Training Large
    Models", algorithm 1, https://arxiv.org/abs/2411.10438
    """

    not_with: ClassVar[dict[str, str]] = {"MARS": "the rule corrects its gradients already."}

    gamma: float = hyper(default=0.025, at_least=0, meaning="γ, how much of the change of g is added")
    beta: float | None = hyper(default=None, at_least=0, below=1, meaning="β; None: that of the rule")

    g_last = slot("last_grad", only="matrices", not_in_8_bits="a small change of the gradient would be lost")

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        if not is_matrix(p):
            return g
        own = h.betas[0] if hasattr(h, "betas") else h.momentum if hasattr(h, "momentum") else 0.95
        beta = own if h.beta is None else h.beta
        c = g + (h.gamma * (beta / (1 - beta))) * (g - s.g_last)
        s.g_last = g
        return c / larger(1.0, norm(c))
