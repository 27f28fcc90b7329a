"""Shampoo: each matrix multiplied by inverse roots of its gradients' accumulated products, on both sides.

    m ← β1·m + (1-β1)·G,  v ← β2·v + (1-β2)·G²,  a = m̂/(√v̂ + ε2)        m̂ = m/(1-β1ᵗ), v̂ = v/(1-β2ᵗ)
    L ← L + G·Gᵀ, R ← R + Gᵀ·G;  with β3 < 1 averages, corrected by 1-β3ᵗ
    every `every` steps: their inverse roots, of L + ε1·1 and R + ε1·1, to the power -1/(2·number of sides)
    u = root(L)·m̂·root(R)
    graft: u ← u·‖a‖/‖u‖, and u = a until the first roots; otherwise the first roots are those of t = 1
    θ ← θ - lr·u

A side longer than max_side has none; both_sides = False leaves out R. Vectors, and matrices without any, are
stepped by a. Eigenvalues below n·epsilon·(the largest) count as that.
Source: Gupta, Koren & Singer 2018, alg. 1, https://arxiv.org/abs/1802.09568; averages, correction, grafting and
its first steps: Shi et al. 2023, https://arxiv.org/abs/2309.06497; one side: https://arxiv.org/abs/2503.20762
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta), "each": {}}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    side_decay: float = 1.0,
    eps: tuple[float, float] = (1e-12, 1e-8),
    weight_decay: float | WeightDecay = 0.0,
    every: int = 10,
    max_side: int = 10000,
    both_sides: bool = True,
    graft: bool = True,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    state["exp_avg"] = betas[0] * state["exp_avg"] + (1 - betas[0]) * g
    state["exp_avg_sq"] = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * g**2
    m = state["exp_avg"] / (1 - betas[0] ** t)
    a = m / (np.sqrt(state["exp_avg_sq"] / (1 - betas[1] ** t)) + eps[1])
    if theta.ndim < 2:
        return theta - lr * a
    sides = [axis for axis in (0, 1)[: 1 + both_sides] if theta.shape[axis - 2] <= max_side]
    stacked = (-1, *theta.shape[-2:])
    u = np.empty(theta.shape).reshape(stacked)
    triples = zip(m.reshape(stacked), a.reshape(stacked), g.reshape(stacked), strict=True)
    for place, (m_i, a_i, g_i) in enumerate(triples):
        u[place] = a_i
        own = state["each"].setdefault(place, {})
        u_i = m_i
        for axis in sides:
            square = g_i @ g_i.T if axis == 0 else g_i.T @ g_i
            weights = (1.0, 1.0, 1.0) if side_decay == 1 else (side_decay, 1 - side_decay, 1 - side_decay**t)
            own[axis] = weights[0] * own.get(axis, 0.0) + weights[1] * square
            if t % every == 0 or (t == 1 and not graft):
                own[f"root {axis}"] = inverse_root(own[axis] / weights[2], 2 * len(sides), eps[0])
            if f"root {axis}" in own:
                u_i = own[f"root {axis}"] @ u_i if axis == 0 else u_i @ own[f"root {axis}"]
        if sides and f"root {sides[0]}" in own:
            u[place] = u_i * np.linalg.norm(a_i) / np.linalg.norm(u_i) if graft else u_i
    return theta - lr * u.reshape(theta.shape)


def inverse_root(matrix: np.ndarray, root: int, eps: float) -> np.ndarray:
    """(matrix + ε·1)^(-1/root)."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, values[-1] * len(values) * np.finfo(np.float64).eps) + eps
    return vectors @ np.diag(values ** (-1 / root)) @ vectors.T
