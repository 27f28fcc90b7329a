"""One step of a rule: maximize, weight decay, `update`. Every runner runs exactly this code."""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, cast

from steprule import rule_errors, words
from steprule.engine.fields import Field, Slot
from steprule.words import Becomes, Condition, Machine, Number, Parameter, Symbol, finest

Update = Callable[[Any, Any, Any, Any, Any], Any]
DECAYS: dict[str, Callable[..., Any]] = {}


def decay(place: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a kind of weight decay; place is what it changes, 'gradient' or 'parameter'."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        DECAYS[function.__name__] = function
        PLACES[function.__name__] = place
        return function

    return register


PLACES: dict[str, str] = {}


@dataclass(frozen=True)
class Added:
    """What a group adds to its rule; together with static options, this determines the program."""

    maximize: bool = False
    decay: str | None = None
    decays_first: bool = True


class Hyper:
    """`h` inside `update`: the hyper-parameters of the group, by name."""

    __slots__ = ("_fields", "_rule", "_values")
    _fields: Mapping[str, Field]
    _rule: str
    _values: Mapping[str, Any]

    def __init__(self, rule: str, fields: Mapping[str, Field], values: Mapping[str, Any]):
        object.__setattr__(self, "_rule", rule)
        object.__setattr__(self, "_fields", fields)
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise rule_errors.no_such_hyperparameter_in_rule(self._rule, name, self._fields) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise rule_errors.hyperparameter_assigned(self._rule, name)

    def without_own_decay(self) -> Hyper:
        """The same where the group does not decay in the rule's own way: `update` then sees a decay of 0."""
        declared = self._fields.get("weight_decay")
        if declared is None or declared.decay != "own":
            return self
        return Hyper(self._rule, self._fields, {**self._values, "weight_decay": 0.0})


class Slots:
    """`s` inside `update`: reading gives the slot's value, assigning sets what is stored."""

    __slots__ = ("_declared", "_machine", "_plain", "_shape", "numbers", "written")
    _declared: Mapping[str, Slot]
    _machine: Machine
    _plain: set[str]
    _shape: tuple[int, ...] | None
    numbers: dict[str, Any]
    written: set[str]

    def __init__(
        self,
        machine: Machine,
        declared: Mapping[str, Slot],
        numbers: dict[str, Any],
        shape: tuple[int, ...] | None = None,
    ):
        object.__setattr__(self, "_machine", machine)
        object.__setattr__(self, "_declared", declared)
        object.__setattr__(self, "_plain", {x for x, v in numbers.items() if not isinstance(v, Number)})
        object.__setattr__(self, "_shape", shape)
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "written", set())

    def _check(self, letter: str) -> None:
        slot = self._declared.get(letter)
        if slot is None:
            raise rule_errors.no_such_slot(self._machine.rule, letter, self._declared)
        if letter not in self.numbers and slot.shape is not None and self._shape is not None:
            raise rule_errors.slot_without_shape(self._machine.rule, letter, self._shape)
        if letter not in self.numbers:
            raise rule_errors.slot_switched_off(self._machine.rule, letter, slot.when or slot.key)

    def __getattr__(self, letter: str) -> Any:
        if letter not in self.numbers:
            self._check(letter)
        return self.numbers[letter]

    def __setattr__(self, letter: str, value: Any) -> None:
        self._check(letter)
        if not isinstance(value, Number):
            value = self._machine.plain(value)
            per = self._declared[letter].per
            if isinstance(value, Symbol) and finest((per, value.level)) != per:
                raise rule_errors.finer_than_slot(self._machine.rule, letter, per, value.level)
        elif letter in self._plain:
            raise rule_errors.plain_slot_given_a_value(self._machine.rule, letter)
        elif self._declared[letter].per == "element":
            value = Number(self._machine, value.handle)
        self.numbers[letter] = value
        self.written.add(letter)


