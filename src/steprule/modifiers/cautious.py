"""Cautious."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, hyper
from steprule.words import Number, larger, mean, where


class Cautious(Modifier):
    """Keep only those elements of the change that agree with the gradient, and scale them up.

    When: any rule with momentum, most of all AdamW and Lion on transformers. It costs a second read of
    everything.

        k = 1 where u·g < 0, else 0
        u ← u · k / max(mean(k), floor)

    State: none.
    Differs: Lion's authors in the paper divide by (n·mean(k) + 1)/n; this is the form of C-AdamW's authors.
    Source: Liang, Chen, Liu, Liu 2024, "Cautious Optimizers: Improving Training with One Line of Code",
    algorithm 1, https://arxiv.org/abs/2411.16085
    """

    not_with: ClassVar[dict[str, str]] = {"Grams": "both decide the signs of the change."}

    floor: float = hyper(default=1e-3, above=0, meaning="the smallest share of agreeing elements to divide by")

    @staticmethod
    def change(h: Any, p: Number, g: Number, u: Number, s: Any, t: Any) -> Number:
        agrees = u * g < 0
        return where(agrees, u, 0.0) / larger(mean(agrees), h.floor)
