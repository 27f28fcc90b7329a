"""Steps during the backward pass: each parameter as soon as its gradient is complete, which is then freed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from steprule import process_errors as errors
from steprule.engine import host, plans, views
from steprule.engine.host import OnHost
from steprule.engine.rule import RuleOptimizer
from steprule.engine.sharding import here, parts

# The wrappers of torch that reduce gradients when all of them are there.
AVERAGE_LATER = {"DistributedDataParallel", "FullyShardedDataParallel"}


class _End:
    """What a backward pass calls at its end, or only lets go of if it has failed."""

    def __init__(self, steps: OnHost):
        self._steps = steps
        self._called = False

    def __call__(self) -> None:
        self._called = True
        self._steps.wait()

    def __del__(self) -> None:
        # The caller may use the parameters again. What was called may live on in a traceback until some thread
        # collects garbage, which may be the one that takes the steps.
        if not self._called:
            self._steps.settle()


class StepInBackward:
    """What `step_in_backward` returns: it ends the steps in backward passes, or suspends them.

    model: whose parameters are stepped, if the optimizer has them.
    """

    def __init__(self, model: nn.Module, optimizer: RuleOptimizer):
        self._waits = False
        self._handles: list[Any] = []
        wanted = set(map(id, model.parameters()))
        kind = _kind_of(type(optimizer).__name__)
        for group in optimizer.param_groups:
            params: list[Any] = [p for p in group["params"] if p.requires_grad and id(p) in wanted]
            for few in host.portions(params):
                portion = host.Portion(list(map(id, few)), kind(optimizer))
                for param in few:
                    step = partial(self._step, kind(optimizer), portion)
                    self._handles.append(param.register_post_accumulate_grad_hook(step))

    def _step(self, one: SomeParameters, portion: host.Portion, param: Tensor) -> None:
        if self._waits:
            return
        elsewhere = one.whole.elsewhere
        if elsewhere is None:
            one.take_step(param)
        elif isinstance(elsewhere, OnHost):
            cast(Any, torch.autograd.Variable)._execution_engine.queue_callback(_End(elsewhere))
            elsewhere.begin(one.whole, param, portion)
        else:
            raise _state_is(elsewhere, one.whole)
        param.grad = None

    @contextmanager
    def accumulate(self) -> Generator[None]:
        """In the `with` block, backward passes only add up gradients; the next one steps with the sum."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    def remove(self) -> None:
        """Step in `optimizer.step()` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def step_in_backward(model: nn.Module, optimizer: Any) -> StepInBackward:
    """Step each parameter during the backward pass, as soon as its gradient is complete, and free the gradient.

    Use it where gradients do not fit into memory: only those of one layer or so exist at a time. The numbers
    are those of `optimizer.step()`, which finds no gradients then and does nothing; schedulers, checkpoints and
    groups stay as they are.

        stepping = steprule.step_in_backward(model, optimizer)
        for inputs, targets in data:
            loss_of(model(inputs), targets).backward()  # steps
            schedule.step()

    With `state_on_host`, a thread takes the steps in main memory while the backward pass goes on. `backward()`
    returns when all of them are taken. It raises what one of them has raised; those after it are not taken.

    With gradient accumulation, do all backward passes but the last in `with stepping.accumulate():`. A gradient
    scaler does not go with it: gradients are used before it could unscale them.

    model: whose parameters are stepped; those that the optimizer has besides are left to `optimizer.step()`.
    optimizer: of any rule that steps each parameter on its own.

    Raises: TypeError for anything but a model and an optimizer of steprule. ValueError for rules and modifiers
    that need the gradients of all parameters at once, such as GlobalNormClip, for `nonfinite`, which decides
    about all parameters together, for sharded parameters that are stepped as a whole, and for a model in
    DistributedDataParallel, which averages gradients after the steps.
    """
    if not (isinstance(model, nn.Module) and isinstance(optimizer, RuleOptimizer)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.no_model_and_optimizer(type(model).__name__, type(optimizer).__name__)
    if not isinstance(optimizer.elsewhere, OnHost | None):
        raise _state_is(optimizer.elsewhere, optimizer)
    for module in model.modules():
        # By name, since torch.distributed need not be there.
        if names := AVERAGE_LATER.intersection(x.__qualname__ for x in type(module).__mro__):
            reason = f"{names.pop()} averages gradients over processes afterwards"
            raise errors.not_in_backward(type(optimizer).__name__, reason)
    for group in optimizer.param_groups:
        _check(optimizer, group)
    return StepInBackward(model, optimizer)


def _state_is(elsewhere: Any, optimizer: RuleOptimizer) -> ValueError:
    return errors.not_in_backward(type(optimizer).__name__, f"its state is {elsewhere.state_is}")


def _check(optimizer: RuleOptimizer, group: dict[str, Any]) -> None:
    own, program = optimizer.composition(group), optimizer.program(group)
    if program.shares:
        raise errors.not_in_backward(own.name, "it needs the gradients of several parameters at once")
    for key in (slot.key for slot in own.slots.values() if slot.shared and slot.exists(group)):
        raise errors.not_in_backward(own.name, f"its parameters share '{key}', which belongs to whole steps")
    if group.get("nonfinite", "ignore") != "ignore":
        raise errors.not_in_backward(own.name, f"nonfinite={group['nonfinite']!r} looks at all gradients first")
    if own.at("climb"):
        raise errors.not_in_backward(own.name, "it takes the gradients twice")
    if any(
        parts.sharded(p) and here.needs_whole(program.of(p), p, None, views.at(group, place))
        for place, p in enumerate(group["params"])
    ):
        raise errors.not_in_backward(own.name, "sharded parameters are sent to the process that owns them")


class SomeParameters(RuleOptimizer):
    """An optimizer as it is for one or some of its parameters: the same state, in a group of its own."""

    # Both look at all parameters.
    _watched_rounding = True
    _looked_for_curvature = True

    def __init__(self, whole: RuleOptimizer):
        self.whole = whole
        self._own: dict[str, Any] = {}
        # The parameters in whose place others are stepped, by the ids of these.
        self._stand_for: dict[int, Tensor] = {}

    def take_step(self, param: Tensor) -> None:
        """Take the parameter's step with the options that its group has now."""
        whole = self.whole
        with plans.of(whole).lock:
            if whole._state_is_away:
                whole.reload_state()
            for index, places in self._where([param]).items():
                self._step_with(index, list(places))

    def take_step_with(self, params: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        """Take the step of parameters with their copies in main memory."""
        whole = self.whole
        self._stand_for = {id(copy): param for param, copy in zip(params, copies, strict=True)}
        for index, places in self._where(params).items():
            pairs = [(params[x], copies[x]) for x in places.values()]
            known = {copy: whole.state[param] for param, copy in pairs if param in whole.state}
            state: defaultdict[Tensor, Any] = defaultdict(dict, known)
            try:
                self._step_with(index, list(places), [copy for _, copy in pairs], state)
            finally:
                whole.state.update({param: state[copy] for param, copy in pairs if copy in state})

    def _where(self, params: Sequence[Tensor]) -> dict[int, dict[int, int]]:
        """By group, the places of these parameters there and among these; those of no group are left out."""
        found: dict[int, dict[int, int]] = {}
        for number, param in enumerate(params):
            self.whole.place_of(param)
            if id(param) in self.whole._places:
                index, place, _ = self.whole._places[id(param)]
                found.setdefault(index, {})[place] = number
        return found

    def _step_with(
        self, index: int, places: Sequence[int], copies: list[Tensor] | None = None, state: Any = None
    ) -> None:
        """Step the parameters at these places of a group.

        copies, state: what is stepped in place of the parameters, if anything is, with its state.
        """
        whole, own = self.whole, self._own
        # A loaded checkpoint has replaced the state and the groups.
        self.__dict__ |= whole.__dict__
        self.param_groups = [own]
        own.clear()
        own.update(_some(whole.param_groups[index], places))
        try:
            if copies is not None:
                own["params"], self.state = copies, state
                host.move_state(self)
                host.check_options(self, own, index)
            if self._may_step():
                self._step_groups(None)
        finally:
            own["params"] = []

    def rule_of(self, group: Mapping[str, Any]) -> Any:
        """The rule of a group."""
        return self.whole.rule_of(group)

    def place_of(self, param: Tensor) -> int:
        """The parameter's position among all parameters."""
        return self.whole.place_of(self._known(param))

    def name_of(self, param: Tensor) -> str:
        """How messages refer to a parameter."""
        return self.whole.name_of(self._known(param))

    def names_in(self, group: dict[str, Any]) -> list[str]:
        """How messages refer to the parameters of a group."""
        return [self.name_of(x) for x in group["params"]]

    def gradients_of(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """What a step of these parameters is taken with."""
        return self.whole.gradients_of(params)

    def _known(self, param: Tensor) -> Any:
        """The parameter in whose place this is stepped."""
        return self._stand_for.get(id(param), param)


def _some(group: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """A group of the parameters at these places alone."""
    lists = [key for key in ("params", "param_names", views.KEY) if group.get(key) is not None]
    return {**group, **{key: [group[key][place] for place in places] for key in lists}}


@cache
def _kind_of(name: str) -> type[SomeParameters]:
    """The class with the name of the optimizer, for messages."""
    return type(name, (SomeParameters,), {})
