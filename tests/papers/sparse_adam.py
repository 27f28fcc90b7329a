"""SparseAdam: Adam on the rows that have a gradient; the others do not move, nor do their moments.

    m ← β1·m + (1-β1)·g                 on the rows of this gradient only
    v ← β2·v + (1-β2)·g²
    θ ← θ - lr·√(1-β2ᵗ)/(1-β1ᵗ)·m/(√v + ε)

t counts all steps, not those of a row; ε is not corrected with v. There is no weight decay.
`gradient` has the shape of θ; `rows` is any NumPy index into θ and names no row twice.
Source: Kingma & Ba 2015, the last lines of sec. 2, https://arxiv.org/abs/1412.6980;
https://docs.pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html
"""

from typing import Any

import numpy as np

from .decay import prepare


def init(theta: np.ndarray, **hyper: Any) -> dict[str, Any]:
    return {"exp_avg": np.zeros_like(theta), "exp_avg_sq": np.zeros_like(theta)}


def step(
    theta: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    maximize: bool = False,
    rows: Any = ...,
) -> np.ndarray:
    beta1, beta2 = betas
    theta, g = prepare(theta, gradient, lr=lr, weight_decay=0.0, maximize=maximize)
    theta, m, v = theta.copy(), state["exp_avg"].copy(), state["exp_avg_sq"].copy()
    m[rows] = beta1 * m[rows] + (1 - beta1) * g[rows]
    v[rows] = beta2 * v[rows] + (1 - beta2) * g[rows] ** 2
    scale = lr * np.sqrt(1 - beta2**t) / (1 - beta1**t)
    theta[rows] -= scale * m[rows] / (np.sqrt(v[rows]) + eps)
    state["exp_avg"], state["exp_avg_sq"] = m, v
    return theta
