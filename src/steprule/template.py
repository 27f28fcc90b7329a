"""Rules written by hand: `init_state` and `step_param`, with any torch code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from steprule import errors, rule_errors
from steprule.engine.fields import Field, Slot
from steprule.engine.optimizer import CheckedOptimizer
from steprule.engine.program.phases import Part
from steprule.engine.weight_decay import WeightDecay
from steprule.engine.written import called

__all__ = ["GenericAdaptiveOptimizer", "WeightDecay"]


class GenericAdaptiveOptimizer(CheckedOptimizer):
    """An optimizer from two methods that a subclass overrides.

    When: a rule needs more than mathematics on single elements; otherwise declare it as `Elementwise`, which
    also makes it fast. A subclass gets groups, checks, closures, hooks and checkpoints; sparse gradients are
    refused.

        class MyOptimizer(GenericAdaptiveOptimizer):
            def init_state(self, state, group, param):
                state["exp_avg"] = torch.zeros_like(param)

            def step_param(self, state, group, grad, param):
                state["exp_avg"].lerp_(grad, 1 - group["betas"][0])
                param.add_(state["exp_avg"], alpha=-group["lr"])

    Gradients are checked, and `init_state` is called, for all parameters before the first one moves. Errors in
    `step_param` cannot be found in advance: if it raises for one parameter, those before it have moved, and a
    note on the error says so.

    params: as for every optimizer here. defaults: further hyper-parameters of a group; not changed. lr, eps:
    at least 0. betas: at least 0 and below 1.

    Raises: ValueError for a hyper-parameter out of range or unknown, RuntimeError for a sparse gradient.
    Source: the template of labml.ai's annotated optimizers.
    """

    fields: ClassVar[dict[str, Field]] = {
        "lr": Field(1e-3, name="lr", at_least=0, meaning="step size"),
        "betas": Field((0.9, 0.999), name="betas", type="tuple", at_least=0, below=1),
        "eps": Field(1e-8, name="eps", at_least=0, meaning="keeps divisions finite"),
        "nonfinite": Field("ignore", "nonfinite", "str", choices=("ignore", "raise", "skip")),
    }

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if type(self).step_param is GenericAdaptiveOptimizer.step_param:
            methods = [x for x, value in vars(type(self)).items() if callable(value) and x != "step_param"]
            raise rule_errors.no_step_param(type(self).__name__, errors.close("step_param", methods))
        super().__init__(params, {**(defaults or {}), "lr": lr, "betas": betas, "eps": eps})

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if isinstance(value, (Field, Slot)):
                raise rule_errors.declared_in_template(cls.__name__, name, isinstance(value, Field))
        for method in ("init_state", "step_param"):
            _check_method(cls, method)

    def init_state(self, state: dict[str, Any], group: dict[str, Any], param: Tensor) -> None:
        """Fill the empty `state` of a parameter, before its first step."""

    def step_param(self, state: dict[str, Any], group: dict[str, Any], grad: Tensor, param: Tensor) -> None:
        """Change `param` in place. `grad` belongs to the user: do not write to it."""

    def state_to_come(
        self, param: Tensor, group: dict[str, Any], there: Mapping[str, Any], place: int
    ) -> dict[str, Any]:
        """The state entries that the next step creates for a parameter."""
        new: dict[str, Any] = {}
        if not there:
            self.init_state(new, group, param)
        return new

    def _prepare_group(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        pairs = [(param, param.grad) for param in group["params"] if param.grad is not None]
        for param, gradient in pairs:
            if gradient.is_sparse:
                raise errors.sparse_gradient(type(self).__name__, self.name_of(param))
        for param, _ in pairs:
            if not self.state[param]:
                new: dict[str, Any] = {}
                self._call("init_state", param, new, group, param)
                self.state[param].update(new)

        def run() -> None:
            for param, gradient in pairs:
                self._call("step_param", param, self.state[param], group, gradient, param)

        return [Part(run)]

    def _call(self, name: str, param: Tensor, *arguments: Any) -> None:
        """Call one of the two methods, which change what they are given and return nothing."""
        method = getattr(self, name)
        who = f"{type(self).__name__}.{name}"
        try:
            result = called(who, method, lambda: method(*arguments))
        except KeyError as error:
            error.add_note(rule_errors.state_has_keys(self.name_of(param), list(self.state[param])))
            raise
        if result is not None and result is not param:
            raise rule_errors.template_returned(who, result)

    def _explain_group(self, group: dict[str, Any]) -> list[str]:
        return ["runner: step_param, written by hand, one parameter at a time"]


ARGUMENTS = {"init_state": ["state", "group", "param"], "step_param": ["state", "group", "grad", "param"]}


def _check_method(rule: type[GenericAdaptiveOptimizer], name: str) -> None:
    """Refuse a method that does not take the arguments it will be called with."""
    signature = inspect.signature(getattr(rule, name))
    after_self = not isinstance(inspect.getattr_static(rule, name), (staticmethod, classmethod))
    wanted = ARGUMENTS[name]
    given = list(signature.parameters)[after_self:]
    try:
        signature.bind(*(["self"] if after_self else []), *wanted)
    except TypeError:
        raise rule_errors.template_arguments(rule.__name__, name, given, wanted) from None
    if given != wanted and sorted(given) == sorted(wanted):
        raise rule_errors.template_arguments(rule.__name__, name, given, wanted)