def one_step(update: Update, added: Added, h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
    """The parameter after one step; the slots are set in `s`."""
    who = f"{p.machine.rule}.update"
    before = p
    if added.maximize:
        g = -g
    if added.decay not in (None, "own"):
        if PLACES[added.decay] == "gradient":
            g = DECAYS[added.decay](h, p, g)
        else:
            p = DECAYS[added.decay](h, p)
    seen = p if added.decays_first else before
    if added.decay != "own":
        h = h.without_own_decay()
    return called(who, update, lambda: _changed(p, update(h, Parameter.of(seen), g, s, t)))


def _changed(p: Number, change: Any) -> Number:
    """The parameter after what `update` returned."""
    rule = p.machine.rule
    if isinstance(change, Becomes):
        value = change.value
        return value if isinstance(value, Number) else words.where(p.machine.plain(True), value, p)
    if change is None:
        raise rule_errors.nothing_returned(rule)
    parts = cast(tuple[Any, ...], change if isinstance(change, tuple) else (change,))
    if not parts:
        raise rule_errors.wrong_return(rule, (), True)
    for part in parts:
        if isinstance(part, Parameter):
            raise rule_errors.parameter_returned(rule)
        if isinstance(part, Condition):
            raise rule_errors.wrong_return(rule, True, isinstance(change, tuple))
        if not isinstance(part, Number):
            _check_plain_change(p, part, isinstance(change, tuple))
        p = p + part
    return p


def _check_plain_change(p: Number, part: Any, in_tuple: bool) -> None:
    if isinstance(part, bool) or (isinstance(part, Symbol) and part.truth):
        raise rule_errors.wrong_return(p.machine.rule, part, in_tuple)
    try:
        p.machine.plain(part)
    except TypeError:
        raise rule_errors.wrong_return(p.machine.rule, part, in_tuple) from None


# Errors in what the writer of a rule wrote


def called(who: str, written: Any, call: Callable[[], Any]) -> Any:
    """Call a method that the writer of a rule wrote; an error then names the rule and the line.

    who: the rule and its method. written: that method.
    """
    try:
        return call()
    except Exception as error:
        name_in(error, who, written)
        raise


def name_in(error: Exception, who: str, written: Any) -> None:
    """Make an error say in which rule and on which line it was raised, and what to write instead."""
    if hasattr(error, "in_rule"):
        return
    error.in_rule = who  # type: ignore[attr-defined]
    file, line = _place_of(error, written)
    given = error.args[0] if len(error.args) == 1 else None
    if isinstance(given, str):
        text = given if given.startswith(who) else _explained(who, error, given, file, line)
        error.args = (rule_errors.at_line(text, file, line) if file else text,)
    else:
        error.add_note(rule_errors.at_line(f"Raised in {who}.", file, line))


def _place_of(error: Exception, written: Any) -> tuple[str, int]:
    """Where in the method the error was raised, otherwise where the method begins."""
    code = getattr(inspect.unwrap(getattr(written, "func", written)), "__code__", None)
    if code is None:
        return "", 0
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code is code]
    return code.co_filename, lines[0] if lines else code.co_firstlineno


_FOREIGN_CALL = re.compile(r"\b(?:math|torch|np|numpy|F|functional|special)\.(\w+)\(")


def _explained(who: str, error: Exception, given: str, file: str, line: int) -> str:
    """The message of Python, torch or the writer's own code, with the rule and what to write instead."""
    problem = given.partition("\n")[0].partition(", but expected one of")[0]
    if isinstance(error, KeyError):
        problem = f"there is no key '{given}'"
    way_out = [text for name, text in rule_errors.VALUES.items() if re.search(rf"\b{name}\b", problem)]
    if re.search(r"\b(Number|Symbol)\b", problem):
        linecache.checkcache(file)
        found = _FOREIGN_CALL.findall(linecache.getline(file, line))
        instead = [rule_errors.instead_of(name, words.__all__) for name in found]
        instead += [rule_errors.conditions()] if re.search(r"for (unary )?[&|~]", problem) else []
        way_out.append(" ".join(filter(None, instead)) or rule_errors.language(words.__all__))
    return rule_errors.raised_in_rule(who, problem, " ".join(way_out))
