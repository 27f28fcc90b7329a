"""Adam, and AMSGrad."""

from __future__ import annotations

from typing import ClassVar

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, larger, sqrt


class Adam(Elementwise):
    """The mean of recent gradients, divided by their root mean square.

    When: a safe default for most networks; prefer AdamW with weight decay.

        m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²
        θ ← θ - lr/(1-β1ᵗ) · m / (√v/√(1-β2ᵗ) + ε)
        amsgrad: uses the largest v so far in place of v
        optimized_update: θ ← θ - lr·√(1-β2ᵗ)/(1-β1ᵗ) · m / (√v + ε)

    State: 2 values per element (exp_avg, exp_avg_sq); 3 with amsgrad (max_exp_avg_sq).
    Source: Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1 and the end of §2
    (the optimized update), https://arxiv.org/abs/1412.6980; Reddi, Kale, Kumar 2018, "On the Convergence of
    Adam and Beyond" (amsgrad), https://arxiv.org/abs/1904.09237
    """

    lists_take_tensors: ClassVar[bool] = False

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0)
    amsgrad: bool = hyper(default=False, meaning="divide by the largest v so far")
    decoupled_weight_decay: bool = hyper(default=False, kw_only=True, meaning="decay as AdamW does")
    optimized_update: bool = hyper(default=False, kw_only=True, meaning="add ε before correcting the bias of v")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)
    v_max = slot("max_exp_avg_sq", when="amsgrad", never_negative=True)

    @staticmethod
    def update(h: Adam, p: Number, g: Number, s: Adam, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        s.v = v = ema_sq(s.v, g, beta2)
        if h.amsgrad:
            s.v_max = v = larger(s.v_max, v)
        if h.optimized_update:
            return -(h.lr * sqrt(1 - beta2**t) / (1 - beta1**t)) * s.m / (sqrt(v) + h.eps)
        return -(h.lr / (1 - beta1**t)) * s.m / (sqrt(v) / sqrt(1 - beta2**t) + h.eps)


class AMSGrad(Elementwise):
    """Adam that divides by the largest second moment so far, so that the divisor never shrinks.

    When: Adam's loss is unstable late in training. The defaults are labml's; `Adam(amsgrad=True)` has torch's.

        m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·g²        v̄ ← max(v̄, v)
        θ ← θ - lr·√(1-β2ᵗ)/(1-β1ᵗ) · m / (√v̄ + ε)

    State: 3 values per element (exp_avg, exp_avg_sq, max_exp_avg_sq).
    Source: Reddi, Kale, Kumar 2018, "On the Convergence of Adam and Beyond", algorithm 2,
    https://arxiv.org/abs/1904.09237. A number given as weight_decay is decoupled; the maximum is of the
    uncorrected v, as in torch and labml.
    """

    lr: float = hyper(default=1e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-16, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")
    optimized_update: bool = hyper(default=True, meaning="add ε before correcting the bias of v")
    amsgrad: bool = hyper(default=True, meaning="False: plain Adam")

    m = slot("exp_avg")
    v = slot("exp_avg_sq", never_negative=True)
    v_max = slot("max_exp_avg_sq", when="amsgrad", never_negative=True)

    update = staticmethod(Adam.update)
