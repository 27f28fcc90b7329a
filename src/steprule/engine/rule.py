"""An optimizer whose step is a declared rule: its state, its step counts, and the runner of each group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule import errors, rule_errors
from steprule.engine import (
    effects,
    first_step,
    foreach,
    forms,
    phases,
    program,
    reference,
    restored,
    runners,
    sparse,
    storage,
    usable,
)
from steprule.engine.compose import Added, Update
from steprule.engine.fields import FLAGS, OPTIONS, make_step_counter
from steprule.engine.optimizer import CheckedOptimizer
from steprule.engine.phases import Part
from steprule.engine.reference import Work

_own_noise = cast(Any, torch.random).fork_rng
ABSENT = (None, False, "ignore")
SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


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
    traced: ClassVar[bool] = True
    has_elements = staticmethod(forms.has_elements)
    _watched_rounding: bool = False
    # Whether `update` sees the parameter after a decoupled decay, or as it was.
    decays_first: ClassVar[bool] = True

    def __init__(self, params: Any, defaults: dict[str, Any]):
        if type(self).update is RuleOptimizer.update:
            methods = [name for name, value in vars(type(self)).items() if callable(value)]
            raise rule_errors.no_update(type(self).__name__, errors.close("update", methods))
        for flag in (*FLAGS, *OPTIONS):
            # torch's rules differ in the switches they have; groups hold the same keys as theirs.
            if flag not in self.torch_flags and defaults.get(flag) in ABSENT:
                defaults.pop(flag, None)
        super().__init__(params, {**defaults, **self.fixed})
        if self.starts_with_state:
            self._make_state(frozen=True)

    def _known_keys(self) -> set[str]:
        return set(self.fields) | set(self.fixed) | {x.key for x in self.slots.values() if x.shared}

    def _normalize(self, group: dict[str, Any], index: int | None) -> dict[str, Any]:
        if "state_dtype" in group:
            group["state_dtype"] = storage.named(group["state_dtype"])
        return super()._normalize(group, index)

    def _check_combinations(self, group: dict[str, Any], index: int | None) -> None:
        who = type(self).__name__
        for name, value in self.fixed.items():
            if group[name] != value:
                raise errors.out_of_range(who, name, group[name], repr(value), index)
        storage.check(who, self.slots, group, index)
        if not self.traced and group.get("differentiable"):
            fix = f"{who} reads values of the whole matrix on the host, which autograd cannot follow."
            raise errors.contradiction(who, "differentiable=True", "a rule on matrices", fix)
        if group.get("fused") and group.get("differentiable"):
            fix = "A fused kernel leaves no tape; drop one."
            raise errors.contradiction(who, "`fused`", "`differentiable`", fix, RuntimeError)
        if group.get("fused") and group.get("foreach"):
            fix = "`fused` and `foreach` cannot be `True` together."
            raise RuntimeError(f"{who}: {fix}")
        if not self.lists_take_tensors:
            self._check_tensors(group, index)

    def _check_tensors(self, group: dict[str, Any], index: int | None) -> None:
        """Refuse tensors as hyper-parameters where torch's rule does."""
        who = type(self).__name__
        for name in ("lr", "betas"):
            value: Any = group.get(name)
            entries = cast(tuple[Any, ...], value if isinstance(value, tuple) else (value,))
            tensors = [isinstance(entry, Tensor) for entry in entries]
            if any(tensors) and not all(tensors):
                raise errors.mixed_betas(who, index)
            if any(tensors) and group.get("foreach") and not group.get("capturable"):
                raise errors.contradiction(
                    who,
                    f"{name} as a Tensor",
                    "capturable=False and foreach=True",
                    f"Give {name} as a float, or leave foreach out.",
                )

    def _check_parameters(self, group: dict[str, Any], index: int) -> None:
        storage.check_parameters(type(self).__name__, self.slots, group, index)
        if not self.traced:
            self._check_whole(group, index)
        elif self.program(group).shares and group.get("differentiable"):
            fix = "Autograd cannot record a sum over all parameters in the middle of a step; drop it."
            who = type(self).__name__
            raise errors.contradiction(who, "differentiable=True", "over='group' or 'all' in a rule", fix)

    # What the group adds to the rule

    def added(self, group: dict[str, Any]) -> Added:
        """What this group adds to the rule; a weight decay of zero is left out of the program."""
        decay = None
        strength = group.get("weight_decay", 0)
        if self.decay_default and (isinstance(strength, Tensor) or strength != 0):
            decoupled = group.get("decoupled_weight_decay")
            named = {None: self.decay_default, True: "decoupled", False: "l2"}[decoupled]
            decay = group.get("weight_decay_mode", named)
        return Added(bool(group.get("maximize")), decay, self.decays_first)

    def program(self, group: dict[str, Any]) -> program.Program:
        """The traced step of this group."""
        return program.trace(type(self), type(self).update, self.added(group), group)

    # State

    def counts(self, group: dict[str, Any]) -> bool:
        """Whether the rule needs to know how many steps a parameter has taken."""
        if isinstance(self.counts_steps, str):
            return bool(group[self.counts_steps])
        return self.counts_steps

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter; missing entries are created.

        Raises: RuntimeError for a state that cannot be this parameter's.
        """
        state = self.state[param]
        problem = usable.problem_of(self.slots.values(), param, state)
        if problem is not None:
            raise errors.state_does_not_fit(type(self).__name__, self.name_of(param), *problem)
        if torch.is_inference_mode_enabled():
            # State made in inference mode could not be written outside of it.
            with torch.inference_mode(False), torch.no_grad():
                return self._completed(state, param, group)
        return self._completed(state, param, group)

    def _completed(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        for slot in self.slots.values():
            if state.get(slot.key) is None:
                state.pop(slot.key, None)
        value = None
        if state and asks_for_storage(group):
            value = restored.follow(self.slots.values(), param, state, group)
        state.update(self.state_to_come(param, group, state, self.place_of(param)))
        if value is not None:
            storage.store_parameter(param, state, value)
        return state

    def state_to_come(
        self, param: Tensor, group: dict[str, Any], there: Mapping[str, Any], place: int
    ) -> dict[str, Any]:
        """The state entries that the next step creates for a parameter."""
        new: dict[str, Any] = {}
        if "step" not in there and self.counts(group):
            # torch counts SparseAdam's steps in a plain int, and cannot continue from a tensor bit for bit.
            device = param.device if runners.counts_on_device(group) else "cpu"
            new["step"] = 0 if self.gradients == "rows only" else make_step_counter(device)
        for slot in self.slots.values():
            if not storage.holds(there, slot.key) and slot.exists(group):
                new |= storage.create(slot, param, group)
        if asks_for_storage(group):
            new |= storage.create_for_parameter(param, group, {**there, **new}, place)
        return new

    def slot_elements(self, state: Mapping[str, Any], key: str) -> Tensor:
        """The elements of a slot, decoded if it is kept in 8 bits."""
        return storage.load(state, key)

    def init_state(self) -> None:
        """Create the state of every trainable parameter, without a step."""
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

    def _prepare_group(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        runner = runners.choose(type(self), group).runner
        left: list[Tensor] = group["params"]
        parts: list[Part] = []
        if any(slot.per == "all" for slot in self.slots.values()):
            self._check_common(group)
        if runner.endswith("_kernel"):
            from steprule.engine import fused  # what its kernels need is optional

            parts, left = fused.prepare(self, group, after)
            if left and group.get("fused"):
                name, reason = next(iter(fused.reasons(self, group).items()))
                raise errors.runner_unavailable(type(self).__name__, "fused=True", f"{name}: {reason}")
        elif runner == "foreach":
            parts, left = self._prepare_lists(left, group, after)
        return [*parts, self._prepare_alone(left, group, after)] if left else parts

    def _check_common(self, group: dict[str, Any]) -> None:
        """Refuse groups that differ in a hyper-parameter that a slot for all parameters is made of."""
        first = self.param_groups[0]
        for name in self.program(group).common:
            if first[name] != group[name]:
                raise errors.groups_differ(type(self).__name__, name, first[name], group[name])

    def _run(self, steps: Sequence[tuple[dict[str, Any], Sequence[Part]]]) -> None:
        if self._watched_rounding:
            super()._run(steps)
            return
        # A first step warns if it shows that most updates or state round away.
        watches = [first_step.Watch(group) for group, _ in steps]
        super()._run(steps)
        self._watched_rounding = True
        for watch in watches:
            messages = watch.messages(self)
            for message in messages:
                warnings.warn(message, stacklevel=6)
            if messages:
                break

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` itself unscales gradients and skips steps; gradient scalers look for this name."""
        groups = self.param_groups
        asked = bool(groups) and all(group.get("fused") for group in groups)
        return asked and all(runners.choose(type(self), x).runner == "gpu_kernel" for x in groups)

    def _prepare_alone(self, params: list[Tensor], group: dict[str, Any], after: dict[str, float]) -> Part:
        """A step of these parameters by the reference, one after the other."""
        work = self.checked(params, group)
        keys: list[Any] = []
        # Errors must come before anything moves.
        if self.traced:
            foreach.check_scalars(self.program(group), group, work)
            keys = [phases.key_in(group, reduction) for reduction in self.program(group).calls]
        else:
            self._rehearse(work, group)

        def one(entry: Work, known: Mapping[Any, float]) -> None:
            param, gradient, state = entry
            if gradient.is_sparse:
                sparse.run(self, type(self).update, self.added(group), group, param, gradient, state)
                return
            shared, t = reference.Shared(keys, known), reference.next_step(state)
            rule, added = type(self), self.added(group)
            after.update(reference.run(rule, rule.update, added, group, param, gradient, state, t, shared))
            reference.count(state)

        def start() -> phases.Going | None:
            if keys:
                return reference.in_turns(work, one)
            for entry in work:
                one(entry, {})
            return None

        return Part(start, frozenset(keys) if work else frozenset())

    _rehearsed: frozenset[Any] = frozenset()

    def _rehearse(self, work: list[Work], group: dict[str, Any]) -> None:
        """Compute a step for every new kind of parameter, so that errors of the rule are raised now."""
        added = self.added(group)
        types: list[Any] = [type(cast(object, group.get(name))) for name in self.fields]
        options = (added, program.static_key(type(self), group), *types)
        for param, gradient, state in work:
            tensors = [x for x in (param, gradient, *state.values()) if isinstance(x, Tensor)]
            kind = (options, param.shape, *((x.dtype, x.device) for x in tensors))
            if kind in self._rehearsed:
                continue
            with _own_noise([param.device] if param.is_cuda else []):
                t = reference.next_step(state)
                reference.compute(type(self), type(self).update, added, group, param, gradient, state, t)
            self._rehearsed |= {kind}

    def _prepare_lists(
        self, params: list[Tensor], group: dict[str, Any], after: dict[str, float]
    ) -> tuple[list[Part], list[Tensor]]:
        """A step by foreach, and the parameters whose gradients or storage it cannot take."""
        work: list[Work] = []
        left: list[Work] = []
        for entry in self.checked(params, group):
            (work if foreach.takes(entry) else left).append(entry)
        parts = foreach.prepare(self.program(group), group, work, after)
        return parts, [param for param, _, _ in left]

    def check_storage(self, group: dict[str, Any]) -> None:
        """Refuse storage that was requested between steps and is not possible."""
        if asks_for_storage(group):
            index = next((i for i, other in enumerate(self.param_groups) if other is group), None)
            storage.check(type(self).__name__, self.slots, group, index)
            storage.check_parameters(type(self).__name__, self.slots, group, index or 0)

    def checked(self, params: list[Tensor], group: dict[str, Any]) -> list[Work]:
        """The parameters with their gradients and states, checked so that the rule can use them."""
        self.check_storage(group)
        pairs = [(param, param.grad) for param in params]
        for param, gradient in pairs:
            if gradient is not None:
                self.check_gradient(param, gradient, group)
        return [(param, grad, self.state_of(param, group)) for param, grad in pairs if grad is not None]

    def check_gradient(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Refuse a gradient that the rule cannot use, naming the parameter."""
        who = type(self).__name__
        if gradient.layout in SPARSE and self.gradients == "dense":
            raise errors.sparse_gradient(who, self.name_of(param))
        if gradient.is_sparse and self.traced and self.program(group).reductions:
            raise errors.sparse_with_reduction(who, self.name_of(param))
        if gradient.is_sparse and self.added(group).decay is not None:
            raise errors.sparse_with_option(who, "weight_decay", self.name_of(param))
        if gradient.is_sparse and self._in_codes(param, group):
            raise errors.sparse_with_codes(who, self.name_of(param))
        if group.get("differentiable") and storage.keeps_more(self.state.get(param, {})):
            raise errors.rounding_has_no_tape(who, f"the storage of {self.name_of(param)}'s loaded state", None)
        if storage.sharded(param) and self._in_codes(param, group):
            raise errors.codes_in_parts(who, self.name_of(param), None)
        if not gradient.is_sparse and self.gradients == "rows only":
            raise errors.dense_gradient(who, self.name_of(param))
        if not self.traced and storage.split(param):
            raise errors.matrix_in_parts(who, self.name_of(param), None)
        if not usable.is_writable(param):
            fix = "Give the optimizer a clone of it, made outside of torch.inference_mode()."
            raise errors.parameter_not_writable(who, self.name_of(param), usable.READ_ONLY, fix)
        if group.get("differentiable") and param.is_leaf and param.requires_grad:
            problem = "is a leaf Variable that requires grad, which differentiable=True cannot change in place"
            fix = "Give the optimizer what is computed from it, such as p.clone(), or leave differentiable out."
            raise errors.parameter_not_writable(who, self.name_of(param), problem, fix)
        if self.complex_error is not None and param.is_complex():
            raise errors.complex_parameter(who, self.name_of(param), self.complex_error)
        if gradient.shape != param.shape and (
            gradient.is_sparse or not _broadcasts(gradient.shape, param.shape)
        ):
            raise errors.gradient_of_other_size(
                who, self.name_of(param), tuple(gradient.shape), tuple(param.shape)
            )
        if gradient.device != param.device and gradient.dim():
            raise errors.gradient_elsewhere(who, self.name_of(param), gradient.device, param.device)
        if gradient.is_complex() and not param.is_complex():
            raise errors.complex_gradient(who, self.name_of(param))

    def _in_codes(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether a slot of the parameter is kept in 8-bit codes, as the group asks or as loaded."""
        state: Mapping[str, Any] = self.state.get(param) or {}
        return any(
            storage.kind_of(x, group) == "int8" or f"{x.key}_codes" in state for x in self.slots.values()
        )

    def _explain_group(self, group: dict[str, Any]) -> list[str]:
        added = self.added(group)
        habits = [f"{added.decay} weight decay"] if added.decay else []
        habits += ["maximize"] if added.maximize else []
        options = ", ".join(habits) or "none"
        choice = runners.choose(type(self), group)
        lines = [f"runner: {choice.runner}; options: {options}"]
        lines += [f"not {runner}: {reason}" for runner, reason in choice.passed_over.items()]
        lines += effects.without_effect(self, group)
        if choice.runner.endswith("_kernel"):
            from steprule.engine import fused

            lines += fused.explain(self, group)
        return lines


def asks_for_storage(group: dict[str, Any]) -> bool:
    """Whether the group says how to store state or parameters."""
    return bool(group.get("low_precision") or group.get("state_dtype"))


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether torch would broadcast a tensor of the one shape to the other."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in pairs)


def run_on_slots(optimizer: RuleOptimizer, update: Update, extra: Any) -> None:
    """Run an update that only changes slots, such as a curvature estimate, on every gradient."""
    with torch.no_grad():
        groups = optimizer.param_groups
        work = [(group, optimizer.checked(group["params"], group)) for group in groups]
        for group, entries in work:
            for param, gradient, state in entries:
                reference.run(type(optimizer), update, Added(), group, param, gradient, state, extra)
