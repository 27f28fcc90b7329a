"""An optimizer whose step is a declared rule: its state, its step counts, and the runner of each group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from steprule import errors, rule_errors
from steprule.engine import effects, first_step, foreach, program, reference, runners, sparse, storage
from steprule.engine.compose import Update, Worn
from steprule.engine.fields import FLAGS, OPTIONS
from steprule.engine.optimizer import CheckedOptimizer, make_step_counter

ABSENT = (None, False, "ignore")


class RuleOptimizer(CheckedOptimizer):
    """A rule's class attributes say what it is; its instances are optimizers."""

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        """One step of the rule, in words."""
        raise NotImplementedError

    counts_steps: ClassVar[bool | str] = True
    gradients: ClassVar[str] = "dense"
    complex_error: ClassVar[type[Exception] | None] = None
    torch_flags: ClassVar[tuple[str, ...]] = FLAGS
    # Whether torch's lists of tensors take an lr or betas that are tensors.
    lists_take_tensors: ClassVar[bool] = True
    traced: ClassVar[bool] = True
    _watched_rounding: bool = False
    # Whether `update` sees the parameter after a decoupled decay, or as it was.
    decays_first: ClassVar[bool] = True

    def __init__(self, params: Any, defaults: dict[str, Any]):
        if type(self).update is RuleOptimizer.update:
            methods = [name for name, value in vars(type(self)).items() if callable(value)]
            raise rule_errors.no_update(type(self).__name__, errors.close("update", methods))
        for flag in (*FLAGS, *OPTIONS):
            # torch's rules differ in the switches they know; groups hold the same keys as theirs.
            if flag not in self.torch_flags and defaults.get(flag) in ABSENT:
                defaults.pop(flag, None)
        super().__init__(params, {**defaults, **self.fixed})

    def _known_keys(self) -> set[str]:
        return set(self.fields) | set(self.fixed)

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
            fix = f"{who} reads numbers of the whole matrix on the host; there is no tape through them."
            raise errors.contradiction(who, "differentiable=True", "a rule on matrices", fix)
        if group.get("fused") and group.get("differentiable"):
            fix = "A fused kernel leaves no tape; drop one."
            raise errors.contradiction(who, "`fused`", "`differentiable`", fix, RuntimeError)
        if group.get("fused") and group.get("foreach"):
            fix = "`fused` and `foreach` cannot be `True` together."
            raise errors.contradiction(who, "`fused`", "`foreach`", fix, RuntimeError)
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
        if self.traced:
            self.program(group)
        else:
            self._check_whole(group, index)

    # What the rule wears

    def worn(self, group: dict[str, Any]) -> Worn:
        """Which habits are on in this group; a decay of zero is not worn at all."""
        decay = None
        strength = group.get("weight_decay", 0)
        if self.decay_default and (isinstance(strength, Tensor) or strength != 0):
            decoupled = group.get("decoupled_weight_decay")
            named = {None: self.decay_default, True: "decoupled", False: "l2"}[decoupled]
            decay = group.get("weight_decay_mode", named)
        return Worn(bool(group.get("maximize")), decay, self.decays_first)

    def program(self, group: dict[str, Any]) -> program.Program:
        """The traced step of this group."""
        return program.trace(type(self), type(self).update, self.worn(group), group)

    # State

    def counts(self, group: dict[str, Any]) -> bool:
        """Whether the rule needs to know how many steps a parameter has taken."""
        if isinstance(self.counts_steps, str):
            return bool(group[self.counts_steps])
        return self.counts_steps

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter; what is missing is created at its start."""
        state = self.state[param]
        state.update(self.state_to_come(param, group, state, self.place_of(param)))
        return state

    def state_to_come(
        self, param: Tensor, group: dict[str, Any], there: Mapping[str, Any], place: int
    ) -> dict[str, Any]:
        """The state entries that the next step creates for a parameter."""
        new: dict[str, Any] = {}
        if "step" not in there and self.counts(group):
            # torch counts SparseAdam's steps in a plain int, and cannot go on from a tensor bit for bit.
            device = param.device if runners.counts_on_device(group) else "cpu"
            new["step"] = 0 if self.gradients == "rows only" else make_step_counter(device)
        for slot in self.slots.values():
            if not storage.holds(there, slot.key) and slot.exists(group):
                new |= storage.create(slot, param, group)
        if group.get("low_precision") or group.get("state_dtype"):
            new |= storage.create_for_parameter(param, group, {**there, **new}, place)
        return new

    def slot_elements(self, state: Mapping[str, Any], key: str) -> Tensor:
        """The elements of a slot, decoded if it is kept in 8 bits."""
        return storage.load(state, key)

    def init_state(self) -> None:
        """Create the state of every trainable parameter, without a step."""
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if param.requires_grad:
                        self.state_of(param, group)

    def share_memory(self) -> None:
        """Move the state to shared memory, for training from several processes."""
        self.init_state()
        for state in self.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.share_memory_()

    # Stepping

    def _check_group(self, group: dict[str, Any]) -> None:
        if len(self.param_groups) == 1 and runners.choose(type(self), group).runner.endswith("_kernel"):
            return  # its plan checks every gradient, whenever one changes its kind
        for param in group["params"]:
            if param.grad is not None:
                self.check_gradient(param, param.grad, group)

    def _step_group(self, group: dict[str, Any]) -> None:
        if self._watched_rounding:
            self._run_group(group)
            return
        watch = first_step.Watch(group)
        self._run_group(group)
        messages = watch.messages(self)
        # All groups of the first step, until one has something to tell.
        self._watched_rounding = bool(messages) or group is self.param_groups[-1]
        for message in messages:
            warnings.warn(message, stacklevel=6)

    def _run_group(self, group: dict[str, Any]) -> None:
        runner = runners.choose(type(self), group).runner
        left: list[Tensor] = group["params"]
        if runner.endswith("_kernel"):
            from steprule.engine import fused  # what its kernels need is optional

            left = fused.step(self, group)
            if left and group.get("fused"):
                name, reason = next(iter(fused.reasons(self, group).items()))
                raise errors.runner_unavailable(type(self).__name__, "fused=True", f"{name}: {reason}")
        elif runner == "foreach":
            left = self._step_lists(group)
        worn = self.worn(group)
        for param in left:
            if param.grad is not None:
                self._step_alone(param, param.grad, worn, group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` itself unscales gradients and skips; a gradient scaler asks for it by this name."""
        groups = self.param_groups
        asked = bool(groups) and all(group.get("fused") for group in groups)
        return asked and all(runners.choose(type(self), x).runner == "gpu_kernel" for x in groups)

    def _step_alone(self, param: Tensor, gradient: Tensor, worn: Worn, group: dict[str, Any]) -> None:
        self.check_gradient(param, gradient, group)
        state = self.state_of(param, group)
        if gradient.is_sparse:
            sparse.run(self, type(self).update, worn, group, param, gradient, state)
        else:
            t = next_step(state)
            reference.run(type(self), type(self).update, worn, group, param, gradient, state, t)

    def _step_lists(self, group: dict[str, Any]) -> list[Tensor]:
        """One step by foreach; returns the parameters that it must leave: gradients or storage say so."""
        work: list[tuple[Tensor, Tensor, dict[str, Any], Any]] = []
        left: list[Tensor] = []
        for param in group["params"]:
            gradient = param.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                left.append(param)
                continue
            self.check_gradient(param, gradient, group)
            state = self.state_of(param, group)
            if storage.keeps_more(state):
                left.append(param)
                continue
            work.append((param, gradient, state, next_step(state)))
        foreach.step(type(self), self.program(group), group, work)
        return left

    def check_gradient(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Refuse a gradient that the rule cannot use, by the parameter's name."""
        who = type(self).__name__
        if gradient.is_sparse and self.gradients == "dense":
            raise errors.sparse_gradient(who, self.name_of(param))
        if gradient.is_sparse and self.traced and self.program(group).reduces:
            raise errors.sparse_with_reduction(who, self.name_of(param))
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
        if self.complex_error is not None and param.is_complex():
            raise errors.complex_parameter(who, self.name_of(param), self.complex_error)

    def _in_codes(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether numbers of the parameter's state share scales: as asked, or as loaded."""
        state = self.state.get(param, {})
        return any(
            storage.kind_of(x, group) == "int8" or f"{x.key}_codes" in state for x in self.slots.values()
        )

    def _explain_group(self, group: dict[str, Any]) -> list[str]:
        worn = self.worn(group)
        habits = [f"{worn.decay} weight decay"] if worn.decay else []
        habits += ["maximize"] if worn.maximize else []
        wears = ", ".join(habits) or "nothing"
        choice = runners.choose(type(self), group)
        lines = [f"runner: {choice.runner}; wears: {wears}"]
        lines += [f"not {runner}: {reason}" for runner, reason in choice.passed_over.items()]
        lines += effects.without_effect(self, group)
        if choice.runner.endswith("_kernel"):
            from steprule.engine import fused

            lines += fused.explain(self, group)
        return lines


def next_step(state: dict[str, Any]) -> Any:
    """Count one step, and return the new count."""
    if "step" not in state:
        return None
    if not isinstance(state["step"], Tensor):
        state["step"] = make_step_counter().fill_(state["step"])
    state["step"] += 1
    return state["step"].item()


def run_on_slots(optimizer: RuleOptimizer, update: Update, group: dict[str, Any], extra: Any) -> None:
    """Run words that only change slots, such as a curvature estimate, on every gradient of a group."""
    with torch.no_grad():
        for param in group["params"]:
            if param.grad is not None:
                optimizer.check_gradient(param, param.grad, group)
                state = optimizer.state_of(param, group)
                reference.run(type(optimizer), update, Worn(), group, param, param.grad, state, extra)
