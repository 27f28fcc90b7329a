"""Schedule-free learning: gradients at y, steps on z, their average x.

    y = (1-β)·z + β·x
    z ← z - γ·n                 n from the gradient at y
    x ← (1-c)·x + c·z           c = w/Σw, w = tʳ·(largest γ so far)ᵖ

    SGD     n = g + λ·y
    AdamW   v ← β2·v + (1-β2)·g²,  n = g/(√(v/(1-β2ᵗ)) + ε) + λ·y
    RAdam   as AdamW with γ·rₜ where ρₜ > 4; before, n = g + λ·y with γ = 0, or γ itself

Source: Defazio et al. 2024, alg. 1, https://arxiv.org/abs/2405.15682; RAdam of Liu et al. 2020.
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, own, prepare
from .radam import rectification, sma_length


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"z": theta.copy(), "v": np.zeros_like(theta), "top": 0.0, "sum": 0.0}


def average(theta: np.ndarray, state: dict[str, Any], beta: float = 0.9) -> np.ndarray:
    """x, which y = θ and z determine."""
    return (theta - (1 - beta) * state["z"]) / beta


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    kind: str,
    lr: float | None = None,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 0.0,
    warmup_steps: int = 0,
    step_power: float = 0.0,
    weight_lr_power: float = 2.0,
    silent_sgd_phase: bool = True,
    maximize: bool = False,
) -> np.ndarray:
    lr = (1.0 if kind == "sgd" else 2.5e-3) if lr is None else lr
    amount, before = own(weight_decay)
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=before, maximize=maximize)
    beta = momentum if kind == "sgd" else betas[0]
    gamma = lr * min(1.0, t / warmup_steps) if warmup_steps else lr
    n = g
    if kind != "sgd":
        state["v"] = betas[1] * state["v"] + (1 - betas[1]) * g**2
        n = g / (np.sqrt(state["v"] / (1 - betas[1] ** t)) + eps)
    if kind == "radam":
        if sma_length(betas[1], t) > 4:
            gamma = lr * rectification(betas[1], t)
        else:
            n, gamma = g, 0.0 if silent_sgd_phase else lr
    n = n + amount * theta
    x = average(theta, state, beta)
    state["top"] = max(state["top"], gamma)
    weight = t**step_power * state["top"] ** weight_lr_power
    state["sum"] += weight
    c = weight / state["sum"] if state["sum"] else 0.0
    state["z"] = state["z"] - gamma * n
    x = (1 - c) * x + c * state["z"]
    return (1 - beta) * state["z"] + beta * x
