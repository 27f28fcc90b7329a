"""Who takes part in a race: names, defaults and ranges from what the command line says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steprule.engine.fields import Field
from steprule.engine.optimizer import CheckedOptimizer
from steprule.lab.errors import LabError, did_you_mean
from steprule.lab.optimizer_classes import (
    find_rule,
    optimizer_class,
    optimizer_label,
    optimizer_modifiers,
    optimizer_name,
    preset_settings,
    usual_settings,
)
from steprule.lab.racing.folder import Range
from steprule.lab.racing.search import rounded

__all__ = ["Entrant", "entrants", "parse_search"]

# Where no rule says where to look for lr: from a tenth of the default to a hundred times as much.
BELOW, ABOVE = 10, 100
ONE_MINUS_FROM = 0.5


@dataclass(frozen=True)
class Entrant:
    """An optimizer that was named for a race; see `Contestant`."""

    name: str
    label: str
    optimizer: str
    fixed: Mapping[str, Any]
    default: Mapping[str, float]
    ranges: Mapping[str, Range]


def entrants(given: Sequence[str], tuned: Sequence[str], search: Sequence[str]) -> list[Entrant]:
    """The optimizers with these names, and where to look for the tuned hyper-parameters that they have.

    search: ranges as in `parse_search`. Raises `LabError` for names, hyper-parameters and ranges that do not
    exist.
    """
    names = [optimizer_name(one) for one in given]
    fixed = [preset_settings(one) for one in given]
    for i, pair in enumerate(pairs := [*zip(names, fixed, strict=True)]):
        if pair in pairs[:i]:
            raise LabError(f"{optimizer_label(names[i])} is named twice; name each optimizer once.")
    labels = [optimizer_label(name) for name in names]
    labels = [one if labels.count(one) == 1 else given[i] for i, one in enumerate(labels)]
    short = [_file_name(label) for label in labels]
    short = [f"{one}-{short[:i].count(one) + 1}" if one in short[:i] else one for i, one in enumerate(short)]
    asked = parse_search(search, short)
    found = [
        _entrant(names[i], short[i], labels[i], fixed[i], tuned, asked[short[i]]) for i in range(len(given))
    ]
    for key in tuned:
        if not any(key in one.ranges for one in found):
            usual = [usual_settings(one.optimizer) for one in found]
            known = {name for one in usual for name, value in one.items() if _is_number(value)}
            who = f"{found[0].label} has no" if len(found) == 1 else "none of the optimizers has a"
            raise LabError(f"{who} number '{key}' to tune. {did_you_mean(key, sorted(known))}")
    return found


def _file_name(label: str) -> str:
    return re.sub(r"[^a-z0-9+_-]", "-", label.lower().replace("torch.optim.", "torch-"))


def parse_search(search: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Range]]:
    """`adamw.lr=1e-4..0.1` as ranges by optimizer and hyper-parameter.

    Without an optimizer's name it is for all.
    """
    found: dict[str, dict[str, Range]] = {name: {} for name in names}
    for text in search:
        key, equals, bounds = (part.strip() for part in text.partition("="))
        low, dots, high = bounds.partition("..")
        try:
            ends = float(low), float(high)
        except ValueError:
            ends = 0.0, 0.0
        if not (key and equals and dots and 0 < ends[0] < ends[1] < float("inf")):
            raise LabError(
                f"--search {text} must be NAME=LOW..HIGH with numbers above 0, as in "
                f"--search {names[0]}.lr=1e-4..0.1."
            )
        # The longest name first: a name may be the beginning of another one.
        whose = next(
            (name for name in sorted(names, key=len, reverse=True) if key.startswith(f"{name}.")), None
        )
        for name in names if whose is None else [whose]:
            found[name][key if whose is None else key[len(whose) + 1 :]] = _range(*ends)
    return found


def _range(low: float, high: float) -> Range:
    return Range(low, high, "one_minus" if low >= ONE_MINUS_FROM and high < 1 else "log")


def _entrant(
    name: str,
    short: str,
    label: str,
    fixed: Mapping[str, Any],
    tuned: Sequence[str],
    asked: Mapping[str, Range],
) -> Entrant:
    usual = usual_settings(name) | dict(fixed)
    unknown = [key for key in asked if key not in tuned]
    if unknown:
        more = ",".join([*tuned, unknown[0]])
        raise LabError(f"--search names '{unknown[0]}', which is not tuned. Add it: --tune {more}.")
    ranges: dict[str, Range] = {}
    for key in tuned:
        if key not in usual or not _is_number(usual[key]):
            continue
        where = asked.get(key) or _declared(name, key, float(usual[key]))
        if where is None:
            raise LabError(
                f"{label} does not say where to look for {key}. Give --search {short}.{key}=LOW..HIGH."
            )
        ranges[key] = where
    default = {key: float(usual[key]) for key in ranges}
    return Entrant(short, label, name, {k: v for k, v in fixed.items() if k not in ranges}, default, ranges)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _declared(name: str, key: str, default: float) -> Range | None:
    """The range that a rule declares, or its namesake if it is one of torch's, or one around the default."""
    make = optimizer_class(name)
    fields: dict[str, Field] = dict(make.fields) if issubclass(make, CheckedOptimizer) else {}
    if name.startswith("torch:"):
        try:
            fields = dict(find_rule(make.__name__).fields)
        except LabError:  # a rule of torch's that is newer than ours
            fields = {}
    for modifier in optimizer_modifiers(name):
        fields |= {f"{modifier.name}.{field.name}": field for field in modifier.fields.values()}
    search = fields[key].search if key in fields else None
    if search is not None:
        return _range(*search)
    return Range(rounded(default / BELOW), rounded(default * ABOVE)) if key == "lr" and default > 0 else None
