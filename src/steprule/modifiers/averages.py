"""Averages of the weights, to evaluate with."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, hyper, parameter, scalar_slot, slot
from steprule.words import Number, clamp, ema, lerp, where


class EMA(Modifier):
    """Keep an exponential moving average of the weights; `optimizer.eval()` puts it into the model.

    When: images, diffusion, self-supervised training, and wherever the last weights are noisy.

        a ← θ at the first step, then β·a + (1-β)·θ

    State: 1 value per element (average), 1 per tensor (steps).
    Source: Polyak, Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging",
    https://doi.org/10.1137/0330046; as torch.optim.swa_utils.get_ema_multi_avg_fn.
    """

    not_with: ClassVar[dict[str, str]] = {"ScheduleFree": "it has an average of its own."}

    decay: float = hyper(default=0.999, at_least=0, below=1, meaning="β, how much of the average stays")

    average = slot("average", starts=parameter)
    steps = scalar_slot("steps")

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        s.average = where(s.steps == 0, new, ema(s.average, new, h.decay))
        s.steps = s.steps + 1
        return new

    @staticmethod
    def evaluate(h: Any, p: Number, s: Any, t: Any) -> Number:
        return s.average


class Average(Modifier):
    """Keep the plain average of the weights since a step; `optimizer.eval()` puts it into the model.

    When: the last part of training at a constant or cyclic lr (SWA), and rules that ask for it, such as DoG.

        n = t - start                 a ← a + (θ - a)/max(n, 1)

    State: 1 value per element (average), 1 per tensor (steps).
    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization",
    https://arxiv.org/abs/1803.05407; as torch.optim.swa_utils.AveragedModel.
    """

    not_with: ClassVar[dict[str, str]] = {"ScheduleFree": "it has an average of its own."}

    start: int = hyper(default=0, at_least=0, meaning="how many steps are not averaged")

    average = slot("average", starts=parameter)
    steps = scalar_slot("steps")

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        s.steps = s.steps + 1
        s.average = lerp(s.average, new, 1 / clamp(s.steps - h.start, 1, 1e9))
        return new

    @staticmethod
    def evaluate(h: Any, p: Number, s: Any, t: Any) -> Number:
        return s.average


class Lookahead(Modifier):
    """Every k steps, go back part of the way to where the last k steps began.

    When: noisy training that is stable with it at a higher lr. The steps between take no longer for it. Steps
    are counted by group; a parameter without a gradient in the step that goes back is left out of it.

        every k steps: a ← a + α·(θ - a), θ ← a           a starts as the parameter

    State: 1 value per element (slow), and how many steps a group has taken.
    Source: Zhang, Lucas, Hinton, Ba 2019, "Lookahead Optimizer: k steps forward, 1 step back", algorithm 1,
    https://arxiv.org/abs/1907.08610
    """

    acts = "last"
    not_with: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("ScheduleFree", "ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam"),
            "both decide where the weights go on from.",
        ),
        "Hyperball": "between two points of the ball, the weights are inside of it.",
    }

    every: int = hyper(default=5, at_least=1, meaning="k, the number of steps forward")
    step_back: float = hyper(default=0.5, at_least=0, at_most=1, meaning="α, the part of the way that is kept")

    slow = slot("slow", starts=parameter)
    steps = slot("steps", per="group")

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        s.slow = lerp(s.slow, new, h.step_back)
        return s.slow
