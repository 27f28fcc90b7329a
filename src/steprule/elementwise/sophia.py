"""Sophia."""

from __future__ import annotations

import warnings
from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, errors, hyper, run_on_slots, slot
from steprule.words import Becomes, Number, becomes, clamp, ema


class Sophia(Elementwise):
    """Momentum divided by an estimate of the curvature, every element clipped.

    When: language models. Call `update_hessian` every few steps, on a batch whose labels were sampled from the
    model.

        m ← β1·m + (1-β1)·g         h ← β2·h + (1-β2)·n·ĝ²   in update_hessian
        θ ← θ - lr/ρ · clip(m/(h + ε), -ρ, ρ)

    State: 2 values per parameter (exp_avg, hessian).
    Source: Liu, Li, Hall, Liang, Ma 2023, "Sophia: A Scalable Stochastic Second-order Optimizer",
    algorithm 3 with the Gauss-Newton-Bartlett estimator, https://arxiv.org/abs/2305.14342; lr is the largest
    change of an element, as in labml. A number given as weight_decay is decoupled.
    """

    lr: float = hyper(default=1e-4, at_least=0, meaning="the largest change of any element")
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
    def estimate(h: Sophia, p: Number, g: Number, s: Sophia, n: float) -> Becomes:
        """Add one gradient of the sampled loss to the curvature. The parameter does not change."""
        beta2 = h.betas[1]
        s.h = s.h * beta2 + ((1 - beta2) * n) * g * g
        return becomes(p)

    def update_hessian(self, n_tokens_training_batch: float) -> None:
        """Update the curvature from the current gradients.

        Call it after the backward pass of the loss with labels sampled from the model, before `step`.
        n_tokens_training_batch: the number of tokens or examples that the loss averages over.
        """
        if self._may_step(count=False):
            run_on_slots(self, Sophia, Sophia.estimate, float(n_tokens_training_batch))

    _looked = False

    def _prepare_group(self, group: dict[str, Any], after: dict[str, float]) -> list[Any]:
        step = super()._prepare_group(group, after)
        # Once: to look at every step would make the host wait for the device.
        if not self._looked and issubclass(self.rule_of(group), Sophia):
            self._looked = self._look_for_curvature(group)
        return step

    def _look_for_curvature(self, group: dict[str, Any]) -> bool:
        """Warn if the first step would use no curvature. Returns whether a parameter could show it."""
        for param in group["params"]:
            if param.grad is None or group["lr"] == 0 or not self.has_elements(param):
                continue
            if not param.grad.any():
                continue
            state = self.state_of(param, group)
            if float(state["step"]) == 0 and not self.slot_elements(state, "hessian").any():
                warnings.warn(errors.sophia_without_hessian(self.name_of(param)), stacklevel=4)
            return True
        return False
