"""What `--optimizer` names: a rule of ours, a class of torch.optim, or a class in a user's own file."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

import steprule
from steprule.catalogue import PRESETS, modifiers_named, written_out
from steprule.engine.optimizer import CheckedOptimizer
from steprule.lab.errors import LabError, did_you_mean
from steprule.lab.tasks import import_file

__all__ = [
    "OWN_MODULE",
    "find_rule",
    "optimizer_class",
    "optimizer_facts",
    "optimizer_label",
    "optimizer_modifiers",
    "optimizer_name",
    "preset_settings",
    "usual_settings",
]

OWN_MODULE = "steprule_own_optimizer"
TORCH = "torch:"


def find_rule(name: str) -> type[CheckedOptimizer]:
    """The rule of that name, in upper or lower case. Raises `LabError` with the nearest name."""
    rules = steprule.catalogue()
    for known, rule in rules.items():
        if known.lower() == name.lower():
            return rule
    raise LabError(f"no optimizer '{name}'. {did_you_mean(name, [*rules, *PRESETS])}")


def optimizer_name(given: str) -> str:
    """The name that means the same in every folder: `AdamW+ema`, `torch:AdamW` or `/whole/path.py:Class+ema`.

    Raises `LabError` if there is no such rule, class of torch or modifier; files are not opened.
    """
    given, added, _ = written_out(*_divided(given))
    return "+".join([_base_name(given), *(modifier.name for modifier in _modifiers(added))])


def _divided(name: str) -> tuple[str, list[str]]:
    """What is before the first + of a name, and the modifiers after it; folders may have a + in theirs."""
    file, colon, own = name.rpartition(":")
    first, *added = [own] if own.endswith(".py") else own.split("+")
    return f"{file}{colon}{first.strip()}", added


def _modifiers(names: Sequence[str]) -> list[type[steprule.Modifier]]:
    try:
        return modifiers_named(names)
    except ValueError as error:
        raise LabError(str(error)) from None


def optimizer_modifiers(name: str) -> list[type[steprule.Modifier]]:
    """The modifiers in an `optimizer_name`."""
    return _modifiers(_divided(name)[1])


def preset_settings(given: str) -> dict[str, Any]:
    """The hyper-parameters that a preset sets; none for other names."""
    return written_out(*_divided(given))[2]


def usual_settings(name: str) -> dict[str, Any]:
    """The defaults of all hyper-parameters of an `optimizer_name`, those of its modifiers included."""
    arguments = inspect.signature(optimizer_class(name)).parameters
    usual = {key: argument.default for key, argument in arguments.items()}
    for modifier in optimizer_modifiers(name):
        usual |= {f"{modifier.name}.{field.name}": field.default for field in modifier.fields.values()}
    return usual


def _base_name(given: str) -> str:
    if given.lower().startswith(TORCH):
        return TORCH + _of_torch(given[len(TORCH) :]).__name__
    file, colon, name = given.rpartition(":")
    if colon:
        return f"{Path(file).resolve()}:{name}"
    if given.endswith(".py"):
        raise LabError(f"{given} does not say which class: give {given}:CLASS.")
    try:
        return find_rule(given).__name__
    except LabError as error:
        own = "A rule of your own is given as FILE.py:CLASS, torch's as torch:CLASS."
        raise LabError(f"{error} {own}") from None


def optimizer_label(name: str) -> str:
    """An `optimizer_name` as it is shown: `AdamW`, `torch.optim.AdamW`, `Class`."""
    return name.replace(TORCH, "torch.optim.") if name.startswith(TORCH) else name.rpartition(":")[2]


def optimizer_class(name: str) -> type[Optimizer]:
    """The class that an `optimizer_name` means. Raises `LabError` if its file has no such rule."""
    name, _ = _divided(name)
    if name.startswith(TORCH):
        return _of_torch(name[len(TORCH) :])
    file, colon, own = name.rpartition(":")
    return _of_file(Path(file), own, _digest(Path(file))) if colon else find_rule(name)


def optimizer_facts(name: str) -> dict[str, str]:
    """The facts by which a later resume recognizes the file that the class came from."""
    file, colon, _ = name.rpartition(":")
    if not colon or name.startswith(TORCH):
        return {}
    return {f"optimizer {Path(file).name} sha256": _digest(Path(file))}


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""  # importing it says what is wrong


def _of_torch(name: str) -> type[Optimizer]:
    classes = {
        known: value
        for known, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    for known, value in classes.items():
        if known.lower() == name.lower():
            return value
    raise LabError(f"torch.optim has no optimizer '{name}'. {did_you_mean(name, classes)}")


@functools.cache
def _of_file(file: Path, name: str, digest: str) -> type[Optimizer]:
    """The class in a user's file, which is loaded once for each version of its content."""
    module: ModuleType = import_file(file, "an optimizer", OWN_MODULE)
    found: Any = getattr(module, name, None)
    place = f"{file.name}:{name}"
    if found is None:
        there = [key for key, value in vars(module).items() if _is_own(value, module)]
        raise LabError(f"{file.name} has no class '{name}'. {did_you_mean(name, there)}")
    if inspect.isclass(found) and issubclass(found, steprule.Modifier):
        raise LabError(
            f"{place} is a modifier, not a rule. The command line takes those of steprule, as in "
            f"adamw+cautious; use your own from Python: steprule.AdamW(model, modifiers=[{name}()])."
        )
    if not (inspect.isclass(found) and issubclass(found, Optimizer)):
        kind = "a class" if inspect.isclass(found) else f"of type {type(found).__name__}"
        raise LabError(
            f"{place} is {kind}, not a rule. Write `class {name}(steprule.Elementwise)`, or derive it from "
            "torch.optim.Optimizer."
        )
    known = {key.lower(): key for key in steprule.catalogue()}.get(name.lower())
    if known is not None:
        what = (
            "is steprule's own"
            if found is steprule.catalogue()[known]
            else "has the name of a rule of steprule"
        )
        raise LabError(f"{place} {what}. Give {known.lower()} for that rule, or rename your class.")
    if found.__module__.partition(".")[0] in ("steprule", "torch"):
        raise LabError(f"{place} is {found.__module__}.{found.__name__}, not a rule of your own.")
    return found


def _is_own(value: object, module: ModuleType) -> bool:
    return inspect.isclass(value) and issubclass(value, Optimizer) and value.__module__ == module.__name__
