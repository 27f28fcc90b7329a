"""Kron (PSGD): triangular factors P, Q, fitted so that P·G·Qᵀ is as white as noise, precondition both sides.

    m ← μ·m + (1-μ)·G, m̂ = m/(1-μᵗ)
    a fit when the steps since the last one, with this one, reach 1/π:
        π = max(fit_min, min(1, exp(-fit_decay·(t-1-fit_start))))
        V ~ N(0, 1),  A = P·m̂·Qᵀ,  B = P⁻ᵀ·V·Q⁻¹
        P ← P - ρ·triu(A·Aᵀ - B·Bᵀ)·P/n(A·Aᵀ + B·Bᵀ),  Q with Aᵀ·A, Bᵀ·B;  both from the same A and B
        n(S): S's row x of the largest norm, y = x·S/‖x·S‖, ‖y·S‖ (a lower bound of the spectral norm)
    u = Pᵀ·P·m̂·Qᵀ·Q, shortened to a root mean square of 1.1 if that is less;  θ ← θ - lr·u

Of longer sides than max_side P (Q) is diagonal: only the diagonals of A·Aᵀ, B·Bᵀ, n is their largest sum. So is
the one of vectors.
Source: Li 2015, https://arxiv.org/abs/1512.04202; Pooladzandi & Li 2024, https://arxiv.org/abs/2402.04553;
schedule, n and limits: https://github.com/evanatyourservice/kron_torch
"""

from typing import Any

import numpy as np

from . import draws
from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"momentum_buffer": np.zeros_like(theta), "since": 0.0}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float | WeightDecay = 0.0,
    fit_lr: float = 0.1,
    fit_min: float = 0.03,
    fit_decay: float = 1e-3,
    fit_start: int = 500,
    max_side: int = 8192,
    seed: int = 0,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - momentum) * g
    m = state["momentum_buffer"] / (1 - momentum**t)
    often = max(fit_min, min(1.0, np.exp(-fit_decay * (t - 1 - fit_start))))
    due = (state["since"] + 1) * often >= 1
    state["since"] = 0.0 if due else state["since"] + 1
    noise = draws.gaussian(theta.shape, state.get("place", 0), t - 1, seed=seed) if due else m
    shape = (-1, *theta.shape[-2:]) if theta.ndim > 1 else (1, 1, -1)
    u = np.empty(theta.shape).reshape(shape)
    for place, (m_i, v_i) in enumerate(zip(m.reshape(shape), noise.reshape(shape), strict=True)):
        if place not in state:
            state[place] = [np.eye(size) for size in m_i.shape]
        p, q = state[place]
        if due:
            a, b = p @ m_i @ q.T, np.linalg.inv(p).T @ v_i @ np.linalg.inv(q)
            if theta.ndim > 1:
                p = p - fit_lr * moved(a @ a.T, b @ b.T, len(p) > max_side) @ p
            q = q - fit_lr * moved(a.T @ a, b.T @ b, theta.ndim < 2 or len(q) > max_side) @ q
            state[place] = [p, q]
        u_i = p.T @ p @ m_i @ q.T @ q
        u[place] = u_i * min(1.0, 1.1 / (np.sqrt(np.mean(u_i**2)) + 1e-8))
    return theta - lr * u.reshape(theta.shape)


def moved(squares: np.ndarray, noise: np.ndarray, diagonal: bool) -> np.ndarray:
    """What P moves by, as a multiple of itself."""
    if diagonal:
        return np.diag(np.diag(squares - noise) / np.max(np.diag(squares + noise)))
    both = squares + noise
    x = both[np.argmax(np.sum(both**2, axis=1))] @ both
    return np.triu(squares - noise) / np.linalg.norm(x / np.linalg.norm(x) @ both)
