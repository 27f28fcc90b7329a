"""The base of every optimizer: a `torch.optim.Optimizer` that checks its groups and keeps torch's contract."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from itertools import chain, takewhile
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule import errors, group_errors, rule_errors
from steprule.engine import given, group_keys, moving, nonfinite, notices, plans, views, weight_decay
from steprule.engine.checkpoint import state_dicts
from steprule.engine.checkpoint.report import LoadReport
from steprule.engine.elsewhere import Elsewhere, Purpose
from steprule.engine.fields import SKIPPED_STEPS, Field, Slot
from steprule.engine.preparation import Preparation
from steprule.engine.program import phases
from steprule.engine.program.phases import Part
from steprule.engine.sharding import parts, together
from steprule.engine.weight_decay import WeightDecay


def _never_traced(step: Callable[..., Any]) -> Any:
    """Keep the compiler from tracing `step`.

    A compiled training step then calls the same kernels as any other, and is not recompiled when lr changes.
    torch.compiler.disable imports the compiler, which takes seconds, so it is called only after that.
    """
    left_alone: list[Callable[..., Any]] = []

    @wraps(step)
    def entry(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if "torch._dynamo" not in sys.modules:
            return step(self, closure)
        if not left_alone:
            left_alone.append(cast(Any, torch.compiler).disable(step))
        return left_alone[0](self, closure)

    return entry


class _Missing:
    """What a subclass lacks whose `__init__` has not called that of its base."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, optimizer: object, owner: type) -> Any:
        raise errors.not_constructed(owner.__name__, self.name)


