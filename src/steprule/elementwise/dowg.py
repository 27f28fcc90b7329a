"""DoWG."""

from __future__ import annotations

from steprule.declare import Elementwise, WeightDecay, decay, hyper, parameter, slot
from steprule.words import Number, larger, norm, sqrt, total

NOT_DECOUPLED = "lr is 1 and not the step size, and a decay would count as distance from the start."


class DoWG(Elementwise):
    """DoG with larger steps: the squared gradients are weighted by the distance at which they were met.

    When: as DoG, where it is too slow. Evaluate with an average of the weights.

        r ← max(r, ‖θ - θ0‖, r_ε·(1 + ‖θ0‖))        G ← G + r²·‖g‖²     (norms of the parameter group)
        θ ← θ - lr·r²/√G · g

    State: 1 value per element (p0), and r and G of each group, in the group.
    Source: Khaled, Mishchenko, Jin 2023, "DoWG Unleashed: An Efficient Universal Parameter-Free Gradient
    Descent Method", algorithm 1, https://arxiv.org/abs/2305.16284, with DoG's first step.
    """

    lr: float = hyper(
        default=1.0, at_least=0, search=(0.3, 3.0), meaning="scales the step size that is found; leave it at 1"
    )
    reps_rel: float = hyper(default=1e-6, above=0, meaning="r_ε, the first step")
    eps: float = hyper(default=1e-8, above=0, meaning="where G starts, avoids division by zero")
    weight_decay: float | WeightDecay = decay(default=0, not_decoupled=NOT_DECOUPLED)

    r = slot("rbar", per="group")
    G = slot("G", per="group", starts="eps")
    start = slot("p0", starts=parameter)

    @staticmethod
    def update(h: DoWG, p: Number, g: Number, s: DoWG, t: float) -> Number:
        first = h.reps_rel * (1 + norm(s.start, over="group"))
        s.r = larger(larger(s.r, norm(p - s.start, over="group")), first)
        s.G = s.G + s.r**2 * total(g * g, over="group")
        return -(h.lr * s.r**2 / sqrt(s.G)) * g
