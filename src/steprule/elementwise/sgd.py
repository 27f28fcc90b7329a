"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, errors, hyper, slot
from steprule.words import Number, where


class SGD(Elementwise, flags="maximize foreach differentiable fused"):
    """Gradient descent, with heavy-ball or Nesterov momentum.

    When: convolutional networks with a tuned schedule. Keeps no state without momentum.

        b ← g at the first step, then μ·b + (1 - damp)·g
        d = g + μ·b with Nesterov, else b      (d = g without momentum)
        θ ← θ - lr·d

    State: 1 value per element with momentum (momentum_buffer), else none.
    Source: Polyak 1964; Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and
    momentum in deep learning", https://proceedings.mlr.press/v28/sutskever13.html. The buffer does not
    include lr, as in torch.
    """

    counts_steps = "dampening"
    gradients = "rows"

    lr: float = hyper(default=1e-3, at_least=0, search=(3e-3, 3.0), meaning="step size")
    momentum: float = hyper(
        default=0, at_least=0, switch=True, search=(0.8, 0.99), meaning="μ, the share of the last step to keep"
    )
    dampening: float = hyper(default=0, switch=True, meaning="the share of g that is left out of the buffer")
    weight_decay: float | WeightDecay = decay(default=0)
    nesterov: bool = hyper(default=False, meaning="look ahead along the buffer")

    # Starting at -0.0 makes the first μ·b + g exactly g, for g = -0.0 too.
    b = slot("momentum_buffer", when="momentum", starts=-0.0)

    @staticmethod
    def update(h: SGD, p: Number, g: Number, s: SGD, t: float) -> Number:
        if not h.momentum:
            return -h.lr * g
        if h.dampening:
            s.b = where(t == 1, g, h.momentum * s.b + (1 - h.dampening) * g)
        else:
            s.b = h.momentum * s.b + 1.0 * g
        d = g + h.momentum * s.b if h.nesterov else s.b
        return -h.lr * d

    @classmethod
    def check_group(cls, group: dict[str, Any], index: int | None) -> None:
        if group.get("nesterov") and (not group["momentum"] or group["dampening"]):
            raise errors.contradiction(
                "SGD",
                "nesterov=True",
                f"momentum={group['momentum']}, dampening={group['dampening']}",
                "Nesterov momentum requires a momentum and zero dampening.",
            )
