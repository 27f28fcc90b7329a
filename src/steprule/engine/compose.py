"""One step of a rule, in order: gradient, rule, decay, apply. Every runner runs exactly this text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from steprule import errors
from steprule.engine.fields import Field, Slot
from steprule.words import Becomes, Machine, Number

Update = Callable[[Any, Any, Any, Any, Any], Any]
DECAYS: dict[str, Callable[..., Any]] = {}


def decay(place: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a way to decay weights: place is 'gradient' or 'parameter'."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        DECAYS[function.__name__] = function
        PLACES[function.__name__] = place
        return function

    return register


PLACES: dict[str, str] = {}


@dataclass(frozen=True)
class Worn:
    """What a rule wears in one group; together with its static options, this makes the program."""

    maximize: bool = False
    decay: str | None = None
    decays_first: bool = True


class Hyper:
    """`h` inside `update`: the hyper-parameters of the group, by name."""

    __slots__ = ("_fields", "_rule", "_values")

    def __init__(self, rule: str, fields: Mapping[str, Field], values: Mapping[str, Any]):
        self._rule = rule
        self._fields = fields
        self._values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise errors.no_such_hyperparameter_in_rule(self._rule, name, self._fields) from None


class Slots:
    """`s` inside `update`: reading gives the slot's number, assigning sets what is stored."""

    __slots__ = ("_declared", "_machine", "numbers", "written")
    _declared: Mapping[str, Slot]
    _machine: Machine
    numbers: dict[str, Any]
    written: set[str]

    def __init__(self, machine: Machine, declared: Mapping[str, Slot], numbers: dict[str, Any]):
        object.__setattr__(self, "_machine", machine)
        object.__setattr__(self, "_declared", declared)
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "written", set())

    def _check(self, letter: str) -> None:
        slot = self._declared.get(letter)
        if slot is None:
            raise errors.no_such_slot(self._machine.rule, letter, self._declared)
        if letter not in self.numbers:
            raise errors.slot_switched_off(self._machine.rule, letter, slot.when or slot.key)

    def __getattr__(self, letter: str) -> Any:
        if letter not in self.numbers:
            self._check(letter)
        return self.numbers[letter]

    def __setattr__(self, letter: str, value: Any) -> None:
        self._check(letter)
        if isinstance(value, Number) and not self._declared[letter].per_tensor:
            value = Number(self._machine, value.handle)
        self.numbers[letter] = value
        self.written.add(letter)


def one_step(update: Update, worn: Worn, h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
    """The parameter after one step; the slots are set in `s`."""
    before = p
    if worn.maximize:
        g = -g
    if worn.decay is not None:
        if PLACES[worn.decay] == "gradient":
            g = DECAYS[worn.decay](h, p, g)
        else:
            p = DECAYS[worn.decay](h, p)
    change: Any = update(h, p if worn.decays_first else before, g, s, t)
    if isinstance(change, Becomes):
        return change.value
    parts = cast(tuple[Number, ...], change if isinstance(change, tuple) else (change,))
    for part in parts:
        p = p + part
    return p
