"""AdamW."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.elementwise.adam import Adam


class AdamW(Elementwise):
    """Adam with decoupled weight decay.

    When: transformers, and any model with weight decay. The usual baseline.

        θ ← θ·(1 - lr·λ)
        m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²
        θ ← θ - lr/(1-β1ᵗ) · m / (√v/√(1-β2ᵗ) + ε)

    State: 2 values per element (exp_avg, exp_avg_sq); 3 with amsgrad (max_exp_avg_sq).
    Source: Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2,
    https://arxiv.org/abs/1711.05101
    """

    fixed: ClassVar[dict[str, Any]] = {"decoupled_weight_decay": True}
    lists_take_tensors: ClassVar[bool] = False

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=1e-2, mode="decoupled")
    amsgrad: bool = hyper(default=False, meaning="divide by the largest v so far")
    optimized_update: bool = hyper(default=False, kw_only=True, meaning="add ε before correcting the bias of v")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)
    v_max = slot("max_exp_avg_sq", when="amsgrad", never_negative=True)

    update = staticmethod(Adam.update)
