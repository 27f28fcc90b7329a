"""SGD with momentum.

    b₁ = g₁        bₜ = μ·bₜ₋₁ + (1 - dampening)·gₜ
    θ ← θ - lr·g   without momentum
    θ ← θ - lr·b   with momentum
    θ ← θ - lr·(g + μ·b)   with Nesterov's

The first b is the gradient itself, undamped; lr multiplies b and does not enter it.
Source: Sutskever, Martens, Dahl & Hinton 2013, sec. 2, https://proceedings.mlr.press/v28/sutskever13.html,
as restated in https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float | WeightDecay = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize)
    if momentum == 0:
        return theta - lr * g
    before = state.get("momentum_buffer")
    b = g.copy() if before is None else momentum * before + (1 - dampening) * g
    state["momentum_buffer"] = b
    return theta - lr * (g + momentum * b if nesterov else b)
