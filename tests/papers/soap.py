"""SOAP: Adam on the gradient turned into the eigenvectors of its averaged products, and turned back.

    t = 0:  L = (1-β2)·G·Gᵀ, R = (1-β2)·Gᵀ·G, P and Q their eigenvectors (falling eigenvalues), no step
    t > 0:  m ← β1·m + (1-β1)·G,  v ← β2·v + (1-β2)·(Pᵀ·G·Q)²
            θ ← θ - lr·√(1-β2ᵗ)/(1-β1ᵗ) · P·[(Pᵀ·m·Q)/(√v + ε)]·Qᵀ
            L, R as averages of G·Gᵀ, Gᵀ·G
            every `every` steps the columns of P (Q) and the rows (columns) of v are sorted by the diagonal of
            Pᵀ·L·P (Qᵀ·R·Q), and P ← orthogonal factor of L·P (Q ← that of R·Q)

A side longer than max_side has no basis. Vectors, and matrices without any basis, are stepped by Adam from
their first step on, with the same form of ε. The decay is before the step, also at t = 0.
Source: Vyas et al. 2024, alg. 3, https://arxiv.org/abs/2409.11321; the first step and the sorting: the authors'
soap.py, https://github.com/nikhilvyas/SOAP
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare

SIDES = (("left", 0), ("right", 1))


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    weight_decay: float | WeightDecay = 1e-2,
    every: int = 10,
    max_side: int = 10000,
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    matrices = theta[None] if theta.ndim == 2 else theta
    if theta.ndim < 2 or min(matrices.shape[-2:]) > max_side:
        u = adam(g, state, betas, eps)
        return theta - corrected(lr, betas, t) * u
    gradients = g.reshape(matrices.shape)
    if t == 1:
        state["each"] = [first(x, betas[1], max_side) for x in gradients]
        return theta
    pairs = zip(gradients, state["each"], strict=True)
    u = np.stack([turned_step(x, own, betas, eps, every, t - 1) for x, own in pairs])
    return theta - corrected(lr, betas, t - 1) * u.reshape(theta.shape)


def corrected(lr: float, betas: tuple[float, float], t: int) -> float:
    return lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)


def adam(g: np.ndarray, state: dict[str, Any], betas: tuple[float, float], eps: float) -> np.ndarray:
    state["exp_avg"] = betas[0] * state["exp_avg"] + (1 - betas[0]) * g
    state["exp_avg_sq"] = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * g**2
    return state["exp_avg"] / (np.sqrt(state["exp_avg_sq"]) + eps)


def first(g: np.ndarray, beta: float, max_side: int) -> dict[str, Any]:
    """The state of one matrix after the first gradient."""
    own: dict[str, Any] = init(g)
    for (side, axis), square in zip(SIDES, (g @ g.T, g.T @ g), strict=True):
        if g.shape[axis] <= max_side:
            own[side] = (1 - beta) * square
            own[f"{side}_basis"] = np.linalg.eigh(own[side])[1][:, ::-1]
    return own


def turned_step(g: np.ndarray, own: dict[str, Any], betas: Any, eps: float, every: int, t: int) -> np.ndarray:
    """The direction of one matrix."""
    p, q = own.get("left_basis", np.eye(g.shape[0])), own.get("right_basis", np.eye(g.shape[1]))
    own["exp_avg"] = betas[0] * own["exp_avg"] + (1 - betas[0]) * g
    own["exp_avg_sq"] = betas[1] * own["exp_avg_sq"] + (1 - betas[1]) * (p.T @ g @ q) ** 2
    u = p @ (p.T @ own["exp_avg"] @ q / (np.sqrt(own["exp_avg_sq"]) + eps)) @ q.T
    for (side, axis), square in zip(SIDES, (g @ g.T, g.T @ g), strict=True):
        if side in own:
            own[side] = betas[1] * own[side] + (1 - betas[1]) * square
            if t % every == 0:
                basis = own[f"{side}_basis"]
                order = np.argsort(-np.diag(basis.T @ own[side] @ basis))
                own["exp_avg_sq"] = np.take(own["exp_avg_sq"], order, axis)
                own[f"{side}_basis"] = np.linalg.qr(own[side] @ basis[:, order])[0]
    return u
