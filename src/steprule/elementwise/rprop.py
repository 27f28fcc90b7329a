"""Rprop."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, errors, hyper, slot
from steprule.words import Number, clamp, sign, where


class Rprop(Elementwise, flags="capturable foreach maximize differentiable"):
    """Every element has its own step size, which grows while its gradient keeps its sign.

    When: full batches. With mini-batches the signs are too noisy.

        c = sign(g·g₋₁)
        δ ← clip(δ·η⁺ if c > 0, δ·η⁻ if c < 0, else δ)      g ← 0 where c < 0
        θ ← θ - sign(g)·δ           g₋₁ ← g

    State: 2 values per element (prev, step_size); step_size starts at lr.
    Source: Riedmiller, Braun 1993, "A Direct Adaptive Method for Faster Backpropagation Learning"; the
    variant without weight backtracking (iRprop-) is by Igel, Hüsken 2000, as in torch,
    https://doi.org/10.1109/ICNN.1993.298623
    """

    lr: float = hyper(default=1e-2, at_least=0, search=(1e-4, 1e-1), meaning="the first step size")
    etas: tuple[float, float] = hyper(default=(0.5, 1.2), above=0, meaning="η⁻ below 1, η⁺ above 1")
    step_sizes: tuple[float, float] = hyper(default=(1e-6, 50), at_least=0, meaning="smallest and largest δ")

    g_last = slot("prev", not_in_8_bits="a small gradient would lose its sign")
    delta = slot("step_size", starts="lr", not_in_8_bits="it changes by less than one 8-bit code")

    @staticmethod
    def update(h: Rprop, p: Number, g: Number, s: Rprop, t: float) -> Number:
        shrink, grow = h.etas
        c = sign(g * s.g_last)
        factor = where(c > 0, grow, where(c < 0, shrink, 1.0))
        s.delta = clamp(s.delta * factor, *h.step_sizes)
        s.g_last = g = where(c < 0, 0.0, g)
        return -sign(g) * s.delta

    @classmethod
    def check_group(cls, group: dict[str, Any], index: int | None) -> None:
        shrink, grow = group["etas"]
        if not 0 < shrink < 1 < grow:
            allowed = "the first above 0 and below 1, the second above 1"
            raise errors.out_of_range("Rprop", "etas", group["etas"], allowed, index)
        if group["step_sizes"][0] > group["step_sizes"][1]:
            allowed = "the smallest first"
            raise errors.out_of_range("Rprop", "step_sizes", group["step_sizes"], allowed, index)
