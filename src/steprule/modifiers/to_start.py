"""ToStart."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, hyper, parameter, slot
from steprule.words import Number


class ToStart(Modifier):
    """Pull the weights towards where they started, in place of zero.

    When: fine-tuning, so as not to lose what the model knows, and data that changes during training, where
    weights close to their initialization go on learning.

        θ ← θ - lr·λ·(θ - θ0), before the step

    State: 1 value per element (start).
    Differs: from both papers, who add the gradient of λ·‖θ - θ0‖² to g; this is to them what AdamW's decay is
    to L2.
    Source: Li, Grandvalet, Davoine 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks" (L2-SP), https://arxiv.org/abs/1802.01483; Kumar, Marklund, Van Roy 2023, "Maintaining Plasticity
    in Continual Learning via Regenerative Regularization", https://arxiv.org/abs/2308.11958
    """

    not_with: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("DoG", "LDoG", "DoWG", "Prodigy", "DAdaptAdam"),
            "lr is 1 and not the step size, so it would pull much too hard. Add λ/2·‖θ - θ0‖² to the loss.",
        ),
        **dict.fromkeys(
            ("ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam"),
            "it would pull y and not z, of which the average is made. Use the modifier ScheduleFree.",
        ),
    }

    strength: float = hyper(default=0.01, at_least=0, meaning="λ, how strongly it pulls")

    start = slot("start", starts=parameter)

    @staticmethod
    def parameter(h: Any, p: Number, u: Any, s: Any, t: Any) -> Number:
        return p - h.lr * h.strength * (p - s.start)
