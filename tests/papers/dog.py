"""DoG: the step size is the distance from the start over the root of the sum of squared gradients.

    r ← max(r, ‖θ - θ0‖)        r = r_ε·(1 + ‖θ0‖) at the first step
    G ← G + ‖g‖²                from ε
    θ ← θ - lr·r/√G·g

One tensor is the whole group here, which makes it L-DoG too; weight decay is L2.
Source: Ivgi, Hinder, Carmon 2023, eq. 1 and §3.3, https://arxiv.org/abs/2302.12022
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
    total = state["G"] = state["G"] + np.sum(g**2)
    return theta - lr * r / np.sqrt(total) * g
