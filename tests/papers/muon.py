"""Muon: momentum whose singular values are all brought near 1.

    M ← μ·M + (1-μ)·G
    U = μ·M + (1-μ)·G   with Nesterov's momentum, else U = M
    X = U/max(‖U‖, ε), transposed when it has more rows than columns (‖·‖ is Frobenius')
    ns_steps times:  A = X·Xᵀ,  X ← a·X + (b·A + c·A²)·X
    θ ← θ·(1 - lr·λ) - lr·scale·X

scale: "original" (or None) √max(1, rows/columns); "match_rms_adamw" 0.2·√max(rows, columns);
"spectral_unclamped" √(rows/columns).
The decay uses lr without scale. torch computes X in bfloat16, here it is float64.
Source: Jordan, Jin, Boza, You, Cesista, Newhouse & Bernstein 2024,
https://kellerjordan.github.io/posts/muon/; match_rms_adamw: Liu, Su et al. 2025, sec. 2.2,
https://arxiv.org/abs/2502.16982; spectral_unclamped: Bernstein 2025, "Deriving Muon",
https://jeremybernste.in/writing/deriving-muon; form as torch.optim.Muon
"""

from typing import Any

import numpy as np

from .decay import WeightDecay, prepare


def newton_schulz(
    matrix: np.ndarray, coefficients: tuple[float, float, float], steps: int, eps: float
) -> np.ndarray:
    """Return U·S'·Vᵀ for matrix = U·S·Vᵀ with S' near 1."""
    a, b, c = coefficients
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    x = x / max(np.sqrt(np.sum(x**2)), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if rows > columns else x


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
    maximize: bool = False,
) -> np.ndarray:
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=weight_decay, maximize=maximize, decoupled=True)
    m = state["momentum_buffer"] = momentum * state["momentum_buffer"] + (1 - momentum) * g
    u = momentum * m + (1 - momentum) * g if nesterov else m
    x = newton_schulz(u, ns_coefficients, ns_steps, eps)
    rows, columns = theta.shape
    if adjust_lr_fn == "match_rms_adamw":
        scale = 0.2 * np.sqrt(max(rows, columns))
    elif adjust_lr_fn == "spectral_unclamped":
        scale = np.sqrt(rows / columns)
    else:
        scale = np.sqrt(max(1, rows / columns))
    return theta - lr * scale * x
