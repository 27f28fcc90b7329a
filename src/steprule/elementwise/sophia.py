"""Sophia."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, slot
from steprule.words import Number, clamp, ema


class Sophia(Elementwise):
    """Momentum divided by an estimate of the curvature, every element clipped.

    When: language models. Call `update_hessian` every few steps, on a batch whose labels were sampled from the
    model. Until its first call every element moves by lr.

        m ← β1·m + (1-β1)·g         h ← β2·h + (1-β2)·n·ĝ²   in update_hessian
        θ ← θ - lr/ρ · clip(m/(h + ε), -ρ, ρ)

    State: 2 values per element (exp_avg, hessian).
    Source: Liu, Li, Hall, Liang, Ma 2023, "Sophia: A Scalable Stochastic Second-order Optimizer",
    algorithm 3 with the Gauss-Newton-Bartlett estimator, https://arxiv.org/abs/2305.14342; lr is the largest
    change of an element, as in labml. A number given as weight_decay is decoupled.
    """

    lr: float = hyper(
        default=1e-4, at_least=0, search=(1e-5, 1e-2), meaning="the largest change of any element"
    )
    betas: tuple[float, float] = hyper(default=(0.9, 0.95), at_least=0, below=1, meaning="decay of m, of h")
    eps: float = hyper(default=1e-12, at_least=0, meaning="ε, avoids division by zero")
    rho: float = hyper(default=0.03, above=0, meaning="ρ, where the ratio is clipped")
    weight_decay: float | WeightDecay = decay(default=0, mode="decoupled")

    m = slot("exp_avg")
    h = slot("hessian", never_negative=True)

    @staticmethod
    def update(h: Sophia, p: Number, g: Number, s: Sophia, t: float) -> Number:
        s.m = ema(s.m, g, h.betas[0])
        return -(h.lr / h.rho) * clamp(s.m / (s.h + h.eps), -h.rho, h.rho)

    @staticmethod
    def estimate(h: Any, p: Number, d: Number, s: Sophia, t: float) -> None:
        """d is ĝ, a gradient of the sampled loss; its square stands for the curvature."""
        beta2 = h.betas[1]
        s.h = s.h * beta2 + ((1 - beta2) * h.n) * d * d

    # In place of a diagonal, the gradients are already there.
    def update_hessian(self, n_tokens_training_batch: float) -> None:  # type: ignore[override]
        """Update the curvature from the current gradients.

        Call it after the backward pass of the loss with labels sampled from the model, before `step`.
        n_tokens_training_batch: the number of tokens or examples that the loss averages over.
        """
        own = [group for group in self.param_groups if issubclass(self.rule_of(group), Sophia)]
        gradients = {p: p.grad for group in own for p in group["params"]}
        self._estimate(gradients, n=float(n_tokens_training_batch))
