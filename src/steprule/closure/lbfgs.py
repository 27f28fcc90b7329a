"""L-BFGS: the direction, and the iterations along it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, ParamSpec, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule import errors
from steprule.closure import vectors
from steprule.closure.line_search import Point, Scalar, strong_wolfe
from steprule.closure.vectors import Parts, Space, Vector, largest, length
from steprule.engine import docstrings, notices
from steprule.engine.fields import Field
from steprule.engine.optimizer import CheckedOptimizer
from steprule.engine.sharding import parts

SMALLEST_CURVATURE = 1e-10
LINE_SEARCHES = (None, "strong_wolfe")

P = ParamSpec("P")


def _refuses_misspellings(init: Callable[P, None]) -> Callable[P, None]:
    """Answer an unknown hyper-parameter with the nearest right name, as rules with an `update` do."""

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        rule = type(cast(CheckedOptimizer, args[0]))
        for name in kwargs:
            if name not in rule.fields and name != "params":
                raise errors.unknown_hyperparameter(rule.__name__, name, rule.fields)
        init(*args, **kwargs)

    return checked


class LBFGS(CheckedOptimizer):
    """Newton's direction, with a Hessian estimated from the last changes of position and gradient.

    When: a smooth loss without noise (all the data, or one fixed batch), where a precise minimum is worth
    many evaluations: fits, physics-informed networks, style transfer. Use line_search_fn="strong_wolfe"
    unless a search is too expensive.

        s = t·d of the iteration before      y = g - g₋₁      kept when y·s > 1e-10, history_size of them
        d = -H·g by the two-loop recursion, H₀ = (y·s)/(y·y) of the newest pair; d = -g at first
        t = lr·min(1, 1/‖g‖₁) at first, then lr; or searched from there, by the strong Wolfe conditions
        θ ← θ + t·d

    State: 2·history_size + 2 values per element (old_dirs, old_stps, d, prev_flat_grad).
    Source: Liu and Nocedal 1989, "On the limited memory BFGS method for large scale optimization",
    https://doi.org/10.1007/BF01589116; Nocedal and Wright 2006, Numerical Optimization, algorithms 7.4 and 7.5.

    One `step(closure)` makes up to max_iter iterations and stops early at max_eval evaluations, or when
    max|g| ≤ tolerance_grad, g·d > -tolerance_change, max|t·d| ≤ tolerance_change, or the loss changes by
    less than tolerance_change. Without a search the last move of a step is not evaluated, as in torch.

    All parameters are one vector: there is one parameter group, on one device, and a gradient of None
    counts as zeros. The state belongs to that vector; it is kept with the first parameter, and its history
    in lists, as in checkpoints of torch.optim.LBFGS. With `maximize` the loss and its gradient are
    negated wherever they are evaluated; the closure's own loss is returned.

    Of sharded parameters (DTensors) every process keeps its part, with room for history_size pairs from the
    start, so that torch.distributed.checkpoint loads it with any number of processes. Call `step` in all of
    them, with a closure that returns the same loss in all; a gradient of None has to be None in all, too. Any
    number of processes gets the same bits, one included (of doubles, where no row is cut within 128
    neighbours). Sums are exact and rounded once, so without shards the bits are others.

    If the loss or its gradient is NaN or infinite, the search turns back from there. If that does not help,
    the parameters go back to where the iteration began, the history is emptied, the step ends, and a
    RuntimeWarning says so.
    """

    one_vector = True
    further_state = frozenset(
        {"func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag", "al"}
        | {"prev_flat_grad", "prev_loss", "pairs"}
    )

    fields: ClassVar[dict[str, Field]] = {
        field.name: field
        for field in (
            Field(1, "lr", at_least=0, search=(1e-2, 10.0), meaning="t, or where the search for it begins"),
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
                choices=LINE_SEARCHES,
                meaning="how t is searched; None: not at all",
            ),
            Field(False, "maximize", "bool", positional=False, meaning="maximize instead of minimize"),
        )
    }

    @staticmethod
    def numbers_beside_slots(group: Mapping[str, Any]) -> float:
        """Pairs of the history, a direction and a gradient."""
        return 2.0 * group["history_size"] + 2

    @_refuses_misspellings
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: Literal["strong_wolfe"] | None = None,
        *,
        maximize: bool = False,
    ):
        defaults: dict[str, Any] = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        if parts.any_sharded(self.param_groups):
            # So that nobody has to take a step to see the state.
            self.init_state()

    def _normalize(self, group: dict[str, Any], index: int | None) -> dict[str, Any]:
        search = group.get("line_search_fn")
        if search not in LINE_SEARCHES:
            raise errors.unknown_line_search(type(self).__name__, search, LINE_SEARCHES, index)
        group = super()._normalize(group, index)
        if group["max_eval"] is None:
            group["max_eval"] = group["max_iter"] * 5 // 4
        return group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group that the constructor makes.

        Raises: ValueError for a second one, otherwise as every optimizer does.
        """
        super().add_param_group(param_group)
        if len(self.param_groups) > 1:
            self.param_groups.pop()
            raise errors.one_group_only(type(self).__name__)

    def _check_loaded(self, state: Mapping[Tensor, Any]) -> None:
        who = type(self).__name__
        params: list[Tensor] = self.param_groups[0]["params"]
        if not params:
            return
        if parts.any_sharded(self.param_groups):
            space = vectors.Sharded(who, params)
            for param, saved in state.items():
                if problem := space.misfit(param, saved):
                    raise errors.checkpoint(
                        who, f"{self.name_of(param)} {problem}", "Was it sharded when saved?"
                    )
            return
        numbers = None
        if not any(map(is_lazy, params)):
            numbers = sum(2 * p.numel() if p.is_complex() else p.numel() for p in params)
        for param, saved in state.items():
            if saved and param is not params[0]:
                raise errors.checkpoint(who, f"{self.name_of(param)} has state, only the first keeps any")
            for key, value in saved.items():
                problem = _misfit(key, value, numbers)
                if problem:
                    raise errors.checkpoint(who, f"'{key}' {problem}", "Was it written for another model?")

    def init_state(self) -> None:
        """Create the counts, without a step; of sharded parameters, room for the history, too."""
        (group,) = self.param_groups
        if group["params"]:
            with torch.no_grad():
                space = vectors.of(type(self).__name__, group["params"])
                space.state_in(self.state, int(group["history_size"]))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Minimize for up to max_iter iterations.

        closure: clears the gradients, computes the loss and its gradients, and returns the loss. It is
        called many times, with gradients enabled. The value of its first call is returned.

        Without any parameter it is called once. Raises: TypeError without a closure, or when the closure does
        not return a number.
        """
        who = type(self).__name__
        if closure is None:
            raise errors.closure_missing(who)
        self._check_new_keys()
        group = self.param_groups[0]
        if not group["params"]:
            with torch.enable_grad():
                return closure()
        with torch.no_grad():
            space = vectors.of(who, group["params"])
            state = space.state_in(self.state, int(group["history_size"]))
            loss = _Loss(who, closure, space, bool(group.get("maximize")), self.names_in(group))
            try:
                trouble = _minimize(loss, group, state)
                if trouble:
                    evaluations = state["func_evals"]
                    state.clear()
                    state.update(func_evals=evaluations, n_iter=0)
            finally:
                state["func_evals"] += loss.evaluations
                space.keep(state, self.state, int(group["history_size"]))
        if trouble:
            notices.warn(errors.loss_not_finite(who, trouble), RuntimeWarning)
        return loss.first

    def _explain_group(self, group: dict[str, Any]) -> list[str]:
        first: list[Tensor] = group["params"][:1]
        state: dict[str, Any] = self.state.get(first[0], {}) if first else {}
        kept, search = state.get("pairs", len(state.get("old_dirs", []))), group["line_search_fn"] or "none"
        lines = [
            f"runner: reference; direction: {kept} of {group['history_size']} pairs kept; search: {search}"
        ]
        if parts.any_sharded([group]):
            lines += ["sharded: every process moves its parts; sums are taken over all processes, exactly"]
        return lines


def _misfit(key: str, value: Any, numbers: int | None) -> str:
    """Why this cannot be part of the state of so many elements (None: not known); empty if it can."""
    vectors = value if key in ("old_dirs", "old_stps") else [value]
    if key in ("d", "prev_flat_grad", "old_dirs", "old_stps"):
        if not isinstance(vectors, list):
            return f"is {type(value).__name__}, must be a list"
        for vector in cast(list[Any], vectors):
            if not isinstance(vector, Tensor) or not vector.is_floating_point():
                return f"holds {type(vector).__name__}, must be floating-point tensors"
            if numbers is not None and vector.shape != (numbers,):
                return f"has {vector.numel()} elements, the parameters have {numbers}"
        return ""
    if key in ("ro", "al"):
        fine = isinstance(value, list)
    elif key in ("func_evals", "n_iter", "t", "prev_loss", "H_diag"):
        fine = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    else:
        return "is not part of the state"
    return "" if fine else f"is {type(value).__name__}"


# Iterations


def _minimize(loss: _Loss, group: dict[str, Any], state: dict[str, Any]) -> str:
    """Algorithm 7.5: direction, distance, move, until a reason to stop. Returns what went wrong."""
    space = loss.space
    value, gradient = loss()
    if value == math.inf:
        return "at the start of the step; nothing moved"
    if not gradient.numel() or largest(gradient) <= group["tolerance_grad"]:
        return ""
    follow(gradient, state)
    for iteration in range(1, int(group["max_iter"]) + 1):
        last = iteration == group["max_iter"]
        d, t = direction(gradient, state, group), _first_distance(gradient, state, group)
        state["n_iter"] += 1
        state.update(d=d, t=t, prev_flat_grad=gradient, prev_loss=value)
        slope = gradient.dot(d)
        if slope > -group["tolerance_change"]:
            return ""
        begun = space.copies()
        if not largest(d).isfinite():
            value = math.inf
        elif group["line_search_fn"] is not None:
            start = Point(0.0, value, slope, gradient)
            value, gradient = _searched_move(loss, start, begun, group, state)
        else:
            space.move(d, t)
            if not last:
                value, gradient = loss()
        if value == math.inf:
            space.put_back(begun)
            return "during the step; the parameters are back where the iteration began"
        if last or _is_done(loss, value, gradient, group, state):
            return ""
    return ""


def _first_distance(gradient: Vector, state: dict[str, Any], group: dict[str, Any]) -> Scalar:
    """The distance at which the search begins, or that is moved without one."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        # A copy: the distance stays in the state, and a schedule changes the group's tensor in place.
        lr = lr.detach().squeeze().clone()
    if "d" in state:
        return lr
    total: Scalar = length(gradient)
    return min(1.0, 1.0 / total) * lr


