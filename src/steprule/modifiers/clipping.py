"""Limits for the gradient and for the change."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, hyper, slot
from steprule.words import Number, clamp, larger, mean, norm, smaller, sqrt


class GlobalNormClip(Modifier):
    """Scale the gradients of all parameters down if their norm together is above a limit.

    When: transformers and recurrent networks, in place of torch.nn.utils.clip_grad_norm_ before the step.
    `optimizer.gradient_norm` is the norm before clipping. All groups that have it are clipped together.

        g ← g · min(1, c/‖g‖)         ‖g‖ over all parameters

    State: 1 value for all parameters (norm).
    Differs: torch divides by ‖g‖ + 1e-6.
    Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", §3.2,
    https://arxiv.org/abs/1211.5063
    """

    max_norm: float = hyper(default=1.0, above=0, meaning="c, the largest norm that is left as it is")

    norm = slot("norm", per="all")

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        s.norm = norm(g, over="all")
        return g * smaller(1.0, h.max_norm / s.norm)


class NormClip(Modifier):
    """Scale the gradient of a tensor down if its norm is above a limit.

    When: a few tensors have gradients so large that a common limit, as in GlobalNormClip, would slow down all
    others.

        g ← g · min(1, c/‖g‖)         ‖g‖ over the tensor

    State: none.
    Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", §3.2,
    https://arxiv.org/abs/1211.5063
    """

    max_norm: float = hyper(default=1.0, above=0, meaning="c, the largest norm that is left as it is")

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        return g * smaller(1.0, h.max_norm / norm(g))


class ValueClip(Modifier):
    """Limit every element of the gradient.

    When: in place of torch.nn.utils.clip_grad_value_ before the step. A limit for the norm keeps the direction
    of the gradient; this does not. It changes nothing if a rule takes the sign of the gradient alone, as Signum
    does with momentum=0.

        g ← max(-c, min(g, c))

    State: none.
    Source: Mikolov 2012, "Statistical Language Models Based on Neural Networks" (thesis), as told by Pascanu,
    Mikolov, Bengio 2013, §3.2, https://arxiv.org/abs/1211.5063
    """

    clip_value: float = hyper(default=1.0, above=0, meaning="c, the largest size of an element")

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        return clamp(g, -h.clip_value, h.clip_value)


class AdaptiveClip(Modifier):
    """Scale the gradient of a unit down if its norm is above a share of the norm of the unit's weights.

    When: convolutional networks without normalization, large batches, high lr. The authors leave the last layer
    out: give it a group with modifiers=[].

        gᵢ ← gᵢ · min(1, c·max(‖θᵢ‖, ε)/‖gᵢ‖)         i: the rows of the tensor; a vector is one row

    State: none.
    Differs: optax takes the last index for the unit, as its frameworks store weights.
    Source: Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition Without
    Normalization", §4.1, equation 3, https://arxiv.org/abs/2102.06171
    """

    clip_factor: float = hyper(default=0.01, above=0, meaning="c, the largest gradient for weights of norm 1")
    eps: float = hyper(default=1e-3, above=0, meaning="ε, the smallest norm of weights to count with")

    @staticmethod
    def gradient(h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
        limit = h.clip_factor * larger(norm(p, over="row"), h.eps)
        return g * smaller(1.0, limit / norm(g, over="row"))


class UpdateClip(Modifier):
    """Scale the change of a tensor down if its root mean square, without lr, is above a limit.

    When: training that now and then takes a step far too large, as at high lr or in 16 bits.

        u ← u / max(1, RMS(u/lr)/c)

    State: none.
    Source: Shazeer, Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", §6,
    https://arxiv.org/abs/1804.04235
    """

    not_with: ClassVar[dict[str, str]] = {
        "Adafactor": "the rule clips its change already.",
        "StableAdamW": "the rule clips its change already.",
    }

    max_rms: float = hyper(
        default=1.0, above=0, meaning="c, the largest root mean square that is left as it is"
    )

    @staticmethod
    def change(h: Any, p: Number, g: Number, u: Number, s: Any, t: Any) -> Number:
        rms = sqrt(mean(u * u))
        return u / larger(1.0, rms / (h.lr * h.max_rms))
