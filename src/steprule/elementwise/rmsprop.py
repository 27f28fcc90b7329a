"""RMSprop."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, ema, ema_sq, sqrt


class RMSprop(
    Elementwise,
    flags="capturable foreach maximize differentiable",
    positional="capturable foreach maximize differentiable",
):
    """The gradient, divided by its root mean square.

    When: reinforcement learning and recurrent networks; one slot fewer than Adam.

        v ← α·v + (1-α)·g²
        centered: ḡ ← α·ḡ + (1-α)·g, and v - ḡ² replaces v
        d = g / (√v + ε)
        momentum: b ← μ·b + d, θ ← θ - lr·b          else θ ← θ - lr·d

    State: 1 value per element (square_avg); 1 more each for momentum (momentum_buffer) and centered
    (grad_avg).
    Source: Tieleman, Hinton 2012, "Lecture 6.5: rmsprop",
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; Graves 2013, "Generating Sequences
    With Recurrent Neural Networks", eq. 40 (centered), https://arxiv.org/abs/1308.0850. ε is added outside the
    root, as in torch.
    """

    lr: float = hyper(default=1e-2, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    alpha: float = hyper(default=0.99, at_least=0, meaning="α, decay of v")
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0)
    momentum: float = hyper(default=0, at_least=0, switch=True, meaning="μ, the share of the last step to keep")
    centered: bool = hyper(default=False, meaning="divide by the variance instead of the mean square")

    v = slot("square_avg", never_negative=True)
    b = slot("momentum_buffer", when="momentum")
    g_mean = slot("grad_avg", when="centered", subtracted_from="square_avg")

    @staticmethod
    def update(h: RMSprop, p: Number, g: Number, s: RMSprop, t: float) -> Number:
        s.v = v = ema_sq(s.v, g, h.alpha)
        if h.centered:
            s.g_mean = ema(s.g_mean, g, h.alpha)
            v = v - s.g_mean * s.g_mean
        root = sqrt(v) + h.eps
        if h.momentum:
            s.b = s.b * h.momentum + g / root
            return -h.lr * s.b
        return -h.lr * g / root
