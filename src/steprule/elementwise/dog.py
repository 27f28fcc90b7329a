"""DoG, and its variant for each layer."""

from __future__ import annotations

from typing import Literal

from steprule.declare import Elementwise, WeightDecay, decay, hyper, parameter, slot
from steprule.words import Number, larger, norm, sqrt, total

NOT_DECOUPLED = "lr is 1 and not the step size, and a decay would count as distance from the start."


def step(h: DoG | LDoG, p: Number, g: Number, s: DoG | LDoG, over: Literal["tensor", "group"]) -> Number:
    """The formula, with norms over a tensor or over its group."""
    first = h.reps_rel * (1 + norm(s.start, over))
    s.r = larger(larger(s.r, norm(p - s.start, over)), first)
    s.G = s.G + total(g * g, over)
    return -(h.lr * s.r / sqrt(s.G)) * g


class DoG(Elementwise):
    """SGD whose step size is the distance travelled so far, divided by the root of all squared gradients.

    When: fine-tuning, without a learning rate to tune. Evaluate with an average of the weights: the step size
    does not go to zero.

        r ← max(r, ‖θ - θ0‖, r_ε·(1 + ‖θ0‖))        G ← G + ‖g‖²        (norms of the parameter group)
        θ ← θ - lr·r/√G · g

    State: 1 value per element (p0), and r and G of each group, in the group.
    Source: Ivgi, Hinder, Carmon 2023, "DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule",
    equation 1 and §3.3, https://arxiv.org/abs/2302.12022
    """

    lr: float = hyper(
        default=1.0, at_least=0, search=(0.3, 3.0), meaning="scales the step size that is found; leave it at 1"
    )
    reps_rel: float = hyper(
        default=1e-6, above=0, meaning="r_ε, the first step; 1e-4 for networks with batch normalization"
    )
    eps: float = hyper(default=1e-8, above=0, meaning="where G starts, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0, not_decoupled=NOT_DECOUPLED)

    r = slot("rbar", per="group")
    G = slot("G", per="group", starts="eps")
    start = slot("p0", starts=parameter)

    @staticmethod
    def update(h: DoG, p: Number, g: Number, s: DoG, t: float) -> Number:
        return step(h, p, g, s, over="group")


class LDoG(Elementwise):
    """DoG with a step size of its own for every tensor.

    When: DoG's one step size does not suit all layers, as in the fine-tuning of transformers. Evaluate with an
    average of the weights.

        r ← max(r, ‖θ - θ0‖, r_ε·(1 + ‖θ0‖))        G ← G + ‖g‖²        (norms of the tensor)
        θ ← θ - lr·r/√G · g

    State: 1 value per element (p0), 2 per tensor (rbar, G).
    Source: Ivgi, Hinder, Carmon 2023, "DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size Schedule",
    §3.3, https://arxiv.org/abs/2302.12022
    """

    lr: float = hyper(
        default=1.0, at_least=0, search=(0.3, 3.0), meaning="scales the step size that is found; leave it at 1"
    )
    reps_rel: float = hyper(
        default=1e-6, above=0, meaning="r_ε, the first step; 1e-4 for networks with batch normalization"
    )
    eps: float = hyper(default=1e-8, above=0, meaning="where G starts, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0, not_decoupled=NOT_DECOUPLED)

    r = slot("rbar", per="tensor")
    G = slot("G", per="tensor", starts="eps")
    start = slot("p0", starts=parameter)

    @staticmethod
    def update(h: LDoG, p: Number, g: Number, s: LDoG, t: float) -> Number:
        return step(h, p, g, s, over="tensor")