class CheckedOptimizer(torch.optim.Optimizer):
    """The contract: parameters in, groups checked, `step` with closure and hooks, safe checkpoints.

    Subclasses implement the step of one group in `_prepare_group`.
    """

    fields: ClassVar[dict[str, Field]] = {}
    slots: ClassVar[dict[str, Slot]] = {}
    decay_default: ClassVar[str | None] = None
    # Group keys that have one fixed value in torch's rule of this name.
    fixed: ClassVar[dict[str, Any]] = {}
    # The state keys of a parameter besides its slots.
    further_state: ClassVar[frozenset[str]] = frozenset()
    if not TYPE_CHECKING:
        param_groups, state, defaults = map(_Missing, ("param_groups", "state", "defaults"))
        _optimizer_state_dict_pre_hooks = _Missing("_optimizer_state_dict_pre_hooks")

    # One state for all parameters together, kept with the first; its vectors hold all of them in order.
    one_vector: ClassVar[bool] = False
    # What `gradients_of` gives, for messages.
    taken_with: ClassVar[str] = "gradient"

    @staticmethod
    def numbers_beside_slots(group: Mapping[str, Any]) -> float:
        """How many values per element are kept outside the declared slots."""
        return 0.0

    def __init__(self, params: Any, defaults: dict[str, Any]):
        who = type(self).__name__
        defaults = self._normalize(dict(defaults), None)
        super().__init__(given.as_groups(who, params), defaults)

    # Groups

    def composition(self, group: Mapping[str, Any]) -> Any:
        """What a group steps with; its fields and slots are those of the group."""
        return type(self)

    def declared(self, group: Mapping[str, Any]) -> Any:
        """The same for a group whose values have not been checked yet."""
        return type(self)

    def rule_of(self, group: Mapping[str, Any]) -> Any:
        """The rule of a group."""
        return type(self)

    def who(self, group: Mapping[str, Any]) -> str:
        """How messages call the rule of a group."""
        return type(self).__name__

    def all_slots(self) -> dict[str, Slot]:
        """The slots of all groups, by their keys."""
        return {x.key: x for group in self.param_groups for x in self.composition(group).slots.values()}

    def known_keys(self, group: Mapping[str, Any]) -> set[str]:
        """The keys of a group that are not notes of the user's."""
        return set(self.fields) | set(self.defaults)

    def _completed(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        """A new group with the defaults for what it does not say."""
        if group.get("rule") is not None:
            raise rule_errors.one_rule_only(type(self).__name__, index)
        group_keys.check(type(self).__name__, group, self.known_keys(group), index)
        return {**self._defaults_of(group), **group}

    def _defaults_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What a group has where it says nothing."""
        return self.defaults

    def _normalize(self, group: dict[str, Any], index: int | None) -> dict[str, Any]:
        """Check every hyper-parameter in a group or in the defaults, and expand decay objects."""
        who, fields = self.who(group), self.declared(group).fields
        decay = group.get("weight_decay")
        if isinstance(decay, WeightDecay):
            group.update(decay.defaults())
            group["weight_decay_mode"] = decay.mode
            if "decoupled_weight_decay" in fields:
                group["decoupled_weight_decay"] = decay.weight_decouple
        weight_decay.check_mode(who, group, index)
        for name, field in fields.items():
            if name in group:
                group[name] = field.check(who, group[name], index)
        if index is not None:
            weight_decay.remember_lr(who, group, index)
        if group.get("nonfinite") != "skip":
            group.pop(SKIPPED_STEPS, None)
        elif index is not None:
            group.setdefault(SKIPPED_STEPS, 0)
        if index is not None:
            self._start_shared(group)
        self._check_combinations(group, index)
        return group

    def _start_shared(self, group: dict[str, Any]) -> None:
        """Give a new group the slots that parameters share."""
        for slot in self.composition(group).slots.values():
            if slot.shared and slot.exists(group):
                others = self.param_groups if slot.per == "all" else []
                known = [other[slot.key] for other in others if slot.key in other]
                group.setdefault(slot.key, known[0] if known else slot.start(group))

    def _check_combinations(self, group: dict[str, Any], index: int | None) -> None:
        """Refuse options that exclude each other; rules add their own checks."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, before or in the middle of training.

        Raises: TypeError or ValueError as torch does, and ValueError for unknown or out-of-range
        hyper-parameters. Nothing is added when it raises.
        """
        who, index = type(self).__name__, len(self.param_groups)
        if not isinstance(param_group, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise errors.group_not_dict(who, type(param_group).__name__)
        group = dict(param_group)
        if "params" not in group:
            raise errors.group_without_params(who, index)
        tensors, names = given.tensors_and_names(who, group["params"], index)
        if names:
            group["param_names"] = names
        group = self._normalize(self._completed(group, index), index)
        differentiable = bool(group.get("differentiable"))
        for place, tensor in enumerate(tensors):
            if not differentiable and not (tensor.is_leaf or tensor.retains_grad):
                raise errors.not_a_leaf(who, given.name(names, place), index)
        named = "param_names" in group
        if any(("param_names" in other) != named for other in self.param_groups[:1]):
            raise errors.groups_named_differently(who, index, named)
        taken = set(map(id, chain.from_iterable(map(itemgetter("params"), self.param_groups))))
        shared = [given.name(names, i) for i, p in enumerate(tensors) if id(p) in taken]
        if shared:
            raise errors.in_two_groups(who, ", ".join(shared), index)
        unique = given.without_duplicates(who, tensors, names, index)
        group["params"] = [tensors[i] for i in unique]
        if named:
            group["param_names"] = [group["param_names"][i] for i in unique]
        if isinstance(group.get(views.KEY), (list, tuple)) and len(group[views.KEY]) == len(tensors):
            group[views.KEY] = [group[views.KEY][i] for i in unique]
        self._check_parameters(group, index)
        self.param_groups.append(group)

    def _check_parameters(self, group: dict[str, Any], index: int) -> None:
        """Refuse parameters that the rule can never step; rules add their own checks."""

    def name_of(self, param: Tensor) -> str:
        """How messages refer to a parameter: by name, or by position among all parameters."""
        for group in self.param_groups:
            for place, candidate in enumerate(group["params"]):
                if candidate is param:
                    return self.names_in(group)[place]
        return "a parameter of another optimizer"

    # No weak references to parameters: torch.utils.swap_tensors refuses tensors that have one.
    _places: Mapping[int, tuple[int, int, int]] = {}

    def place_of(self, param: Tensor) -> int:
        """The parameter's position among all parameters, in the order of the groups."""
        group, index, place = self._places.get(id(param), (len(self.param_groups), 0, 0))
        if group < len(self.param_groups):
            there = self.param_groups[group]["params"]
            if index < len(there) and there[index] is param:
                return place
        groups = enumerate(self.param_groups)
        everything = [(p, (i, j)) for i, group in groups for j, p in enumerate(group["params"])]
        self._places = {id(p): (*where, place) for place, (p, where) in enumerate(everything)}
        return self._places[id(param)][2] if id(param) in self._places else len(everything)

    def names_in(self, group: dict[str, Any]) -> list[str]:
        """How messages refer to the parameters of a group."""
        names = group.get("param_names")
        if names:
            return [f"'{name}'" for name in names]
        before = takewhile(lambda other: other is not group, self.param_groups)
        first = sum(len(other["params"]) for other in before)
        return [f"parameter {first + i}" for i in range(len(group["params"]))]

    # Stepping

    @_never_traced
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step on every parameter that has a gradient.

        closure: recomputes the loss and its gradients; it runs with gradients enabled and its value is
        returned. Raises: RuntimeError for gradients that the rule cannot use, and for NaN or infinite ones
        where nonfinite="raise"; then nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_gradients_uphill(closure)
        with plans.of(self).lock:
            if self._state_is_away:
                self.reload_state()
            self._check_new_keys()
            gate = nonfinite.gate(self)
            if self._may_step(checked_later=gate is not None):
                with self._inside("step"):
                    self._step_groups(gate)
        return loss

    # What is stepped in place of the parameters: see `shard_state` and `state_on_host`.
    elsewhere: Elsewhere | None = None

    def _inside(self, to: Purpose = "look") -> Any:
        """Have what is stepped in place of the parameters."""
        return nullcontext() if self.elsewhere is None else self.elsewhere.inside(self, to)

    def _take_gradients_uphill(self, closure: Callable[[], Any] | None) -> None:
        """Where a modifier asks for it, take the gradients again at another point."""

    # Only while a step is being prepared.
    _preparation: Preparation | None = None

    def _step_groups(self, gate: nonfinite.Gate | None) -> None:
        """Prepare every group, then step them all: what can be checked raises before anything has moved."""
        preparation = self._preparation = Preparation(self.state)
        steps: list[tuple[dict[str, Any], list[Part]]] = []
        after: list[dict[str, float]] = [{} for _ in self.param_groups]
        try:
            self._here = self._collect()
            for group, new in zip(self.param_groups, after, strict=True):
                with torch.set_grad_enabled(bool(group.get("differentiable"))):
                    steps.append((group, self._prepare_group(group, new)))
            if self._here is None and any(part.stack for _, own in steps for part in own):
                from steprule.engine.runners import stacks  # not at start-up: most rules have none

                steps = stacks.stacked(steps)
            parts = [part for _, own in steps for part in own]
            if waiting := phases.waiting(parts):
                stuck = [i for i, (_, own) in enumerate(steps) if any(part.stages in waiting for part in own)]
                raise group_errors.sums_wait(type(self).__name__, stuck)
            early = gate is not None and (preparation.moves or not gate.sees(parts))
            if early and not nonfinite.allow_step(self):
                preparation.undo()
                return
        except BaseException:
            preparation.undo()
            self._leave(failed=True)
            raise
        finally:
            self._preparation = None
        try:
            preparation.begin()
            went = self._run(steps, gate)
        except Exception as error:
            self._leave(failed=True)
            if not getattr(error, "nothing_moved", False):
                error.add_note(errors.in_the_middle_of_a_step(type(self).__name__))
            elif not preparation.moves:
                preparation.undo()
            raise
        self._leave(finished=went)
        if gate is not None and not went:
            preparation.undo()
            gate.complain()
        elif any(after):
            self._share(after)

    # What is here of sharded parameters, while a step is taken.
    _here: Any = None

    def _collect(self) -> Any:
        """What is here of the parameters, if any are sharded."""
        return None

    def _leave(self, finished: bool = False, failed: bool = False) -> None:
        """Finish the step of sharded parameters, or tell the other processes that it has failed here."""

    def _run(self, steps: Sequence[tuple[dict[str, Any], Sequence[Part]]], gate: nonfinite.Gate | None) -> bool:
        """Run what was prepared, and return whether it was run."""
        everywhere = self._here and self._here.sums
        if everywhere is not None or any(part.keys for _, parts in steps for part in parts):
            with torch.no_grad():
                parts = [part for _, parts in steps for part in parts]
                return phases.run(parts, gate.closes if gate else phases.never, everywhere)
        for group, parts in steps:
            with torch.set_grad_enabled(bool(group.get("differentiable"))):
                for part in parts:
                    part.start()
        return True

    def _share(self, after: list[dict[str, float]]) -> None:
        """Put the new values of slots that parameters share into the groups."""
        left = {key for new in after for key in new}
        for group in self.param_groups:
            if not left:
                break  # of many groups, the first tells of all keys
            for slot in self.composition(group).slots.values():
                if slot.shared and slot.key in left:
                    left.remove(slot.key)
                    self._share_one(slot, after)

    def _share_one(self, slot: Slot, after: Sequence[dict[str, float]]) -> None:
        found = {i: new[slot.key] for i, new in enumerate(after) if slot.key in new}
        if slot.per == "all":
            found = dict.fromkeys(range(len(after)), next(iter(found.values())))
        for index, value in found.items():
            if slot.key in self.param_groups[index]:
                self.param_groups[index][slot.key] = value

    _keys_checked: int = 0

    def _check_new_keys(self) -> None:
        """Look for misspelt keys again if keys have been added to groups since the last step."""
        keys = sum(map(len, self.param_groups))
        if keys != self._keys_checked:
            for index, group in enumerate(self.param_groups):
                group_keys.check(self.who(group), group, self.known_keys(group), index)
            self._keys_checked = keys

    def _may_step(self, count: bool = True, checked_later: bool = False) -> bool:
        """Whether the gradients are finite in the groups that ask for it; otherwise count a skipped step."""
        asked = any("nonfinite" in group for group in self.param_groups)
        return not asked or checked_later or nonfinite.allow_step(self, count)

    def gradients_of(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """What a step of these parameters is taken with."""
        return [param.grad for param in params]

    def nonfinite_parameters(self) -> list[str]:
        """The parameters whose gradients are NaN or infinite now, by name or by position."""
        return [place.label for place in nonfinite.offenders(self)]

    def _prepare_group(self, group: dict[str, Any], after: dict[str, float]) -> list[Part]:
        """Check whatever may fail in a step of this group; return what takes it, and raises no more.

        after: gets the new values of slots that parameters share, when the step is taken.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> CheckedOptimizer:
        """Switch to training weights. Has an effect only for averaging optimizers."""
        return self

    def eval(self) -> CheckedOptimizer:
        """Switch to evaluation weights. Has an effect only for averaging optimizers."""
        return self

    def state_to_come(
        self, param: Tensor, group: dict[str, Any], there: Mapping[str, Any], place: int
    ) -> dict[str, Any]:
        """The state entries that the next step creates for a parameter.

        there: those that it already has. place: the parameter's position (see `place_of`).
        """
        return {}

    # Checkpoints

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch adds 'differentiable' to the defaults of every optimizer, even of one that does not have it.
        known: dict[str, Any] = dict(state.get("defaults") or self.defaults)
        super().__setstate__(state)
        self.defaults = known
        for group in self.param_groups:
            for key, value in self._defaults_of(group).items():
                group.setdefault(key, value)

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups in torch's format, with shapes if the parameters have names.

        Tensors are those of the optimizer, not copies. State of parameters that are no longer in any group is
        left out.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed: Any = state_dicts.pack(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(  # type: ignore[override]
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool = True,
        hyperparams: Literal["saved", "current"] | Mapping[str, Literal["saved", "current"]] = "saved",
    ) -> LoadReport:
        """Load a checkpoint of this optimizer, or of the torch.optim class of the same name.

        Parameters are matched by name if both sides have names, whatever their order, their groups and the
        wrappers around the module; otherwise by position, if their number and shapes agree. If both sides have
        names but none matches, position decides too, with a warning. Tensors are copied to the device of their
        parameter and keep their dtype and layout; values kept per tensor, such as step counts, stay where they
        are.

        strict: refuse added, removed and reshaped parameters, missing slots, NaN and unknown keys. False
        loads what fits, leaves the rest as it is, and reports it.
        hyperparams: "saved" takes those of the checkpoint, "current" keeps those of the groups; a dict
        decides for single ones, as in {"lr": "current"}, and leaves the others "saved". How the state is stored
        (state_dtype, low_precision) is decided by the groups, and the state is converted to it;
        {"state_dtype": "saved"} keeps the storage of the checkpoint.

        Raises: ValueError or TypeError that names what does not fit; then nothing is changed.
        """
        if not isinstance(state_dict, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise errors.not_a_state_dict(type(self).__name__, type(state_dict).__name__)
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        with self._inside():
            with self._all_or_none():
                loaded, report = state_dicts.fit(self, state_dict, strict, hyperparams)
            if report.renamed:
                first = report.renamed[0]
                message = errors.loaded_by_position(type(self).__name__, first.saved, first.current)
                notices.warn(message)
            self.__setstate__(loaded)
            if self.elsewhere is not None:
                self.elsewhere.cut_state(self)
        plans.forget(self)
        self._state_is_away = False
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
        return report

    def _all_or_none(self) -> Any:
        """In the `with` block, all processes that share parameters fail if one does: each sees its parts."""
        meshes = [p.device_mesh for x in self.param_groups for p in x["params"] if parts.sharded(p)]
        return together.all_or_none(type(self).__name__, meshes) if meshes else nullcontext()

    def _check_loaded(self, state: Mapping[Tensor, Any]) -> None:
        """Refuse a loaded state before it replaces the current one; rules add their own checks."""

    # Moving the state

    _state_is_away: bool = False

    def to(self, device: torch.device | str) -> CheckedOptimizer:
        """Move the state to a device, as after `model.to(device)`; parameters and step counts stay.

        Returns the optimizer.
        """
        moving.move_state(self, lambda param: moving.to(torch.device(device)))
        return self

    def offload_state(self) -> None:
        """Move the state to main memory (pinned, from CUDA), to free the device between phases of training.

        It can be saved from there. The next step moves it back automatically; `reload_state` does so earlier.
        """
        moving.move_state(self, lambda param: moving.to_host)
        self._state_is_away = True

    def reload_state(self) -> None:
        """Move the state to where each parameter is."""
        with self._inside():
            moving.move_state(self, lambda param: moving.to(param.device))
        self._state_is_away = False

    def __getstate__(self) -> dict[str, Any]:
        away = {"_state_is_away": True} if self._state_is_away else {}
        return {**super().__getstate__(), **away}

    # Reading

    def explain(self) -> str:
        """What each group does: rule, parameters, state, runner and why."""
        with self._inside():
            return self._explain()

    def _explain(self) -> str:
        lines: list[str] = []
        for index, group in enumerate(self.param_groups):
            params: list[Tensor] = group["params"]
            count = _elements(params)
            size = sum(_state_bytes(self.state.get(p, {})) for p in params)
            number = errors.counted(len(params), "parameter")
            lines.append(
                f"group {index}{_note(group)}: {self.who(group)}, {number}, {count}, "
                f"{errors.counted(size, 'byte')} of state"
            )
            lines += [f"    {line}" for line in self._explain_group(group)]
        return "\n".join(lines)

    def _explain_group(self, group: dict[str, Any]) -> list[str]:
        return []

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups):
            count = _elements(group["params"])
            lines.append(f"  group {index}: {errors.counted(len(group['params']), 'parameter')}, {count}")
            shown = ((k, v) for k, v in group.items() if k not in ("params", "param_names", views.KEY))
            lines += [f"    {key}: {value}" for key, value in shown if value is not None]
        return "\n".join([*lines, ")"])


def explain(optimizer: CheckedOptimizer) -> str:
    """What each group of the optimizer does: rule, parameters, state, runner and why."""
    if not isinstance(optimizer, CheckedOptimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.not_an_optimizer("explain", type(optimizer).__name__)
    return optimizer.explain()


def _note(group: dict[str, Any]) -> str:
    """The group's own name, if it has one."""
    return f" ({group['name']})" if group.get("name") else ""


def _elements(params: list[Tensor]) -> str:
    """How many elements the parameters have, apart from those without a shape yet."""
    known = [p for p in params if not is_lazy(p)]
    waiting = len(params) - len(known)
    more = f" and {errors.counted(waiting, 'parameter')} without a shape yet" if waiting else ""
    return errors.counted(sum(p.numel() for p in known), "element") + more


def _state_bytes(state: dict[str, Any]) -> int:
    return sum(x.numel() * x.element_size() for x in state_dicts.tensors_in(state))
