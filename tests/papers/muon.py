"""Muon: momentum whose singular values are all brought near 1.

    M ← μ·M + (1-μ)·G
    U = μ·M + (1-μ)·G   with Nesterov's momentum, else U = M
    θ ← θ·(1 - lr·λ) - lr·scale·orthogonalized(U)

scale: "original" (or None) √max(1, rows/columns); "match_rms_adamw" 0.2·√max(rows, columns);
"spectral_unclamped" √(rows/columns).
The decay uses lr without scale.
Source: Jordan, Jin, Boza, You, Cesista, Newhouse & Bernstein 2024,
https://kellerjordan.github.io/posts/muon/; match_rms_adamw: Liu, Su et al. 2025, sec. 2.2,
https://arxiv.org/abs/2502.16982; spectral_unclamped: Bernstein 2025, "Deriving Muon",
https://jeremybernste.in/writing/deriving-muon; form as torch.optim.Muon
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare
from .orthogonalize import orthogonalized


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"momentum_buffer": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    weight_decay: float | WeightDecay = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    method: str = "newton_schulz",
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - momentum) * g
    u = momentum * m + (1 - momentum) * g if nesterov else m
    x = orthogonalized(u, method, ns_steps, ns_coefficients, eps)
    rows, columns = theta.shape
    if adjust_lr_fn == "match_rms_adamw":
        scale = 0.2 * np.sqrt(max(rows, columns))
    elif adjust_lr_fn == "spectral_unclamped":
        scale = np.sqrt(rows / columns)
    else:
        scale = np.sqrt(max(1, rows / columns))
    return theta - lr * scale * x
