"""Noise."""

from __future__ import annotations

from typing import Any, ClassVar

from steprule.declare import Modifier, hyper
from steprule.words import Number, gaussian, sqrt


class Noise(Modifier):
    """Add normal noise to the weights at every step, as stochastic gradient Langevin dynamics does.

    When: samples of the weights instead of one best value, to see how sure a model is, or exploration early in
    training. For samples of the posterior, σ is √2 if the loss is a sum over the N examples, √(2/N) if a mean.

        θ ← θ' + √lr·σ·ξ          θ' after the rule's change, ξ from N(0, 1)

    State: 1 number per tensor (noise_key), which says where the next random numbers are.
    Differs: the paper's step size is ε = 2·lr.
    Source: Welling, Teh 2011, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", eq. 4,
    https://www.stats.ox.ac.uk/~teh/research/compstats/WelTeh2011a.pdf
    """

    not_with: ClassVar[dict[str, str]] = dict.fromkeys(
        ("ScheduleFree", "ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam"),
        "the average is found from weights that nothing else has changed.",
    )

    sigma: float = hyper(default=0.01, at_least=0, meaning="σ, how much noise there is at lr 1")
    seed: int = hyper(
        default=0, at_least=0, meaning="where the random numbers start; another one for each of several chains"
    )

    @staticmethod
    def apply(h: Any, p: Number, new: Number, s: Any, t: Any) -> Number:
        return new + sqrt(h.lr) * h.sigma * gaussian()
