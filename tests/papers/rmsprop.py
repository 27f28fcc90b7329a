"""RMSprop: each gradient divided by the root of its recent mean square.

    v ← alpha·v + (1-alpha)·g²
    a ← alpha·a + (1-alpha)·g           centered only: v̄ = v - a², else v̄ = v
    d = g/(√v̄ + ε)
    θ ← θ - lr·d                        without momentum
    b ← μ·b + d,  θ ← θ - lr·b          with momentum

Source: Tieleman & Hinton 2012, lecture 6e,
https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves 2013,
eq. 38-45, https://arxiv.org/abs/1308.0850; ε outside the root as torch.optim.RMSprop
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, *, momentum: float = 0.0, centered: bool = False, **hyper: Any) -> dict[str, Any]:
    state = {"square_avg": np.zeros_like(theta)}
    if momentum > 0:
        state["momentum_buffer"] = np.zeros_like(theta)
    if centered:
        state["grad_avg"] = np.zeros_like(theta)
    return state


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize)
    v = state["square_avg"] = alpha * state["square_avg"] + (1 - alpha) * g**2
    if centered:
        a = state["grad_avg"] = alpha * state["grad_avg"] + (1 - alpha) * g
        v = v - a**2
    d = g / (np.sqrt(v) + eps)
    if momentum > 0:
        d = state["momentum_buffer"] = momentum * state["momentum_buffer"] + d
    return theta - lr * d
