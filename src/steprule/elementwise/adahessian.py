"""AdaHessian."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, scalar_slot, slot
from steprule.words import Number, ema, larger, sqrt, where


class AdaHessian(Elementwise):
    """Adam with the curvature in place of the gradient's square: flat directions get large steps.

    When: the loss is much steeper in some directions than in others, and a step may take three times as long.
    At every step, call `update_hessian(steprule.hutchinson(loss, params))` before `step`. Before its first
    estimate a parameter only decays.

        m ← β1·m + (1-β1)·g         v ← β2·v + (1-β2)·D²   in update_hessian, D = z⊙Hz
        θ ← θ·(1 - lr·λ)
        θ ← θ - lr/(1-β1ᵗ) · m / ((√v/√(1-β2ⁿ))ᵏ + ε)      n: how many times update_hessian was called

    State: 2 values per element (exp_avg, exp_hessian_diag_sq), and n.
    Differs: the authors average |D| over the elements of a convolution's kernel, or over blocks of a matrix.
    Implementations that keep D for several steps take it into v again at each.
    Source: Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney 2021, "ADAHESSIAN: An Adaptive Second Order Optimizer
    for Machine Learning", algorithm 1, https://arxiv.org/abs/2006.00719, with the defaults of the authors' code
    """

    lr: float = hyper(default=0.15, at_least=0, search=(1e-3, 1.0), meaning="step size")
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1, meaning="decay of m, of v")
    eps: float = hyper(default=1e-4, at_least=0, meaning="ε, keeps steps small where D is nearly 0")
    hessian_power: float = hyper(default=1.0, choices=(1.0, 0.5), meaning="k; 0.5 divides by the root")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")

    m = slot("exp_avg")
    v = slot("exp_hessian_diag_sq", never_negative=True)
    n = scalar_slot("estimates")

    @staticmethod
    def update(h: AdaHessian, p: Number, g: Number, s: AdaHessian, t: float) -> Number:
        beta1, beta2 = h.betas
        s.m = ema(s.m, g, beta1)
        size = sqrt(s.v) / sqrt(1 - beta2 ** larger(s.n, 1))
        if h.hessian_power == 0.5:
            size = sqrt(size)
        lr = where(s.n > 0, h.lr, 0.0)
        return -(lr / (1 - beta1**t)) * s.m / (size + where(s.n > 0, h.eps, 1.0))

    @staticmethod
    def estimate(h: AdaHessian, p: Number, d: Number, s: AdaHessian, t: float) -> None:
        s.n = s.n + 1
        s.v = ema(s.v, d * d, h.betas[1])
