"""Every rule by name, and what each one says about itself."""

from __future__ import annotations

import fnmatch
import inspect
import re
from dataclasses import dataclass
from typing import Any

import steprule
from steprule import errors, rule_errors
from steprule.declare import Modifier
from steprule.engine import docstrings
from steprule.engine.fields import Field
from steprule.engine.optimizer import CheckedOptimizer


@dataclass(frozen=True)
class HyperParameter:
    """One hyper-parameter, in words."""

    name: str
    type: str
    default: Any
    allowed: str
    meaning: str


@dataclass(frozen=True)
class Description:
    """What a rule's own declarations and docstring say."""

    name: str
    summary: str
    when: str
    formula: str
    state: str
    differs: str
    source: str
    hyperparameters: tuple[HyperParameter, ...]
    slots: tuple[str, ...]
    numbers_per_parameter: float


def catalogue() -> dict[str, type[CheckedOptimizer]]:
    """All rules by class name, in alphabetical order.

    >>> list(catalogue())[:3]
    ['AdaBelief', 'Adadelta', 'Adafactor']
    """
    bases = ("Elementwise", "Matrix", "GenericAdaptiveOptimizer")
    found = {
        name: value
        for name, value in vars(steprule).items()
        if inspect.isclass(value) and issubclass(value, CheckedOptimizer) and name not in bases
    }
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def modifier_catalogue() -> dict[str, type[Modifier]]:
    """All modifiers by the names that groups and `create` know them by, in alphabetical order.

    >>> list(modifier_catalogue())[:2]
    ['average', 'cautious']
    """
    found = [x for x in vars(steprule).values() if inspect.isclass(x) and issubclass(x, Modifier)]
    return {x.name: x for x in sorted(found, key=lambda x: x.name) if x is not Modifier}


def find(pattern: str = "*") -> tuple[str, ...]:
    """The names of the rules and modifiers that match a pattern with * and ?, as `create` takes them.

    >>> find("ada*")
    ('adabelief', 'adadelta', 'adafactor', 'adagrad', 'adam', 'adamax', 'adamw')
    """
    names = [*map(str.lower, catalogue()), *modifier_catalogue()]
    return tuple(fnmatch.filter(names, pattern.lower()))


def create(name: str, params: Any, **options: Any) -> CheckedOptimizer:
    """An optimizer by name, as for a configuration file: a rule, and with + the modifiers that it gets.

        create("adamw+global_norm_clip+cautious+ema", model, lr=3e-4, **{"ema.decay": 0.999})

    params: the model, or its parameters. options: hyper-parameters of the rule, and those of the modifiers
    under their names and a point.

    Raises: ValueError for an unknown name, and what the rule raises.
    """
    first, *more = (part.strip().lower() for part in name.split("+"))
    rule: Any = _rule_of(first)
    added: list[Modifier] = []
    for part in more:
        if part not in modifier_catalogue():
            raise rule_errors.no_such_modifier(part, list(modifier_catalogue()))
        prefix = f"{part}."
        own = {key.removeprefix(prefix): options.pop(key) for key in list(options) if key.startswith(prefix)}
        added.append(modifier_catalogue()[part](**own))
    return rule(params, **options, **({"modifiers": added} if added else {}))


def describe(rule: type[CheckedOptimizer] | CheckedOptimizer | str) -> Description:
    """What a rule is: its formula, hyper-parameters with ranges, state and source.

    rule: its class, an optimizer, or its name in upper or lower case.

    Raises: ValueError for an unknown name, TypeError for anything that is not a rule of this library.

    >>> describe("adamax").slots
    ('exp_avg', 'exp_inf')
    """
    rule = _rule_of(rule)
    text = docstrings.written(rule)
    summary, _, rest = text.partition("\n\n")
    defaults = {field.name: field.default for field in rule.fields.values()}
    own = [slot for slot in rule.slots.values() if slot.exists(defaults)]
    whole = [slot for slot in own if not slot.per_tensor and slot.shape is None]
    return Description(
        name=rule.__name__,
        summary=" ".join(summary.split()),
        when=_part(rest, "When"),
        formula=_formula(rest),
        state=_part(rest, "State"),
        differs=_part(rest, "Differs"),
        source=_part(rest, "Source"),
        hyperparameters=tuple(_hyperparameter(field) for field in rule.fields.values()),
        slots=tuple(slot.key for slot in rule.slots.values()),
        numbers_per_parameter=len(whole) + rule.numbers_beside_slots(defaults),
    )


def _rule_of(given: object) -> type[CheckedOptimizer]:
    if isinstance(given, str):
        by_name = {name.lower(): rule for name, rule in catalogue().items()}
        if given.strip().lower() not in by_name:
            near = errors.close(given.strip().lower(), by_name)
            raise errors.no_such_rule(given, by_name[near].__name__ if near else None, list(catalogue()))
        return by_name[given.strip().lower()]
    rule = given if inspect.isclass(given) else type(given)
    if not issubclass(rule, CheckedOptimizer):
        raise errors.no_rule(rule.__module__, rule.__qualname__)
    return rule


def _hyperparameter(field: Field) -> HyperParameter:
    return HyperParameter(field.name, field.type, field.default, field.allowed, field.meaning)


def _part(text: str, head: str) -> str:
    """The paragraph part that starts with `head:`, on one line."""
    found = re.search(rf"^{head}: (.*?)(?=\n\n|\n[A-Z][a-z]+: |\Z)", text, re.DOTALL | re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""


def _formula(text: str) -> str:
    """The first block that is indented by four."""
    found = re.search(r"(?:^    .*\n?)+", text, re.MULTILINE)
    return inspect.cleandoc(found.group(0)) if found else ""
