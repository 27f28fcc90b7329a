"""Which rule wrote a checkpoint, judging by its groups and its state.

torch does not write the name of the rule into its checkpoints. What identifies the rule is which
hyper-parameters the groups have and which keys the state has. Adam and AdamW have the same ones, so each loads
the other's checkpoints, as in torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch

from steprule import errors
from steprule.engine import storage
from steprule.engine.fields import FLAGS, OPTIONS


def refuse_another_rule(optimizer: Any, groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> None:
    """Raise ValueError if another rule of this library or of torch wrote the checkpoint."""
    if any("rule" in group for group in (*groups, *optimizer.param_groups)):
        return  # each group says so itself
    rule: Any = cast(object, type(optimizer))
    known: set[str] = set[str]().union(*map(optimizer.known_keys, optimizer.param_groups))
    entries = [cast("Mapping[str, Any]", entry) for entry in state.values() if isinstance(entry, Mapping)]
    modifiers = {name for group in groups for name in group.get("modifiers") or ()}
    kept = {key for entry in entries for key in _telling(entry) if key.partition(".")[0] not in modifiers}
    foreign = kept - state_keys(rule) if state_keys(rule) else set[str]()
    written = {key for group in groups for key in group} & set[str]().union(*map(_signs, _rules()))
    # Trainers put a weight decay of zero into the groups of every rule.
    if not foreign and _needed(rule, written) <= written <= known | {"weight_decay"}:
        return
    others = [x for x in _rules() if not (issubclass(x, rule) or issubclass(rule, x)) and kept <= state_keys(x)]
    # If this rule may have written it, other keys may be notes: another rule must match in its switches, too.
    every_key = {key for group in groups for key in group}
    switches = every_key & {*FLAGS} if _needed(rule, written) <= written and not foreign else None
    writers = [x for x in others if written and _wrote(x, written, switches)]
    if foreign and not writers:
        writers = [x for x in others if {slot.key for slot in x.slots.values() if slot.when is None} <= kept]
    if writers:
        told = f"its state has '{min(foreign)}'" if foreign else f"its groups have {', '.join(sorted(written))}"
        raise errors.checkpoint_of_another_rule(rule.__name__, [x.__name__ for x in writers], told)


def rule_of_saved(group: Mapping[str, Any], rule: Any) -> str:
    """The name of the rule that wrote a group; of `rule`, if it may be the one and the group does not say."""
    if "rule" in group:
        return str(group["rule"])
    written = set(group) & set[str]().union(*map(_signs, _rules()))
    if _needed(rule, written) <= written <= {*rule.fields, *rule.fixed, "weight_decay"}:
        return rule.__name__
    return " or ".join(sorted(x.__name__ for x in _rules() if _wrote(x, written, None))) or "another one"


def hyperparameters_of_torch(rule: Any) -> Mapping[str, Any]:
    """The arguments of torch's class of the same name, in the installed torch, with their defaults."""
    for base in cast("tuple[type, ...]", rule.__mro__):
        theirs = vars(torch.optim).get(base.__name__)
        if isinstance(theirs, type) and theirs is not torch.optim.Optimizer:
            return _arguments(theirs)
    return {}


@cache
def _arguments(theirs: type) -> Mapping[str, Any]:
    arguments = inspect.signature(theirs).parameters
    return {name: argument.default for name, argument in arguments.items() if name != "params"}


def state_keys(rule: Any) -> set[str]:
    """The keys that the rule may keep for a parameter, without those that say how slots are stored."""
    counted = {"step"} if getattr(rule, "counts_steps", False) else set[str]()
    return {slot.key for slot in rule.slots.values()} | counted | rule.further_state


def _telling(entry: Mapping[str, Any]) -> Iterator[str]:
    """The keys that identify the rule: those with a value, without those that say how slots are stored."""
    for key, value in entry.items():
        slot = key.removesuffix("_scale")
        scale = slot != key and (slot in entry or f"{slot}_codes" in entry)
        if not (value is None or value is False or scale or key in storage.EXTRA_KEYS):
            yield key.removesuffix("_codes")


def _rules() -> Iterator[Any]:
    """The rules of this library."""
    waiting: list[Any] = torch.optim.Optimizer.__subclasses__()
    while waiting:
        rule = waiting.pop()
        waiting += rule.__subclasses__()
        if rule.__module__.startswith("steprule.") and state_keys(rule):
            yield rule


def _signs(rule: Any) -> set[str]:
    """The hyper-parameters that identify the rule; not the switches that most rules have."""
    return {name for name, field in rule.fields.items() if not field.free} - {*FLAGS, *OPTIONS}


def _wrote(rule: Any, written: set[str], switches: set[str] | None) -> bool:
    """Whether groups of this rule, here or in torch, have exactly these signs and, if given, these switches."""
    theirs, fixed = set(hyperparameters_of_torch(rule)), set(rule.fixed)
    own, flags = set(rule.fields), {*FLAGS}
    # Groups of ours have a switch that torch's rule does not have only if it was given.
    least = set(getattr(rule, "torch_flags", FLAGS)) & own
    for signs, few, most in (
        (_signs(rule), least, own & flags),
        (theirs - flags, theirs & flags, theirs & flags),
    ):
        if written - fixed == signs - fixed and (switches is None or few <= switches <= most):
            return True
    return False


def _needed(rule: Any, written: set[str]) -> set[str]:
    """The signs that a checkpoint of this rule must have; an older torch may lack keyword-only arguments."""
    theirs = hyperparameters_of_torch(rule)
    if not theirs or not written <= {*theirs, *rule.fixed}:
        return _signs(rule)
    return {name for name in _signs(rule) if name in theirs and rule.fields[name].positional}
