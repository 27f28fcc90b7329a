"""From what the command line says to an optimizer and its schedule."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import steprule
from steprule import schedules
from steprule.engine.optimizer import CheckedOptimizer
from steprule.lab.errors import LabError, did_you_mean

__all__ = [
    "SCHEDULES",
    "build_optimizer",
    "build_schedule",
    "find_rule",
    "hyperparameters_of",
    "parse_settings",
]

SCHEDULES = ("none", "warmup", "cosine")
WARMUP_SHARE = 0.05
WORDS = {"true": True, "false": False, "none": None, "inf": float("inf")}


def find_rule(name: str) -> type[CheckedOptimizer]:
    """The rule of that name, in capitals or not. Raises `LabError` with the nearest name."""
    rules = steprule.catalogue()
    for known, rule in rules.items():
        if known.lower() == name.lower():
            return rule
    raise LabError(f"no optimizer '{name}'. {did_you_mean(name, rules)}")


def parse_settings(lr: float | None, settings: Sequence[str]) -> dict[str, Any]:
    """`--lr 0.1 --set betas=0.9,0.95` as the keyword arguments of a rule.

    Values are numbers, true, false, none or words; commas make a tuple, braces a dict.
    """
    parsed: dict[str, Any] = {} if lr is None else {"lr": lr}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not key.isidentifier() or not text:
            raise LabError(f"--set {setting} must be NAME=VALUE, as in --set betas=0.9,0.95.")
        if key in parsed:
            raise LabError(f"'{key}' is given twice; give it once.")
        parsed[key] = _parse_dict(setting, text) if text.startswith("{") else _parse_value(text)
    return parsed


def _parse_value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        if "," in text:
            return tuple(_parse_value(part.strip()) for part in text.strip("()[]").split(","))
        return text
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _parse_dict(setting: str, text: str) -> dict[str, Any]:
    """`{'exp_avg': 'bf16'}`, or without the quotes, which a shell may have taken."""
    inside, pairs = text.removeprefix("{").removesuffix("}"), dict[str, Any]()
    for pair in filter(None, map(str.strip, inside.split(","))):
        name, colon, value = (part.strip() for part in pair.partition(":"))
        if not text.endswith("}") or not colon or not value:
            raise LabError(
                f"--set {setting} must be NAME={{'key': value, 'key': value}} with quotes around it."
            )
        pairs[name.strip("'\"")] = _parse_value(value)
    return pairs


def build_optimizer(
    rule: type[CheckedOptimizer], model: nn.Module, settings: Mapping[str, Any]
) -> CheckedOptimizer:
    """The rule on the model's parameters. Raises `LabError` with the rule's own message."""
    if "params" in settings:
        raise LabError(f"{rule.__name__} gets its params from the task; --set cannot change them.")
    try:
        return rule(model.named_parameters(), **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabError(str(error)) from error


def hyperparameters_of(optimizer: Optimizer) -> dict[str, Any]:
    """Every argument of the rule's constructor with the value it has now."""
    group = optimizer.param_groups[0]
    names = inspect.signature(type(optimizer)).parameters
    return {name: group[name] for name in names if name in group and name != "params"}


def build_schedule(name: str, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """The learning-rate schedule over `steps` steps; None for `none`, which keeps the rate.

    `warmup` rises over the first twentieth of the steps; `cosine` rises so, then falls to a tenth.
    """
    rising = round(WARMUP_SHARE * steps)
    if name == "none":
        return None
    if name == "warmup":
        return schedules.Warmup(optimizer, rising)
    if name == "cosine":
        return schedules.WarmupCosine(optimizer, rising, steps)
    raise LabError(f"no schedule '{name}'. {did_you_mean(name, SCHEDULES)}")