def _searched_move(
    loss: _Loss, start: Point, begun: list[Tensor], group: dict[str, Any], state: dict[str, Any]
) -> tuple[float, Vector]:
    """Move to the distance that the search finds. Returns the loss and gradient there."""
    space, d = loss.space, state["d"]

    def look(t: Scalar) -> Point:
        space.move(d, t)
        try:
            value, gradient = loss()
        finally:
            space.put_back(begun)
        return Point(t, value, gradient.dot(d), gradient)

    failures = loss.failures
    found = strong_wolfe(
        look,
        start,
        state["t"],
        trials=int(group["max_eval"]) - loss.evaluations,
        reach=largest(d),
    )
    state["t"] = found.t
    space.move(d, found.t)
    stuck = found.t == 0 and loss.failures > failures
    return math.inf if stuck else found.value, found.gradient


def _is_done(loss: _Loss, value: float, gradient: Vector, group: dict[str, Any], state: dict[str, Any]) -> bool:
    return bool(
        loss.evaluations >= group["max_eval"]
        or largest(gradient) <= group["tolerance_grad"]
        or largest(state["d"].mul(state["t"])) <= group["tolerance_change"]
        or abs(value - state["prev_loss"]) < group["tolerance_change"]
    )


# The direction


def direction(gradient: Vector, state: dict[str, Any], group: dict[str, Any]) -> Vector:
    """-H·g; steepest descent in the first iteration."""
    if "d" not in state:
        state.update(old_dirs=[], old_stps=[], ro=[], H_diag=1)
        return gradient.neg()
    remember(gradient, state, int(group["history_size"]))
    return two_loops(gradient, state, int(group["history_size"]))


