"""ASGD: SGD whose iterates are averaged.

    θ ← θ·(1 - λ'·η) - η·g              λ' is lambd, η₁ = lr
    a ← a + μ·(θ - a)                   μ₁ = 1
    ηₜ₊₁ = lr/(1 + λ'·lr·t)^alpha       μₜ₊₁ = 1/max(1, t - t0)

a ("ax") is the average; θ itself is what the model uses.
Source: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; schedules: Bottou 2010, sec. 5,
https://leon.bottou.org/publications/pdf/compstat-2010.pdf, as torch.optim.ASGD has them
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, *, lr: float = 1e-2, **hyper: Any) -> dict[str, Any]:
    return {"ax": np.zeros_like(theta), "eta": np.full((), lr), "mu": np.ones(())}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize)
    eta, mu = state["eta"], state["mu"]
    theta = theta * (1 - lambd * eta) - eta * g
    state["ax"] = state["ax"] + mu * (theta - state["ax"])
    state["eta"] = np.asarray(lr / (1 + lambd * lr * t) ** alpha)
    state["mu"] = np.asarray(1 / max(1, t - t0))
    return theta
