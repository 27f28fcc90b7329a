"""An optimizer whose step is a declared rule: its state, its step counts, and the runner of each group."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from steprule import errors
from steprule.engine import program, reference, sparse
from steprule.engine.compose import Update, Worn
from steprule.engine.optimizer import CheckedOptimizer, make_step_counter

FLAGS = ("maximize", "foreach", "capturable", "differentiable", "fused")


class RuleOptimizer(CheckedOptimizer):
    """A rule's class attributes say what it is; its instances are optimizers."""

    update: ClassVar[Any]
    counts_steps: ClassVar[bool | str] = True
    gradients: ClassVar[str] = "dense"
    complex_error: ClassVar[type[Exception] | None] = None
    torch_flags: ClassVar[tuple[str, ...]] = FLAGS
    traced: ClassVar[bool] = True
    # Whether `update` sees the parameter after a decoupled decay, or as it was.
    decays_first: ClassVar[bool] = True

    def __init__(self, params: Any, defaults: dict[str, Any]):
        for flag in FLAGS:
            # torch's rules differ in the switches they know; groups hold the same keys as theirs.
            if flag not in self.torch_flags and not defaults.get(flag):
                defaults.pop(flag, None)
        super().__init__(params, defaults)
        if self.traced:
            for group in self.param_groups:
                self.program(group)

    def _known_keys(self) -> set[str]:
        return set(self.fields)

    def _check_combinations(self, group: dict[str, Any], index: int | None) -> None:
        who = type(self).__name__
        if group.get("fused") and group.get("differentiable"):
            fix = "A fused kernel leaves no tape; drop one."
            raise errors.contradiction(who, "`fused`", "`differentiable`", fix, RuntimeError)
        if group.get("fused") and group.get("foreach"):
            fix = "`fused` and `foreach` cannot be `True` together."
            raise errors.contradiction(who, "`fused`", "`foreach`", fix, RuntimeError)
        if group.get("foreach") and not group.get("capturable"):
            for name in ("lr", "betas"):
                value = group.get(name)
                if any(
                    isinstance(x, Tensor) for x in (value if isinstance(value, tuple) else (value,))
                ):
                    raise errors.contradiction(
                        who,
                        f"{name} as a Tensor",
                        "capturable=False and foreach=True",
                        f"Give {name} as a float, or leave foreach out.",
                    )

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
        if "step" not in state and self.counts(group):
            state["step"] = make_step_counter()
        for slot in self.slots.values():
            if slot.key not in state and slot.exists(group):
                created = slot.create(param, group)
                if created is not None:
                    state[slot.key] = created
        return state

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
                value.share_memory_()

    # Stepping

    def _step_group(self, group: dict[str, Any]) -> None:
        worn = self.worn(group)
        for param in group["params"]:
            gradient = param.grad
            if gradient is None:
                continue
            self._check_gradient(param, gradient, group)
            state = self.state_of(param, group)
            if gradient.is_sparse:
                sparse.run(self, type(self).update, worn, group, param, gradient, state)
            else:
                t = next_step(state)
                reference.run(type(self), type(self).update, worn, group, param, gradient, state, t)

    def _check_gradient(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        who = type(self).__name__
        if gradient.is_sparse and self.gradients == "dense":
            raise errors.sparse_gradient(who, self.name_of(param))
        if not gradient.is_sparse and self.gradients == "rows only":
            raise errors.dense_gradient(who, self.name_of(param))
        if self.complex_error is not None and param.is_complex():
            raise errors.complex_parameter(who, self.name_of(param), self.complex_error)

    def _explain_group(self, group: dict[str, Any]) -> list[str]:
        worn = self.worn(group)
        habits = [worn.decay and f"{worn.decay} weight decay", worn.maximize and "maximize"]
        wears = ", ".join(x for x in habits if x) or "nothing"
        return [f"runner: reference; wears: {wears}"]


def next_step(state: dict[str, Any]) -> Any:
    """Count one step; the new count as a plain number, or as a tensor while a compiler traces."""
    if "step" not in state:
        return None
    if not isinstance(state["step"], Tensor):
        state["step"] = make_step_counter().fill_(state["step"])
    state["step"] += 1
    return state["step"] if torch.compiler.is_compiling() else state["step"].item()


def run_on_slots(
    optimizer: RuleOptimizer, update: Update, group: dict[str, Any], extra: Any
) -> None:
    """Run words that only change slots, such as a curvature estimate, on every gradient of a group."""
    for param in group["params"]:
        if param.grad is not None:
            state = optimizer.state_of(param, group)
            reference.run(type(optimizer), update, Worn(), group, param, param.grad, state, extra)
