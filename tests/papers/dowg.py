"""DoWG: DoG with the squared gradients weighted by the squared distance at which they were met.

    r ← max(r, ‖θ - θ0‖)        r = r_ε·(1 + ‖θ0‖) at the first step
    G ← G + r²·‖g‖²             from ε
    θ ← θ - lr·r²/√G·g

One tensor is the whole group here; weight decay is L2.
Source: Khaled, Mishchenko, Jin 2023, alg. 1, https://arxiv.org/abs/2305.16284
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, *, eps: float = 1e-8, **hyper: Any) -> dict[str, Any]:
    return {"p0": theta.copy(), "rbar": np.zeros(()), "G": np.array(eps)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1.0,
    reps_rel: float = 1e-6,
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize)
    distance = np.sqrt(np.sum((theta - state["p0"]) ** 2))
    if t == 1:
        state["rbar"] = np.asarray(reps_rel * (1 + np.sqrt(np.sum(state["p0"] ** 2))))
    r = state["rbar"] = np.maximum(state["rbar"], distance)
    total = state["G"] = state["G"] + r**2 * np.sum(g**2)
    return theta - lr * r**2 / np.sqrt(total) * g
