"""Rprop: only the sign of the gradient counts; each number has a step size of its own.

    c = g·g₋₁                           g₋₁ = 0 at first
    Δ ← clip(Δ·(η+ if c > 0, η- if c < 0, else 1), smallest, largest)      Δ₀ = lr
    where c < 0: g ← 0                  no step now, and no comparison at the next step
    θ ← θ - sign(g)·Δ                   g₋₁ ← g

lr is the first step size and nothing else. There is no weight decay.
Source: Igel & Hüsken 2000, "Improving the Rprop learning algorithm", alg. 2 (iRprop-), after
Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623; form as torch.optim.Rprop
"""

from typing import Any

import numpy as np

from .decay import prepare


def init(theta: np.ndarray, *, lr: float = 1e-2, **hyper: Any) -> dict[str, Any]:
    return {"prev": np.zeros_like(theta), "step_size": np.full_like(theta, lr)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50),
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=0.0, maximize=maximize)
    smaller, larger = etas
    c = g * state["prev"]
    factor = np.where(c > 0, larger, np.where(c < 0, smaller, 1.0))
    size = state["step_size"] = np.clip(state["step_size"] * factor, *step_sizes)
    g = state["prev"] = np.where(c < 0, 0.0, g)
    return theta - np.sign(g) * size