def remember(gradient: Vector, state: dict[str, Any], history_size: int) -> None:
    """Add the last iteration's change to the history if the loss curves upwards there; drop the oldest."""
    y = gradient.sub(state["prev_flat_grad"])
    s = state["d"].mul(state["t"])
    curvature = y.dot(s)
    if curvature > SMALLEST_CURVATURE:
        newest = {"old_dirs": y, "old_stps": s, "ro": 1.0 / curvature}
        for key, value in newest.items():
            state[key] = [*state[key], value][-history_size:]
        state["H_diag"] = curvature / y.dot(y)


def two_loops(gradient: Vector, state: dict[str, Any], history_size: int) -> Vector:
    """Algorithm 7.4: -H·g from the pairs alone, newest to oldest and back."""
    pairs = list(zip(state["old_stps"], state["old_dirs"], state["ro"], strict=True))
    q = gradient.neg()
    alphas: list[Tensor] = []
    for s, y, rho in reversed(pairs):
        alphas.append(s.dot(q) * rho)
        q.add_(y, alpha=-alphas[-1].item())
    alphas.reverse()
    r = q.mul(state["H_diag"])
    for (s, y, rho), alpha in zip(pairs, alphas, strict=True):
        beta = y.dot(r) * rho
        r.add_(s, alpha=(alpha - beta).item())
    # Scratch of this iteration alone, yet torch.optim keeps it, so its state is equal key for key.
    state["al"] = alphas + [None] * (history_size - len(alphas))
    return r


