"""L-BFGS: the direction, and the iterations along it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from steprule import errors
from steprule.closure.line_search import Point, Scalar, strong_wolfe
from steprule.engine.fields import Field
from steprule.engine.optimizer import CheckedOptimizer

SMALLEST_CURVATURE = 1e-10


class LBFGS(CheckedOptimizer):
    """Newton's direction, with a Hessian estimated from the last changes of position and gradient.

    When: a smooth loss without noise (all the data, or one fixed batch), where a precise minimum is worth
    many evaluations: fits, physics-informed networks, style transfer. Give line_search_fn="strong_wolfe"
    unless a search is too dear.

        s = t·d of the iteration before      y = g - g₋₁      kept when y·s > 1e-10, history_size of them
        d = -H·g by the two-loop recursion, H₀ = (y·s)/(y·y) of the newest pair; d = -g at first
        t = lr·min(1, 1/‖g‖₁) at first, then lr; or searched from there, by the strong Wolfe conditions
        θ ← θ + t·d

    State: 2·history_size + 2 numbers per parameter (old_dirs, old_stps, d, prev_flat_grad).
    Source: Liu and Nocedal 1989, "On the limited memory BFGS method for large scale optimization";
    Nocedal and Wright 2006, Numerical Optimization, algorithms 7.4 and 7.5.

    One `step(closure)` makes up to max_iter iterations and stops early at max_eval evaluations, or when
    max|g| ≤ tolerance_grad, g·d > -tolerance_change, max|t·d| ≤ tolerance_change, or the loss changes by
    less than tolerance_change. Without a search the last move of a step is not evaluated, as in torch.

    All parameters are one vector: there is one parameter group, on one device, and a gradient of None
    counts as zeros. The state belongs to that vector; it is kept with the first parameter, its history in
    lists, because checkpoints of torch.optim.LBFGS keep it so.

    When the loss or its gradient is NaN or infinite, the search turns back from there. Where that does not
    help, the parameters go back to where the iteration began, the history is emptied, the step ends, and
    a RuntimeWarning says so.
    """

    fields: ClassVar[dict[str, Field]] = {
        field.name: field
        for field in (
            Field(1, "lr", at_least=0, meaning="t, or where the search for it begins"),
            Field(20, "max_iter", "int", at_least=1, meaning="iterations per step"),
            Field(
                None,
                "max_eval",
                "int | None",
                at_least=1,
                meaning="evaluations of the closure per step; None: 5/4 of max_iter",
            ),
            Field(1e-7, "tolerance_grad", at_least=0, meaning="stop when max|g| is this small"),
            Field(1e-9, "tolerance_change", at_least=0, meaning="stop when a change is this small"),
            Field(100, "history_size", "int", at_least=1, meaning="pairs (s, y) that are kept"),
            Field(
                None,
                "line_search_fn",
                "str | None",
                choices=(None, "strong_wolfe"),
                meaning="how t is searched; None: not at all",
            ),
        )
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
    ):
        defaults: dict[str, Any] = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        super().__init__(params, defaults)

    def _normalize(self, group: dict[str, Any], index: int | None) -> dict[str, Any]:
        group = super()._normalize(group, index)
        if group["max_eval"] is None:
            group["max_eval"] = group["max_iter"] * 5 // 4
        return group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group that the constructor makes.

        Raises: ValueError for a second one, else as every optimizer does.
        """
        if self.param_groups:
            raise errors.one_group_only(type(self).__name__)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Comes before anything is changed: the history of another model must not be taken over.
        params: list[Tensor] = state["param_groups"][0]["params"]
        wanted = sum(2 * p.numel() if p.is_complex() else p.numel() for p in params)
        for saved in state["state"].values():
            vector = saved.get("d")
            if vector is not None and vector.numel() != wanted:
                raise errors.checkpoint(
                    type(self).__name__,
                    f"its directions have {vector.numel()} numbers, the parameters have {wanted}",
                    "Was it written for another model?",
                )
        super().__setstate__(state)

    def init_state(self) -> None:
        """Create the counts, without a step. The history comes with the first iteration."""
        # torch.optim keeps the state of the whole vector with the first parameter.
        state = self.state[self.param_groups[0]["params"][0]]
        state.setdefault("func_evals", 0)
        state.setdefault("n_iter", 0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Minimize for up to max_iter iterations.

        closure: clears the gradients, computes the loss and its gradients, and returns the loss. It is
        called many times, with gradients enabled. The value of its first call is returned.

        Raises: TypeError without a closure, or when the closure does not return a number.
        """
        who = type(self).__name__
        if closure is None:
            raise errors.closure_missing(who)
        group = self.param_groups[0]
        self.init_state()
        state = self.state[group["params"][0]]
        loss = _Loss(who, closure, group["params"])
        with torch.no_grad():
            try:
                trouble = _minimize(loss, group, state)
            finally:
                state["func_evals"] += loss.evaluations
            if trouble:
                _forget(state)
                warnings.warn(errors.loss_not_finite(who, trouble), RuntimeWarning, stacklevel=3)
        return loss.first

    def _explain_group(self, group: dict[str, Any]) -> list[str]:
        state = self.state.get(group["params"][0], {})
        pairs = len(state.get("old_dirs", []))
        search = group["line_search_fn"] or "none"
        return [f"direction: {pairs} of {group['history_size']} pairs; search: {search}"]


def _minimize(loss: _Loss, group: dict[str, Any], state: dict[str, Any]) -> str:
    """Algorithm 7.5: up to max_iter iterations. What went wrong, or nothing."""
    params = group["params"]
    value, gradient = loss()
    if value == math.inf:
        return "at the start of the step, before anything moved"
    if not gradient.numel() or largest(gradient) <= group["tolerance_grad"]:
        return ""
    for iteration in range(1, int(group["max_iter"]) + 1):
        last = iteration == group["max_iter"]
        begun = [p.clone(memory_format=torch.contiguous_format) for p in params]
        here = aim(state, value, gradient, group)
        if here.slope > -group["tolerance_change"]:
            return ""
        moved = _searched if group["line_search_fn"] else _moved
        value, gradient = moved(loss, here, begun, group, state, last)
        if value == math.inf:
            put_back(params, begun)
            return "and the parameters are back where the iteration began"
        if (
            last
            or loss.evaluations >= group["max_eval"]
            or largest(gradient) <= group["tolerance_grad"]
            or largest(state["d"].mul(state["t"])) <= group["tolerance_change"]
            or abs(value - state["prev_loss"]) < group["tolerance_change"]
        ):
            return ""
    return ""


class _Loss:
    """The closure as a function of where the parameters are: a value and one flat gradient."""

    def __init__(self, who: str, closure: Callable[[], Any], params: list[Tensor]):
        self.who, self.closure, self.params = who, closure, params
        self.first: Any = None
        self.evaluations = 0
        self.failures = 0

    def __call__(self) -> tuple[float, Tensor]:
        """The loss and its gradient; infinity where either is not finite."""
        self.evaluations += 1
        with torch.enable_grad():
            returned = self.closure()
        if self.evaluations == 1:
            self.first = returned
        value, gradient = self._number(returned), flat_gradient(self.params)
        if not math.isfinite(value) or (gradient.numel() and not largest(gradient).isfinite()):
            self.failures += 1
            value = math.inf
        return value, gradient

    def _number(self, returned: Any) -> float:
        try:
            return float(returned.detach() if isinstance(returned, Tensor) else returned)
        except (TypeError, ValueError, RuntimeError):
            given = f"a tensor of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else None
            raise errors.closure_without_loss(self.who, given or repr(returned)) from None
