"""An optimizer whose step is a declared rule: its state, its step counts, and the runner of each group."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule import errors, group_errors, rule_errors
from steprule.engine import (
    draws,
    effects,
    evaluation,
    first_step,
    gradients,
    group_keys,
    measured,
    nonfinite,
    notices,
    pieces,
    plans,
    settled,
    stand_in,
    storage,
    usable,
    views,
    weight_decay,
)
from steprule.engine.checkpoint import restored
from steprule.engine.composition import PEAK_LR, Composition, composed
from steprule.engine.fields import FLAGS, OPTIONS, counts_on_device, make_step_counter
from steprule.engine.optimizer import CheckedOptimizer
from steprule.engine.parts import Parts
from steprule.engine.program.phases import Part
from steprule.engine.program.program import Program
from steprule.engine.program.trace import trace
from steprule.engine.runners import choice
from steprule.engine.runners.reference import Work
from steprule.engine.sharding import parts as sharded

# What the constructor says about these goes for groups with another rule, too.
OF_ANY_RULE = ("maximize", "nonfinite")


class RuleOptimizer(CheckedOptimizer):
    """The class attributes describe a rule; the instances are optimizers."""

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        """One step of the rule, in words."""
        raise NotImplementedError

    counts_steps: ClassVar[bool | str] = True
    gradients: ClassVar[str] = "dense"
    complex_error: ClassVar[type[Exception] | None] = None
    # Whether the constructor makes the state, as torch's rule of this name does.
    starts_with_state: ClassVar[bool] = False
    torch_flags: ClassVar[tuple[str, ...]] = FLAGS
    # Whether torch's lists of tensors accept an lr or betas that are tensors.
    lists_take_tensors: ClassVar[bool] = True
    # Whether it works on whole matrices, and what makes groups of a model then.
    on_matrices: ClassVar[bool] = False
    groups_of: ClassVar[Callable[..., Any]]
    # Whether the first step of a parameter moves it.
    first_step_moves: ClassVar[bool] = True
    _watched_rounding: bool = False
    _looked_for_curvature: bool = False
    # The rows and columns that `update` sees: "flattened" or "stacked", as in `lines`.
    matrices: ClassVar[str] = "flattened"
    # Whether the reference takes sums in the parameter's own precision, as torch's rule of this name does.
    sums_as_torch: ClassVar[bool] = False
    # Whether `update` sees the parameter after a decoupled decay, or as it was.
    decays_first: ClassVar[bool] = True

    def __init__(self, params: Any, defaults: dict[str, Any]):
        if type(self).update is RuleOptimizer.update:
            methods = [name for name, value in vars(type(self)).items() if callable(value)]
            raise rule_errors.no_update(type(self).__name__, errors.close("update", methods))
        rest = defaults.pop("rest", None)
        if self.on_matrices and isinstance(params, torch.nn.Module):
            kept = {x: defaults[x] for x in ("state_dtype", "low_precision") if defaults.get(x) is not None}
            params = self.groups_of(type(self), params, rest, kept)
        elif rest is not None:
            raise group_errors.rest_without_module(type(self).__name__)
        super().__init__(params, {**_without_absent(type(self), defaults), **self.fixed})
        if self.starts_with_state or sharded.any_sharded(self.param_groups):
            # Of sharded parameters, so that nobody has to take a step to see the state.
            self._make_state(frozen=self.starts_with_state)

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {"_parts": self._parts} if self._parts else {}
        own |= {"elsewhere": self.elsewhere} if self.elsewhere else {}
        # A copy that is uphill, too, must find the way back.
        return {**super().__getstate__(), **own, **({"uphill": self.uphill} if self.uphill else {})}

    # What a group steps with

    _parts: Parts | None = None

    @property
    def parts(self) -> Parts:
        """The classes that groups name as their rule and their modifiers."""
        if self._parts is None:
            self._parts = Parts(type(self))
        return self._parts

    def rule_of(self, group: Mapping[str, Any]) -> Any:
        """The rule of a group: the one that it names, otherwise the optimizer's class."""
        name = group.get("rule")
        return type(self) if name is None else self.parts.rules[name]

    def composition(self, group: Mapping[str, Any]) -> Composition:
        """The rule of a group with all that the group adds to it."""
        return self._composed(group, tuple(x for x in self._modifiers(group) if x not in self._resting))

    def full_composition(self, group: Mapping[str, Any]) -> Composition:
        """The same with the modifiers that rest in this step: what the state of a parameter is made for."""
        return self._composed(group, self._modifiers(group))

    def _composed(self, group: Mapping[str, Any], modifiers: tuple[Any, ...]) -> Composition:
        rule = self.rule_of(group)
        decay = weight_decay.of_group(rule, group)
        return composed(rule, rule.update, modifiers, bool(group.get("maximize")), decay)

    def declared(self, group: Mapping[str, Any]) -> Composition:
        """The same for a group whose values have not been checked yet, to see what it may have."""
        rule = self.rule_of(group)
        return composed(rule, rule.update, self._modifiers(group))

    def _modifiers(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        names = group.get("modifiers")
        return tuple(map(self.parts.modifiers.__getitem__, names)) if names else ()

    def who(self, group: Mapping[str, Any]) -> str:
        """How messages call the rule of a group."""
        return self.rule_of(group).__name__

    def program(self, group: Mapping[str, Any]) -> Program:
        """The traced step of this group."""
        return trace(self.composition(group), group)

    def known_keys(self, group: Mapping[str, Any]) -> set[str]:
        """The keys of a group that are not notes of the user's."""
        own = self.declared(group)
        return {
            "rule",
            views.KEY,
            evaluation.EVALUATING,
            PEAK_LR.name,
            *own.fields,
            *own.rule.fixed,
            *(x.key for x in own.slots.values() if x.shared),
        }

    @classmethod
    def states_a_step(cls) -> bool:
        """Whether `update` is written, so that groups may name this class as their rule."""
        return cls.update is not RuleOptimizer.update

    @classmethod
    def own_methods(cls) -> list[str]:
        """What optimizers of this class can do besides their step, such as `update_hessian`."""
        rules = cls.__mro__[: cls.__mro__.index(RuleOptimizer)]
        written = [vars(x) for x in rules if x.__module__ != "steprule.declare"]
        names = [name for body in written for name, value in body.items() if isinstance(value, FunctionType)]
        return [name for name in names if not (name.startswith("_") or hasattr(RuleOptimizer, name))]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, which may name a rule and modifiers of its own.

        Raises: TypeError or ValueError as torch does, and for what the group's rule does not accept. Nothing is
        added when it raises.
        """
        before = self.parts.copy()
        try:
            super().add_param_group(param_group)
        except BaseException:
            self._parts = before
            raise

    def _completed(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        group = self.parts.read(group, index)
        complete = {**self._defaults_of(group), **group}
        if "modifiers" not in group:
            self.parts.read(complete, index)  # whether those of the constructor go with this rule
        group_keys.check(self.who(group), group, self.known_keys(complete), index)
        return complete

    def _defaults_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What a group has where it says nothing.

        The constructor's values; of another rule its defaults, and of the constructor what any rule takes.
        """
        rule, defaults = self.rule_of(group), self.defaults
        if rule is not type(self):
            own = {name: field.default for name, field in rule.fields.items()}
            own |= {name: defaults[name] for name in OF_ANY_RULE if name in own and name in defaults}
            defaults = {
                **_without_absent(rule, own),
                **rule.fixed,
                **{key: value for key, value in defaults.items() if "." in key or key == "modifiers"},
            }
        if "modifiers" in group:
            # The group's own list replaces that of the constructor.
            left = set[str](defaults.get("modifiers") or ()) - set[str](group["modifiers"] or ())
            return {key: value for key, value in defaults.items() if key.partition(".")[0] not in left}
        return defaults

    def _normalize(self, group: dict[str, Any], index: int | None) -> dict[str, Any]:
        if index is None:
            group = self.parts.read(group, None)
        if "state_dtype" in group:
            group["state_dtype"] = storage.named(group["state_dtype"])
        return super()._normalize(group, index)

    def _check_combinations(self, group: dict[str, Any], index: int | None) -> None:
        own = self.composition(group)
        who, rule = own.rule.__name__, own.rule
        for name, value in rule.fixed.items():
            if group[name] != value:
                raise errors.out_of_range(who, name, group[name], repr(value), index)
        storage.check(who, own.slots, group, index)
        if rule.on_matrices and group.get("differentiable"):
            fix = f"{who} reads values of the whole matrix on the host, which autograd cannot follow."
            raise errors.contradiction(who, "differentiable=True", "a rule on matrices", fix)
        if group.get("fused") and group.get("differentiable"):
            fix = "A fused kernel leaves no tape; drop one."
            raise errors.contradiction(who, "`fused`", "`differentiable`", fix, RuntimeError)
        if group.get("fused") and group.get("foreach"):
            fix = "`fused` and `foreach` cannot be `True` together."
            raise RuntimeError(f"{who}: {fix}")
        if group.get("differentiable") and own.at("climb"):
            fix = "Autograd cannot record that the weights are changed for a while and put back; drop one."
            raise errors.contradiction(who, "differentiable=True", own.at("climb")[0].__name__, fix)
        if not rule.lists_take_tensors:
            _check_tensors(who, group, index)
        rule.check_group(group, index)

    @classmethod
    def check_group(cls, group: dict[str, Any], index: int | None) -> None:
        """Refuse hyper-parameters of a group that exclude each other; rules add their own checks."""

    @classmethod
    def check_parameter(cls, param: Tensor, name: Callable[[], str], group: int | None) -> None:
        """Refuse a parameter that the rule can never step; rules add their own checks.

        name: what gives its name, which takes time to find.
        """

    def _check_parameters(self, group: dict[str, Any], index: int) -> None:
        own = self.composition(group)
        who = own.rule.__name__
        if group.get(views.KEY) is not None:
            if not own.rule.on_matrices:
                problem = "left out: it steps every element on its own"
                raise group_errors.wrong_view(who, "given", problem, index)
            group[views.KEY] = views.checked(who, group, index)
            reason = pieces.why_not(own, self.program(group), group) if pieces.unequal(group) else None
            if reason is not None:
                raise group_errors.not_in_pieces(who, reason, index)
        storage.check_parameters(who, own.slots, group, index)
        if self.elsewhere is not None:
            self.elsewhere.check(self, group, index)
        names: list[str] = group.get("param_names", [])
        for place, param in enumerate(group["params"]):
            if not is_lazy(param):  # it is checked when it has a gradient
                name = f"'{names[place]}'" if names else f"parameter {place}"
                if not views.says(group, param):
                    own.rule.check_parameter(param, partial(str, name), index)
                if param.dim() < 2 and self.program(group).of(param).needs_matrices:
                    raise group_errors.vector_for_matrices(who, name, tuple(param.shape), index)
        if self.program(group).shares and group.get("differentiable"):
            fix = "Autograd cannot record a sum over all parameters in the middle of a step; drop it."
            raise errors.contradiction(who, "differentiable=True", "over='group' or 'all' in a rule", fix)

    # State

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter; missing entries are created.

        Raises: RuntimeError for a state that cannot be this parameter's.
        """
        state = self.state[param]
        problem = usable.problem_of(self.full_composition(group).slots.values(), param, state, group)
        if problem is not None:
            raise errors.state_does_not_fit(self.who(group), self.name_of(param), *problem)
        if torch.is_inference_mode_enabled():
            # State made in inference mode could not be written outside of it.
            with torch.inference_mode(False), torch.no_grad():
                return self._filled(state, param, group)
        return self._filled(state, param, group)

    def _filled(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        before, slots = dict(state), self.full_composition(group).slots.values()
        for slot in slots:
            if state.get(slot.key) is None:
                state.pop(slot.key, None)
        parts = None
        if state and (asks_for_storage(group) or any(key in state for key in storage.BESIDE.values())):
            parts = restored.follow(slots, param, state, group)
        state.update(self.state_to_come(param, group, state, self.place_of(param)))
        step = self._preparation
        if step is not None:
            step.note(state, before)
        if parts is not None:
            move = partial(storage.restore_parameter, param, state, parts)
            move() if step is None else step.postpone(move)
        return state

    def state_to_come(
        self, param: Tensor, group: dict[str, Any], there: Mapping[str, Any], place: int
    ) -> dict[str, Any]:
        """The state entries that the next step creates for a parameter."""
        new: dict[str, Any] = {}
        own = self.full_composition(group)
        if "step" not in there and own.counts(group):
            # torch counts SparseAdam's steps in a plain int, and cannot continue from a tensor bit for bit.
            device = param.device if counts_on_device(group) else "cpu"
            new["step"] = 0 if own.rule.gradients == "rows only" else make_step_counter(device)
        for slot in own.slots.values():
            if not storage.holds(there, slot.key) and slot.exists(group):
                new |= storage.create(slot, param, group)
        new |= draws.create(own, group, there, place)
        if asks_for_storage(group):
            new |= storage.create_for_parameter(param, group, {**there, **new}, place)
        return new

    def init_state(self) -> None:
        """Create the state of every trainable parameter, without a step."""
        with self._inside():
            self._make_state(frozen=False)

    def _make_state(self, frozen: bool) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if (frozen or param.requires_grad) and not is_lazy(param):
                        self.state_of(param, group)

    def share_memory(self) -> None:
        """Move the state to shared memory, step counts included, for training from several processes."""
        self.init_state()
        for state in self.state.values():
            if isinstance(state.get("step"), int):
                state["step"] = make_step_counter().fill_(state["step"])
            for value in state.values():
                if isinstance(value, Tensor):
                    value.share_memory_()

    # Stepping

    # The modifiers that the step which is being prepared goes without.
    _resting: tuple[Any, ...] = ()

    def _prepare_group(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        modifiers = self._modifiers(group)
        counting = [x for x in modifiers if x.acts != "always" and group[f"{x.name}.every"] > 1]
        for modifier in counting:
            after[f"{modifier.name}.steps"] = group[f"{modifier.name}.steps"] + 1
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                every = group[f"{modifier.name}.every"]
                raise errors.captured_rhythm(self.who(group), modifier.__name__, every)
        resting = tuple(x for x in counting if x.rests(group))
        if not resting:
            return self._prepare_step(group, after)
        self._resting = resting
        try:
            return self._prepare_step(group, after)
        finally:
            self._resting = ()

    def _collect(self) -> Any:
        if not sharded.any_sharded(self.param_groups) or any(
            x.get("differentiable") for x in self.param_groups
        ):
            return None
        from steprule.engine.sharding import here  # which runs what this module runs

        return here.begin(self)

    def _leave(self, finished: bool = False, failed: bool = False) -> None:
        here, self._here = self._here, None
        if here is not None:
            here.leave(finished, failed)

    def _prepare_step(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        decided = settled.of_group(self, group)
        if decided.composition.shares_all:
            self._check_common(group)
        if self._here is not None:
            parts = self._here.prepare(group, after)
        elif pieces.unequal(group):
            parts, _ = pieces.prepare(self, group, after)
        else:
            parts, _ = stand_in.prepared(self, group, after)
        if not self._looked_for_curvature and hasattr(decided.composition.rule, "estimate"):
            self._looked_for_curvature = first_step.look_for_curvature(self, group)
        return parts

    def plans_now(self) -> plans.Plans:
        """The plans for the step that is being prepared."""
        own = plans.of(self)
        return own.resting.setdefault(self._resting, plans.Plans()) if self._resting else own

    def _check_common(self, group: dict[str, Any]) -> None:
        """Refuse groups that differ in a hyper-parameter that a slot for all parameters is made of."""
        for name in self.program(group).common:
            first = next(other for other in self.param_groups if self._makes_common(other, name))
            if first[name] != group[name]:
                raise errors.groups_differ(self.who(group), name, first[name], group[name])

    def _makes_common(self, group: Mapping[str, Any], name: str) -> bool:
        return name in self.program(group).common

    def _may_step(self, count: bool = True, checked_later: bool = False) -> bool:
        if evaluation.is_on(self):
            raise errors.step_in_evaluation(type(self).__name__)
        return super()._may_step(count, checked_later)

    # The parameters that are uphill, each with its weights.
    uphill: Sequence[tuple[Tensor, Tensor]] = ()

    def climb(self) -> None:
        """Move to where SAM takes its second gradient; `step` comes back from there.

        Call it after the first backward pass. A closure that `step` gets then takes the second gradient only.
        The gradients may be scaled.
        """
        if not any(self.composition(group).at("climb") for group in self.param_groups):
            raise errors.nothing_climbs(type(self).__name__)
        from steprule.engine import climbing  # which builds on this module

        climbing.climb(self)

    def _take_gradients_uphill(self, closure: Callable[[], Any] | None) -> None:
        if self.uphill:  # then the gradients are those that it asks for, also those of a closure
            from steprule.engine import climbing

            climbing.descend(self)
            return
        asked = any(group.get("modifiers") for group in self.param_groups)
        if not (asked and any(self.composition(group).at("climb") for group in self.param_groups)):
            return
        from steprule.engine import climbing

        if closure is None:
            raise errors.climb_first(type(self).__name__)
        climbing.climb(self)
        try:
            with torch.enable_grad():
                closure()
        finally:
            climbing.descend(self)

    def eval(self) -> RuleOptimizer:
        """Put the weights to evaluate with into the model, where a rule or a modifier has such weights.

        `train()` puts the training weights back, bit for bit. A step in between raises. The mode is saved: of a
        checkpoint that was written in evaluation, save and load the model's weights, too.
        """
        return self.train(False)

    def train(self, mode: bool = True) -> RuleOptimizer:
        """Put the training weights back into the model; `train(False)` is `eval()`."""
        with self._inside("move") if evaluation.changes(self, mode) else nullcontext():
            (evaluation.leave if mode else evaluation.enter)(self)
        return self

    @contextmanager
    def averaged_weights(self) -> Generator[None]:
        """In the `with` block, the model has the weights to evaluate with."""
        before = evaluation.is_on(self)
        self.eval()
        try:
            yield
        finally:
            self.train(not before)

    def metrics(self, level: Literal["all", "group", "param"] = "all") -> Any:
        """What the modifier Metrics measured at the last step that it was due.

        The norms of gradients, updates and weights, and the update's relative to the weights'. level: of all
        parameters together, a list with one dict for each group, or a dict by parameter name.
        """
        return measured.read(self, level)

    @property
    def gradient_norm(self) -> float:
        """The norm of all gradients at the last step, before GlobalNormClip has clipped them."""
        for group in self.param_groups:
            if "global_norm_clip.norm" in group:
                return group["global_norm_clip.norm"]
        raise errors.no_gradient_norm(type(self).__name__)

    def _run(self, steps: Sequence[tuple[dict[str, Any], Sequence[Part]]], gate: nonfinite.Gate | None) -> bool:
        if self._watched_rounding:
            return super()._run(steps, gate)
        # A first step warns if it shows that most updates or state round away.
        watches = [first_step.Watch(group) for group, _ in steps]
        if not super()._run(steps, gate):
            return False
        self._watched_rounding = not any(watch.too_early(self) for watch in watches)
        for watch in watches if self._watched_rounding else ():
            messages = watch.messages(self)
            for message in messages:
                notices.warn(message)
            if messages:
                break
        return True

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` itself unscales gradients and skips steps; gradient scalers look for this name."""
        groups = self.param_groups
        if self.elsewhere is not None:
            return False  # what the device has to know of a step is not there
        asked = bool(groups) and all(group.get("fused") for group in groups)
        # Words on whole matrices read the gradient as it is.
        whole = any(self.rule_of(group).on_matrices for group in groups)
        return (
            asked and not whole and all(choice.choose(self.composition(x), x).runner.unscales for x in groups)
        )

    def check_storage(self, group: dict[str, Any]) -> None:
        """Refuse storage that was requested between steps and is not possible."""
        if asks_for_storage(group):
            index = next((i for i, other in enumerate(self.param_groups) if other is group), None)
            own = self.composition(group)
            storage.check(own.rule.__name__, own.slots, group, index)
            storage.check_parameters(own.rule.__name__, own.slots, group, index or 0)

    def checked(self, params: list[Tensor], group: dict[str, Any]) -> list[Work]:
        """The parameters with their gradients and states, checked so that the rule can use them."""
        self.check_storage(group)
        pairs = list(zip(params, self.gradients_of(params), strict=True))
        for param, gradient in pairs:
            if gradient is not None:
                self.check_gradient(param, gradient, group)
        return [(param, grad, self.state_of(param, group)) for param, grad in pairs if grad is not None]

    def check_gradient(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Refuse a gradient that the rule cannot use, naming the parameter."""
        gradients.check(self, param, gradient, group)

    def _explain_group(self, group: dict[str, Any]) -> list[str]:
        own = self.composition(group)
        options = [f"{own.decay.mode} weight decay"] if own.decay else []
        options += ["maximize"] if own.maximize else []
        chosen = choice.choose(own, group)
        lines = [f"runner: {chosen.runner.name}; options: {', '.join(options) or 'none'}"]
        lines += filter(None, [own.places(group)])
        lines += views.told(group, self.names_in(group)) if own.rule.on_matrices else []
        lines += [f"not {runner}: {reason}" for runner, reason in chosen.passed_over.items()]
        lines += effects.without_effect(self, group)
        lines += self.elsewhere.told(group) if self.elsewhere is not None else []
        if sharded.any_sharded([group]):
            from steprule.engine.sharding import here

            return lines + here.explain(self, group, chosen.runner)
        if pieces.unequal(group):
            return lines + pieces.of(self, group).explain(chosen.runner)
        return lines + chosen.runner.explain(self, group)


def _without_absent(rule: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults without those switches that torch's rule does not have and that were not given."""
    # torch's rules differ in the switches they have; groups hold the same keys as theirs.
    absent = [
        x
        for x in (*FLAGS, *OPTIONS, "rest")
        if x in rule.fields and x not in rule.torch_flags and defaults.get(x) is rule.fields[x].default
    ]
    return {key: value for key, value in defaults.items() if key not in absent}


def _check_tensors(who: str, group: dict[str, Any], index: int | None) -> None:
    """Refuse tensors as hyper-parameters where torch's rule does."""
    for name in ("lr", "betas"):
        value: Any = group.get(name)
        entries = cast(tuple[Any, ...], value if isinstance(value, tuple) else (value,))
        tensors = [isinstance(entry, Tensor) for entry in entries]
        if any(tensors) and not all(tensors):
            raise errors.mixed_betas(who, index)
        if any(tensors) and group.get("foreach") and not group.get("capturable"):
            fix = f"Give {name} as a float, or leave foreach out."
            asked = "capturable=False and foreach=True"
            raise errors.contradiction(who, f"{name} as a Tensor", asked, fix)


def asks_for_storage(group: dict[str, Any]) -> bool:
    """Whether the group says how to store state or parameters."""
    return bool(group.get("low_precision") or group.get("state_dtype"))
