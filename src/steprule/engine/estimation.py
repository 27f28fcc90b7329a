"""Estimates of the curvature: a rule with `estimate` takes them into its slots, between steps.

An estimate runs as a step does, in the same runners and after the same checks, with a curvature in place of the
gradient. It changes no parameter and counts no step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from steprule import curvature_errors as errors
from steprule.engine import plans
from steprule.engine.composition import Composition, composed
from steprule.engine.program.phases import Part
from steprule.engine.rule import RuleOptimizer
from steprule.engine.sharding import parts

Curvature = Mapping[Tensor, Tensor | None]


def check(optimizer: Any, diagonal: Any) -> None:
    """Refuse a diagonal that does not fit the parameters of the optimizer.

    Raises: TypeError for anything but a dict of tensors, ValueError for what does not fit, and RuntimeError if
    no rule uses a curvature.
    """
    who = type(optimizer).__name__
    if not isinstance(diagonal, Mapping):
        raise errors.no_diagonal(who, f"a {type(diagonal).__name__}")
    if not any(hasattr(optimizer.rule_of(group), "estimate") for group in optimizer.param_groups):
        raise errors.nothing_estimates(who)
    known = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for param, value in cast("Mapping[Any, Any]", diagonal).items():
        if not isinstance(param, Tensor):
            raise errors.no_diagonal(who, f"one with the key {param!r}")
        if id(param) not in known:
            raise errors.diagonal_of_another(who, tuple(param.shape))
        if not (value is None or isinstance(value, Tensor)):
            raise errors.no_diagonal(who, f"one with a {type(value).__name__} for {optimizer.name_of(param)}")
        if value is not None:
            _check_form(who, optimizer, param, value)


def _check_form(who: str, optimizer: Any, param: Tensor, value: Tensor) -> None:
    wrong: tuple[str, str] | None = None
    if value.layout != torch.strided:
        wrong = f"has the layout {value.layout}", "be dense"
    elif value.shape != param.shape:
        wrong = f"has the shape {tuple(value.shape)}", f"have {tuple(param.shape)} like the parameter"
    elif value.device != param.device:
        wrong = f"is on {value.device}", f"be on {param.device} like the parameter"
    elif parts.sharded(param) and not parts.sharded(value):
        wrong = "is a plain tensor", "be a DTensor like the parameter"
    elif value.is_complex() != param.is_complex() or not (value.is_complex() or value.is_floating_point()):
        wrong = f"is {value.dtype}", f"be of the kind of {param.dtype} like the parameter"
    if wrong is not None:
        raise errors.diagonal_does_not_fit(who, optimizer.name_of(param), *wrong)


def run(optimizer: Any, curvature: Curvature, numbers: Mapping[str, float]) -> None:
    """Have every rule with `estimate` take in the curvature of its parameters.

    curvature: by parameter; others stay as they are. numbers: further numbers that `estimate` finds in `h`.
    """
    _estimator(type(optimizer).__name__)(optimizer, curvature, numbers).take_in()


class Estimator(RuleOptimizer):
    """An optimizer as it is during an estimate: the same groups and the same state, with other steps."""

    taken_with = "curvature"
    # Both are about first steps.
    _watched_rounding = True
    _looked_for_curvature = True

    def __init__(self, whole: Any, curvature: Curvature, numbers: Mapping[str, float]):
        self.__dict__ = {**whole.__dict__}
        self.whole = whole
        self.curvature = curvature
        self.numbers = tuple(numbers)
        if numbers:
            self.param_groups = [{**group, **numbers} for group in whole.param_groups]

    def take_in(self) -> None:
        """Take in the curvature, if it is finite or nobody asked for that."""
        own = plans.of(self.whole)
        with own.lock:
            if self._state_is_away:
                self.whole.reload_state()
                own = plans.of(self.whole)
            known, groups = own.estimates.setdefault(self.numbers, (plans.Plans(), []))
            plans.give(self, known)
            if self.numbers:
                # The same dicts as at the last estimate: plans are found by their groups.
                wanted = len(self.param_groups)
                groups[:] = [*groups, *({} for _ in range(wanted - len(groups)))][:wanted]
                for group, given in zip(groups, self.param_groups, strict=True):
                    group.update(given)
                self.param_groups = groups
            try:
                if self._may_step(count=False):
                    self._step_groups(None)
            finally:
                for group in groups:  # nothing is kept alive
                    group.clear()

    def rule_of(self, group: Mapping[str, Any]) -> Any:
        """The rule of a group."""
        return self.whole.rule_of(group)

    def composition(self, group: Mapping[str, Any]) -> Composition:
        """The rule of a group with its `estimate` as the step; with the slots of modifiers, which stay."""
        rule = self.rule_of(group)
        return composed(rule, rule.estimate, self._modifiers(group), numbers=self.numbers)

    def gradients_of(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """The curvature of these parameters."""
        return list(map(self.curvature.get, params))

    def _prepare_group(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        return super()._prepare_step(group, after) if hasattr(self.rule_of(group), "estimate") else []

    def _share(self, after: list[dict[str, float]]) -> None:
        self.whole._share(after)


@cache
def _estimator(name: str) -> type[Estimator]:
    """The class with the name of the optimizer, for messages."""
    return type(name, (Estimator,), {})