def follow(gradient: Vector, state: dict[str, Any]) -> None:
    """Bring the history to the model's device and dtype, which may have changed since."""
    if "d" in state and (state["d"].dtype, state["d"].device) != (gradient.dtype, gradient.device):
        for key, value in state.items():
            entries = cast("list[Any]", value) if isinstance(value, list) else [value]
            moved = [x.to(gradient) if isinstance(x, (Tensor, Parts)) else x for x in entries]
            state[key] = moved if isinstance(value, list) else moved[0]


# The loss


class _Loss:
    """The closure as a function of where the parameters are: its value and the gradient as one vector.

    maximize: negate both, so that the minimum is the closure's maximum. names: of the parameters.
    """

    def __init__(
        self, who: str, closure: Callable[[], Any], space: Space, maximize: bool, names: Sequence[str]
    ):
        self.who, self.closure, self.space, self.maximize, self.names = who, closure, space, maximize, names
        self.first: Any = None
        self.evaluations = 0
        self.failures = 0

    def __call__(self) -> tuple[float, Vector]:
        """The loss and its gradient; the loss is infinity if either is not finite."""
        with torch.enable_grad():
            returned = self.closure()
        if self.evaluations == 0:
            self.first = returned
        self.evaluations += 1
        value = self.space.agreed(self._as_number(returned), self.names)
        gradient = self.space.gradient()
        if self.maximize:
            value = -value
            gradient.neg_()
        if not math.isfinite(value) or (gradient.numel() and not largest(gradient).isfinite()):
            self.failures += 1
            value = math.inf
        return value, gradient

    def _as_number(self, returned: Any) -> float:
        try:
            return float(returned.detach() if isinstance(returned, Tensor) else returned)
        except (TypeError, ValueError, RuntimeError):
            given = repr(returned)
            if isinstance(returned, Tensor):
                given = f"a tensor of shape {tuple(returned.shape)}"
            raise errors.closure_without_loss(self.who, given) from None


LBFGS.__doc__ = docstrings.with_arguments(LBFGS, LBFGS.fields)
