"""Adafactor: the second moment of a matrix from the means of its rows and columns.

    1 - β2ₜ = t^beta2_decay
    R ← β2ₜ·R + (1-β2ₜ)·mean over columns of G²       one number per row
    C ← β2ₜ·C + (1-β2ₜ)·mean over rows of G²          one number per column
    V̂ = R·C/max(mean(R), ε1)            for vectors and single numbers V̂ ← β2ₜ·V̂ + (1-β2ₜ)·G²
    U = G/max(√V̂, ε1)
    θ ← θ - max(ε2, RMS(θ))·min(lr, 1/√t)·U/max(1, RMS(U)/d)

RMS(θ) is taken before the decay, which is decoupled. ε1 None is the ε of float64; more than two
dimensions are a stack of matrices, with one RMS. The paper adds ε1 to G² instead.
Source: Shazeer & Stern 2018, alg. 4-6, https://arxiv.org/abs/1804.04235; form as
https://docs.pytorch.org/docs/stable/generated/torch.optim.Adafactor.html
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    if theta.ndim < 2:
        return {"variance": np.zeros_like(theta)}
    return {
        "row_var": np.zeros_like(theta[..., :1]),
        "col_var": np.zeros_like(theta[..., :1, :]),
    }


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float | WeightDecay = 0.0,
    maximize: bool = False,
) -> np.ndarray:
    eps1 = float(np.finfo(np.float64).eps) if eps[0] is None else eps[0]
    length = max(eps[1], rms(theta)) * min(lr, 1 / np.sqrt(t))
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    fresh = t**beta2_decay
    if g.ndim < 2:
        v = state["variance"] = (1 - fresh) * state["variance"] + fresh * g**2
    else:
        row_mean = np.mean(g**2, axis=-1, keepdims=True)
        column_mean = np.mean(g**2, axis=-2, keepdims=True)
        r = state["row_var"] = (1 - fresh) * state["row_var"] + fresh * row_mean
        c = state["col_var"] = (1 - fresh) * state["col_var"] + fresh * column_mean
        v = r * c / np.maximum(np.mean(r, axis=-2, keepdims=True), eps1)
    u = g / np.maximum(np.sqrt(v), eps1)
    return theta - length * u / max(1.0, rms(u) / d)


def rms(x: np.ndarray) -> float:
    """The root of the mean square of all numbers in x."""
    return float(np.sqrt(np.mean(x**2)))
