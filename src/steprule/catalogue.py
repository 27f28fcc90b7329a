"""Every rule by name, and what each one says about itself."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import steprule
from steprule import errors, rule_errors
from steprule.declare import Modifier
from steprule.engine import docstrings
from steprule.engine.fields import Field
from steprule.engine.optimizer import CheckedOptimizer


@dataclass(frozen=True)
class HyperParameter:
    """One hyper-parameter, in words.

    search: where `steprule race` and `tune` look for it.
    """

    name: str
    type: str
    default: Any
    allowed: str
    meaning: str
    search: tuple[float, float] | None = None


@dataclass(frozen=True)
class Description:
    """What the declarations and the docstring of a rule or a modifier say."""

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


@dataclass(frozen=True)
class Preset:
    """A rule with modifiers and values that is known under a name of its own.

    rule, modifiers: by name. options: what `create` would be given. text: as the docstring of a rule.
    """

    rule: str
    modifiers: tuple[str, ...]
    options: Mapping[str, Any]
    text: str


PRESETS = {
    "ranger": Preset(
        rule="radam",
        modifiers=("lookahead",),
        options={
            "betas": (0.95, 0.999),
            "eps": 1e-5,
            "decoupled_weight_decay": True,
            "lookahead.every": 6,
            "lookahead.step_back": 0.5,
        },
        text="""RAdam that after every six steps goes back half of the way.

        When: image models without a warm-up. The lr stays as it is for most of the training, then falls to 0.

        State: 3 values per element (exp_avg, exp_avg_sq, lookahead.slow), 1 per tensor (lookahead.steps).
        Differs: this is the first Ranger, 9.3.19, as in pytorch-ranger. Ranger2020 also centralizes the
        gradients, and Ranger21 is another rule.
        Source: Wright 2019, https://github.com/lessw2020/Ranger-Deep-Learning-Optimizer
        """,
    )
}


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

    >>> [name for name in modifier_catalogue() if name.endswith("norm_clip")]
    ['global_norm_clip', 'norm_clip']
    """
    found = [x for x in vars(steprule).values() if inspect.isclass(x) and issubclass(x, Modifier)]
    return {x.name: x for x in sorted(found, key=lambda x: x.name) if x is not Modifier}


def find(pattern: str = "*") -> tuple[str, ...]:
    """The names of the rules, presets and modifiers that match a pattern with * and ?, as `create` takes them.

    >>> find("*sgd*")
    ('asgd', 'schedulefreesgd', 'sgd', 'sgdp')
    """
    names = [*map(str.lower, catalogue()), *PRESETS, *modifier_catalogue()]
    return tuple(fnmatch.filter(names, pattern.lower()))


def create(name: str, params: Any, **options: Any) -> CheckedOptimizer:
    """An optimizer by name, as for a configuration file: a rule, and with + the modifiers that it gets.

        create("adamw+global_norm_clip+cautious+ema", model, lr=3e-4, **{"ema.decay": 0.999})

    name: in upper or lower case; "ranger" stands for a rule, modifiers and values, to which more can be added.
    params: the model, or its parameters. options: hyper-parameters of the rule, and those of the modifiers
    under their names and a point.

    Raises: ValueError for an unknown name or an option of a modifier that is not in it, and what the rule
    raises.
    """
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise rule_errors.create_without_name(name)
    first, *more = (part.strip() for part in name.split("+"))
    first, more, values = written_out(first, more)
    options = values | options
    rule: Any = _rule_of(first)
    kinds = modifiers_named(more)
    if kinds and "modifiers" not in rule.fields:
        raise rule_errors.takes_no_modifiers(rule.__name__)
    added, own = with_values(kinds, options, name, rule.fields)
    given = own.pop("modifiers", None)
    added += given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return rule(params, **own, **({"modifiers": added} if added else {}))


def written_out(first: str, more: Sequence[str]) -> tuple[str, list[str], dict[str, Any]]:
    """The rule, the modifiers and the values that a name stands for; its first part may be a preset."""
    preset = PRESETS.get(first.strip().lower())
    if preset is None:
        return first, list(more), {}
    return preset.rule, [*preset.modifiers, *more], dict(preset.options)


def modifiers_named(names: Sequence[str]) -> list[type[Modifier]]:
    """The modifiers with these names, in upper or lower case, with or without underscores.

    Raises: ValueError for a name that no modifier has.
    """
    known = modifier_catalogue()
    alike = {_letters(name): modifier for name, modifier in known.items()}
    for name in names:
        if not name.strip():
            raise rule_errors.empty_part_of_name()
        if _letters(name) not in alike:
            is_rule = any(_letters(name) == rule.lower() for rule in (*catalogue(), *PRESETS))
            raise rule_errors.no_such_modifier(name, list(known), is_rule)
    return [alike[_letters(name)] for name in names]


def _letters(name: str) -> str:
    return name.strip().lower().replace("_", "")


def with_values(
    kinds: Sequence[type[Modifier]], options: Mapping[str, Any], name: str, of_rule: Collection[str]
) -> tuple[list[Modifier], dict[str, Any]]:
    """The modifiers with those of the options that are theirs, such as "ema.decay", and the other options.

    name: what was asked for, for messages. of_rule: the options of the rule. Raises: ValueError for an option
    of another modifier or without its modifier's name, and what the modifiers raise.
    """
    own: dict[str, dict[str, Any]] = {kind.name: {} for kind in kinds}
    rest: dict[str, Any] = {}
    for key, value in options.items():
        prefix, point, field = key.partition(".")
        its_own = [f"{kind.name}.{key}" for kind in kinds if key in kind.fields]
        if its_own and key not in of_rule:
            raise rule_errors.option_without_its_modifier(key, its_own[0])
        if not point:
            rest[key] = value
        elif prefix.lower() in own:
            own[prefix.lower()][field] = value
        else:
            raise rule_errors.option_of_no_modifier(key, name, list(modifier_catalogue()))
    return [kind(**own[kind.name]) for kind in kinds], rest


