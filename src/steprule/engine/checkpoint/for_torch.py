"""Conversion of checkpoints for torch.optim, and the report of any conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steprule import errors
from steprule.engine import storage
from steprule.engine.checkpoint.matching import SHAPES
from steprule.engine.checkpoint.report import as_table
from steprule.engine.fields import SKIPPED_STEPS

# Switches that have no effect on results, and group keys that torch's classes do not have.
RUNNERS = ("foreach", "fused", "capturable", "differentiable")
OURS = ("state_dtype", "low_precision", "nonfinite", SHAPES, SKIPPED_STEPS, "weight_decay_mode", "peak_lr")


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_state` did with each slot. `print` shows a table.

    kept: slots of the new rule, with what they are. dropped: slots of the old rule that are not in the
    new state. reset: slots of the new rule that start from their initial value.
    """

    from_: str
    to: str
    kept: dict[str, str]
    dropped: tuple[str, ...]
    reset: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("kept", key, meaning) for key, meaning in self.kept.items()]
        rows += [("dropped", key, f"{self.to} has no such slot") for key in self.dropped]
        rows += [("reset", key, f"{self.from_} has no such slot") for key in self.reset]
        if not self.to.startswith("torch"):
            rows.append(("not converted", "hyper-parameters", f"those of the new {self.to} stay"))
        return "\n".join([f"from {self.from_} to {self.to}", *as_table(rows)])


def convert(state_dict: Mapping[str, Any], rule: Any) -> tuple[dict[str, Any], ConversionReport]:
    """A checkpoint for the torch.optim class that has the name of the rule, if the rule is known."""
    theirs = None if rule is None else getattr(torch.optim, rule.__name__, None)
    if rule is not None and theirs is None:
        problem = f"torch.optim has no {rule.__name__}"
        raise errors.not_convertible(problem, "First convert it to a rule that torch has.")
    kept: dict[str, str] = {}
    dropped: dict[str, None] = {}
    states = {place: _plain(saved, rule, kept, dropped) for place, saved in state_dict["state"].items()}
    known: set[str] = set() if theirs is None else set(theirs([nn.Parameter(torch.zeros(1, 1))]).defaults)
    own: set[str] = {*OURS, *(() if rule is None else (*rule.fields, *rule.fixed))} - known
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(state_dict["param_groups"]):
        _check_decay(group, rule, index)
        _check_options(group, rule, own, index)
        dropped |= dict.fromkeys(f"{key} (group {index})" for key in group if key in own)
        groups.append({key: value for key, value in group.items() if key not in own})
    to = "torch.optim" if rule is None else f"torch.optim.{rule.__name__}"
    report = ConversionReport("steprule" if rule is None else rule.__name__, to, kept, tuple(dropped), ())
    return {"state": states, "param_groups": groups}, report


def _plain(
    saved: Mapping[str, Any], rule: Any, kept: dict[str, str], dropped: dict[str, None]
) -> dict[str, Any]:
    """The entries of one parameter that torch knows, without codes."""
    entries = storage.codes_apart(saved)
    found: dict[str, Any] = {}
    for key, value in entries.items():
        slot = key.removesuffix("_codes")
        uncounted = key == "step" and rule is not None and isinstance(rule.counts_steps, str)
        if key in storage.EXTRA_KEYS or uncounted:
            dropped[key] = None
        elif slot != key and f"{slot}_scale" in entries:
            found[slot] = storage.load(entries, slot)
            kept[slot] = "decoded from 8 bits"
        elif f"{key.removesuffix('_scale')}_codes" not in entries:
            found[key] = value
            kept.setdefault(key, "as it is")
    return found


def _check_options(group: Mapping[str, Any], rule: Any, own: set[str], index: int) -> None:
    """Refuse hyper-parameters that torch's class does not have, unless they are at their defaults."""
    if rule is None:
        return
    for key in own & group.keys() - {*OURS, *RUNNERS}:
        default = rule.fixed.get(key) if key in rule.fixed else rule.fields[key].default
        if group[key] != default:
            problem = (
                f"torch's {rule.__name__} has no {key}, which is {group[key]!r} in parameter group {index}"
            )
            raise errors.not_convertible(problem, f"It can be converted when {key} is {default!r}.")


def _check_decay(group: Mapping[str, Any], rule: Any, index: int) -> None:
    """Refuse weight decay that torch's class would apply in another way."""
    mode, decoupled = group.get("weight_decay_mode"), group.get("decoupled_weight_decay")
    usual = None if rule is None else rule.decay_default
    if decoupled is not None:
        usual = "decoupled" if decoupled else "l2"
    strength = group.get("weight_decay", 0)
    if mode is not None and mode != usual and strength != 0:
        problem = f"parameter group {index} decays weights in the mode '{mode}', which torch may not know"
        raise errors.not_convertible(problem, "Give from_, or use the kind of weight decay that torch has.")
