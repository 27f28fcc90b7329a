"""Builds an optimizer and its schedule from what the command line says."""

from __future__ import annotations

import ast
import inspect
import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from steprule import schedules
from steprule.catalogue import with_values
from steprule.engine.optimizer import CheckedOptimizer
from steprule.engine.rule import RuleOptimizer
from steprule.lab.errors import LabError, did_you_mean, told
from steprule.lab.optimizer_classes import optimizer_class, optimizer_label, optimizer_modifiers

__all__ = [
    "SCHEDULES",
    "build_optimizer",
    "build_schedule",
    "check_can_be_saved",
    "hyperparameters_of",
    "parse_settings",
    "switch_weights",
]

SCHEDULES = ("none", "warmup", "cosine")
WARMUP_SHARE = 0.05
WORDS = {"true": True, "false": False, "none": None, "inf": float("inf")}


def parse_settings(lr: float | None, settings: Sequence[str]) -> dict[str, Any]:
    """`--lr 0.1 --set betas=0.9,0.95` as the keyword arguments of a rule.

    Values are numbers, true, false, none or words; commas make a tuple, braces a dict.
    """
    parsed: dict[str, Any] = {} if lr is None else {"lr": lr}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not (equals and text and all(part.isidentifier() for part in key.split("."))):
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
    """`{'exp_avg': 'bf16'}`, or without the quotes, which a shell may have removed."""
    inside, pairs = text.removeprefix("{").removesuffix("}"), dict[str, Any]()
    for pair in filter(None, map(str.strip, inside.split(","))):
        name, colon, value = (part.strip() for part in pair.partition(":"))
        if not text.endswith("}") or not colon or not value:
            raise LabError(
                f"--set {setting} must be NAME={{'key': value, 'key': value}} with quotes around it."
            )
        pairs[name.strip("'\"")] = _parse_value(value)
    return pairs


def build_optimizer(name: str, model: nn.Module, settings: Mapping[str, Any]) -> Optimizer:
    """The optimizer of the model's parameters, from its `optimizer_name`.

    Raises `LabError` with the optimizer's own message.
    """
    make, modifiers = optimizer_class(name), optimizer_modifiers(name)
    who = f"torch.optim.{make.__name__}" if make.__module__.startswith("torch.") else make.__name__
    if "params" in settings:
        raise LabError(f"{who} gets its params from the task; --set cannot change them.")
    checks_itself = issubclass(make, CheckedOptimizer)
    if modifiers and not (checks_itself and "modifiers" in make.fields):
        raise LabError(f"{who} takes no modifiers. Give the name without them.")
    if checks_itself and "modifiers" in settings:
        raise LabError("modifiers are a part of the optimizer's name, as in --optimizer adamw+ema.")
    if not checks_itself:
        _check_settings(who, make, settings)
    build: Any = make
    try:
        if checks_itself:
            added, settings = with_values(modifiers, settings, optimizer_label(name).lower(), make.fields)
            settings |= {"modifiers": added} if added else {}
        # Which parameters are hidden matrices only the model says.
        return build(model if getattr(make, "on_matrices", False) else model.named_parameters(), **settings)
    except Exception as error:  # a user's own class may fail in any way
        if checks_itself and isinstance(error, (TypeError, ValueError, RuntimeError)):
            raise LabError(str(error)) from error
        raise LabError(f"{who} cannot be created: {told(error)}.") from error


def _check_settings(who: str, make: type[Optimizer], settings: Mapping[str, Any]) -> None:
    """Compare the settings with the constructor's signature: torch's classes accept some wrong types."""
    known = inspect.signature(make).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    names = [name for name in known if name != "params"]
    for name, value in settings.items():
        if name not in names:
            raise LabError(f"{who} has no hyper-parameter '{name}'. {did_you_mean(name, names)}")
        default = known[name].default
        if not _is_like(default, value):
            raise LabError(f"{who}: {name} = {value!r}, must be {_kind_of(default)}.")


def _is_like(default: Any, value: Any) -> bool:
    """Whether the value is of the same kind as the default; no default, or None, says nothing."""
    if default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, tuple):
        defaults, values = cast("tuple[Any, ...]", default), cast("tuple[Any, ...]", value)
        same = isinstance(value, (tuple, list)) and len(values) == len(defaults)
        return same and all(map(_is_like, defaults, values))
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or not isinstance(default, (int, float))


def _kind_of(default: Any) -> str:
    if isinstance(default, tuple):
        return f"{len(cast('tuple[Any, ...]', default))} numbers, as in {default}"
    if isinstance(default, bool):
        return "True or False"
    return "a word" if isinstance(default, str) else "a number"


def hyperparameters_of(optimizer: Optimizer) -> dict[str, Any]:
    """Every argument of the optimizer's constructor with the value it has now, where JSON can hold it.

    Hyper-parameters of modifiers are under the names that `--set` has for them.
    """
    group = optimizer.param_groups[0]
    names = [*inspect.signature(type(optimizer)).parameters]
    if isinstance(optimizer, RuleOptimizer):
        names += [name for name in optimizer.composition(group).fields if "." in name]
    held = {name: group[name] for name in names if name in group and name not in ("params", "modifiers")}
    return {name: value for name, value in held.items() if _is_plain(value)}


def check_can_be_saved(optimizer: Optimizer) -> None:
    """Raise `LabError` if a checkpoint could be written but not read again."""
    held = io.BytesIO()
    try:
        torch.save(optimizer.state_dict(), held)
        torch.load(io.BytesIO(held.getvalue()), weights_only=True)
    except Exception as error:  # a user's own class may keep anything
        who = type(optimizer).__name__
        raise LabError(
            f"{who} keeps something in its state or groups that a checkpoint cannot hold. Keep tensors, "
            "numbers and strings there."
        ) from error


def switch_weights(optimizer: Optimizer, training: bool) -> None:
    """Switch to the weights for training or for evaluation, if the optimizer has both."""
    switch: Any = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, cast("Sequence[Any]", value)))
    if isinstance(value, dict):
        return all(map(_is_plain, cast("dict[Any, Any]", value).values()))
    return value is None or isinstance(value, (bool, int, float, str))


def build_schedule(name: str, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """The learning-rate schedule over `steps` steps; None for `none`, which keeps the rate.

    `warmup` rises over the first twentieth of the steps; `cosine` rises the same way, then falls to a tenth.
    """
    rising = round(WARMUP_SHARE * steps)
    if name == "none":
        return None
    if name == "warmup":
        return schedules.Warmup(optimizer, rising)
    if name == "cosine":
        return schedules.WarmupCosine(optimizer, rising, steps)
    raise LabError(f"no schedule '{name}'. {did_you_mean(name, SCHEDULES)}")