def describe(
    rule: type[CheckedOptimizer] | CheckedOptimizer | type[Modifier] | Modifier | str,
) -> Description:
    """What a rule, a preset or a modifier is: its formula, hyper-parameters with ranges, state and source.

    rule: its class, an optimizer or a modifier, or its name in upper or lower case.

    Raises: ValueError for an unknown name, TypeError for anything that is neither.

    >>> describe("adamax").slots
    ('exp_avg', 'exp_inf')
    >>> describe("ema").slots
    ('ema.average', 'ema.steps')
    """
    if isinstance(rule, str) and rule.strip().lower() in PRESETS:
        return _of_preset(rule.strip().lower())
    kind = _modifier_of(rule)
    return _of_rule(_rule_of(rule)) if kind is None else _of_modifier(kind)


def _of_preset(name: str) -> Description:
    preset = PRESETS[name]
    names = (preset.rule, *preset.modifiers)
    parts = [describe(part) for part in names]
    known = {hyper.name: hyper for hyper in parts[0].hyperparameters}
    for key, about in zip(preset.modifiers, parts[1:], strict=True):
        known |= {f"{key}.{x.name}": replace(x, name=f"{key}.{x.name}") for x in about.hyperparameters}
    known |= {key: replace(known[key], default=value) for key, value in preset.options.items()}
    values = [f"{key}={value}" for key, value in preset.options.items()]
    return Description(
        name=name,
        **_parts_of(inspect.cleandoc(preset.text)) | {"formula": ", ".join(["+".join(names), *values])},
        hyperparameters=tuple(known.values()),
        slots=tuple(slot for about in parts for slot in about.slots),
        numbers_per_parameter=sum(about.numbers_per_parameter for about in parts),
    )


def _of_modifier(modifier: type[Modifier]) -> Description:
    per_element = [slot for slot in modifier.slots.values() if slot.per == "element"]
    return Description(
        name=modifier.__name__,
        **_parts_of(docstrings.written(modifier)),
        hyperparameters=tuple(_hyperparameter(field) for field in modifier.fields.values()),
        slots=tuple(f"{modifier.name}.{slot.key}" for slot in modifier.slots.values()),
        numbers_per_parameter=len(per_element),
    )


def _of_rule(rule: type[CheckedOptimizer]) -> Description:
    defaults = {field.name: field.default for field in rule.fields.values()}
    own = [slot for slot in rule.slots.values() if slot.exists(defaults)]
    whole = [x for x in own if x.per == "element" and x.fits(matrix=True)]
    return Description(
        name=rule.__name__,
        **_parts_of(docstrings.written(rule)),
        hyperparameters=tuple(_hyperparameter(field) for field in rule.fields.values()),
        slots=tuple(slot.key for slot in rule.slots.values()),
        numbers_per_parameter=len(whole) + rule.numbers_beside_slots(defaults),
    )


def _parts_of(text: str) -> dict[str, str]:
    """What a docstring says, by the attributes of a `Description`."""
    summary, _, rest = text.partition("\n\n")
    parts = {name: _part(rest, name.title()) for name in ("when", "state", "differs", "source")}
    return {"summary": " ".join(summary.split()), "formula": _formula(rest), **parts}


def _modifier_of(given: object) -> type[Modifier] | None:
    """The modifier that is meant, if one is."""
    if isinstance(given, str):
        return {_letters(name): kind for name, kind in modifier_catalogue().items()}.get(_letters(given))
    kind = given if inspect.isclass(given) else type(given)
    return kind if issubclass(kind, Modifier) else None


def _rule_of(given: object) -> type[CheckedOptimizer]:
    if isinstance(given, str):
        by_name = {name.lower(): rule for name, rule in catalogue().items()}
        modifier = _modifier_of(given)
        if modifier is not None:
            raise rule_errors.modifier_comes_first(modifier.name)
        if given.strip().lower() not in by_name:
            names = {name: rule.__name__ for name, rule in by_name.items()} | {name: name for name in PRESETS}
            near = errors.close(given.strip().lower(), names)
            raise errors.no_such_rule(given, names[near] if near else None, list(names.values()))
        return by_name[given.strip().lower()]
    rule = given if inspect.isclass(given) else type(given)
    if not issubclass(rule, CheckedOptimizer):
        raise errors.no_rule(rule.__module__, rule.__qualname__)
    return rule


def _hyperparameter(field: Field) -> HyperParameter:
    return HyperParameter(field.name, field.type, field.default, field.allowed, field.meaning, field.search)


def _part(text: str, head: str) -> str:
    """The paragraph part that starts with `head:`, on one line."""
    found = re.search(rf"^{head}: (.*?)(?=\n\n|\n[A-Z][a-z]+: |\Z)", text, re.DOTALL | re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""


def _formula(text: str) -> str:
    """The first block that is indented by four."""
    found = re.search(r"(?:^    .*\n?)+", text, re.MULTILINE)
    return inspect.cleandoc(found.group(0)) if found else ""
