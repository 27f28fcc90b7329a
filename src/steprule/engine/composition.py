"""What a group steps with: a rule and all that the group adds to it, put together into one step.

Everything that needs fields, slots or the step of a group asks its composition for them: runners, storage,
checkpoints and reports. A modifier adds one of these to the step of any rule, in this order:

| place     | method                          | returns                                            |
|-----------|---------------------------------|----------------------------------------------------|
| gradient  | `gradient(h, p, g, s, t)`       | the gradient that the rule sees                    |
| change    | `change(h, p, g, u, s, t)`      | the change, where the rule's own is u              |
| parameter | `parameter(h, p, u, s, t)`      | the parameter to which the change is added         |
| apply     | `apply(h, p, new, s, t)`        | the new parameter, where p is the old one          |

Modifiers of one place run in the order in which they were given. Weight decay is a modifier, too: of the
gradient, after all others, or of the parameter.

`estimate` of a rule is a step of its own, between those of `update`: it changes only slots, and modifiers and
weight decay have no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, cast

from steprule import rule_errors, words
from steprule.engine.fields import Field, Slot
from steprule.engine.written import called
from steprule.levels import SIDES, finest
from steprule.values import Becomes, Condition, Machine, Number, Parameter, Symbol

Update = Callable[[Any, Any, Any, Any, Any], Any]
# What modifiers call weight decay among the things that they do not go with.
DECAY = "weight_decay"
# The hyper-parameter of rules and modifiers that draw random numbers.
SEED = "seed"
PLACES = ("gradient", "change", "parameter", "apply")
# For the kinds of weight decay that are relative to it.
PEAK_LR = Field(0.0, name="peak_lr", at_least=0, meaning="the lr that the group was made with")


class Composition:
    """A rule with the modifiers, the weight decay and the options of a group. `composed` makes them.

    update: the rule's own, or its `estimate`. modifiers: classes, without the weight decay. decay: the class of
    the weight decay, or None. numbers: further numbers in `h`, which who asks for an estimate puts into groups.
    """

    def __init__(
        self,
        rule: Any,
        update: Update,
        modifiers: tuple[Any, ...],
        maximize: bool,
        decay: Any,
        numbers: tuple[str, ...],
    ):
        self.rule = rule
        self.update = update
        self.modifiers = modifiers
        self.maximize = maximize
        self.decay = decay
        self.numbers = numbers
        self.estimates = update is getattr(rule, "estimate", None)
        # The traced steps, by the options that decide them.
        self.programs: dict[Any, Any] = {}

    @cached_property
    def name(self) -> str:
        """The rule's name, and those of the modifiers; of an estimate the rule's and the method's."""
        return self.method if self.estimates else "+".join(x.__name__ for x in (self.rule, *self.modifiers))

    @cached_property
    def method(self) -> str:
        """The rule and its method, as messages name them."""
        return f"{self.rule.__name__}.{'estimate' if self.estimates else 'update'}"

    @cached_property
    def fields(self) -> dict[str, Field]:
        """All hyper-parameters, by their keys in the group."""
        of_decay = {PEAK_LR.name: PEAK_LR} if self.decay is not None and self.decay.remembers_lr else {}
        of_caller = {name: Field(0.0, name=name) for name in self.numbers}
        return {**self.rule.fields, **of_decay, **of_caller} | {
            f"{modifier.name}.{name}": field.named(f"{modifier.name}.{name}", field.type)
            for modifier in self.modifiers
            for name, field in modifier.fields.items()
        }

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """All slots, by letter; the letters and keys of a modifier begin with its name."""
        return dict(self.rule.slots) | {
            f"{modifier.name}_{letter}": _own(modifier, slot)
            for modifier in self.modifiers
            for letter, slot in modifier.slots.items()
        }

    @cached_property
    def seeds(self) -> dict[str, str]:
        """The keys of the seeds, by the names of the rule and the modifiers that draw random numbers."""
        own = {self.rule.__name__: SEED} if SEED in self.rule.fields else {}
        return own | {x.__name__: f"{x.name}.{SEED}" for x in self.modifiers if SEED in x.fields}

    @cached_property
    def shares_all(self) -> bool:
        """Whether it has slots for all parameters together."""
        return any(slot.per == "all" for slot in self.slots.values())

    @cached_property
    def evaluates(self) -> bool:
        """Whether it has other weights to evaluate with than those that it trains."""
        return any(hasattr(x, "evaluate") for x in (self.rule, *self.modifiers))

    def at(self, place: str) -> tuple[Any, ...]:
        """The modifiers that have this method, in order; without the weight decay."""
        return tuple(x for x in self.modifiers if hasattr(x, place))

    def places(self, group: Mapping[str, Any]) -> str:
        """What the modifiers do in this group, place by place in the order in which they run."""
        found: list[str] = []
        for place in PLACES:
            entries: list[str] = []
            for modifier in self.at(place):
                values = [f"{name} {group[f'{modifier.name}.{name}']}" for name in modifier.fields]
                keys = [f"{modifier.name}.{slot.key}" for slot in modifier.slots.values()]
                values += [f"keeps {', '.join(keys)}"] if keys else []
                entries.append(f"{modifier.name} ({'; '.join(values)})" if values else modifier.name)
            found += [f"{place}: {', '.join(entries)}"] if entries else []
        return " · ".join(found)

    def counts(self, group: Mapping[str, Any]) -> bool:
        """Whether the step needs to know how many steps a parameter has taken."""
        given = self.rule.counts_steps
        counted = bool(group[given]) if isinstance(given, str) else given
        return counted or any(x.counts_steps for x in self.modifiers)


@cache
def composed(
    rule: Any,
    update: Update,
    modifiers: tuple[Any, ...] = (),
    maximize: bool = False,
    decay: Any | None = None,
    numbers: tuple[str, ...] = (),
) -> Composition:
    """The composition of these; always the same object.

    Raises: ValueError for a modifier that does not go with weight decay, and for a kind of decay that does not
    go with the rule.
    """
    for modifier in modifiers if decay else ():
        if DECAY in modifier.not_with:
            raise rule_errors.not_together(
                rule.__name__, modifier.__name__, "weight decay", modifier.not_with[DECAY], None
            )
    if decay is not None and hasattr(decay, "parameter") and (reason := rule.fields[DECAY].not_decoupled):
        raise rule_errors.decay_beside_the_step(rule.__name__, decay.mode, reason)
    return Composition(rule, update, modifiers, maximize, decay, numbers)


def _own(modifier: Any, slot: Slot) -> Slot:
    """A modifier's slot, under the keys that it has in the state and in groups."""

    def full(key: Any) -> Any:
        return f"{modifier.name}.{key}" if isinstance(key, str) else key

    return replace(
        slot,
        key=full(slot.key),
        letter=f"{modifier.name}_{slot.letter}",
        when=full(slot.when),
        up_to=full(slot.up_to),
        starts=full(slot.starts),
        subtracted_from=full(slot.subtracted_from),
    )


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


def _without_own_decay(h: Hyper) -> Hyper:
    """`h` where the group does not decay in the rule's own way: `update` then sees a decay of 0."""
    fields: Mapping[str, Field] = object.__getattribute__(h, "_fields")
    declared = fields.get("weight_decay")
    if declared is None or declared.decay != "own":
        return h
    values: Mapping[str, Any] = object.__getattribute__(h, "_values")
    return Hyper(object.__getattribute__(h, "_rule"), fields, {**values, "weight_decay": 0.0})


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
        if letter not in self.numbers and slot.only is not None:
            raise rule_errors.slot_of_others(self._machine.rule, letter, slot.only)
        if letter not in self.numbers and slot.up_to is not None and slot.when is None:
            raise rule_errors.slot_too_long(self._machine.rule, letter, slot.up_to)
        if letter not in self.numbers:
            raise rule_errors.slot_switched_off(self._machine.rule, letter, slot.when or slot.key)

    def __getattr__(self, letter: str) -> Any:
        if letter not in self.numbers:
            self._check(letter)
        return self.numbers[letter]

    def __setattr__(self, letter: str, value: Any) -> None:
        self._check(letter)
        per = self._declared[letter].per
        if not isinstance(value, Number):
            value = self._machine.plain(value)
            level = value.level if isinstance(value, Symbol) else "all"
        else:
            level = value.level
            if letter in self._plain and level == "element":
                raise rule_errors.plain_slot_given_a_value(self._machine.rule, letter)
            if letter not in self._plain and per == "tensor":
                level = per  # on a tape
            else:
                value = Number(self._machine, value.handle)
        if (per != level and {per, level} <= SIDES.keys()) or finest((per, level)) != per:
            raise rule_errors.finer_than_slot(self._machine.rule, letter, per, level)
        self.numbers[letter] = value
        self.written.add(letter)


def _hyper_of(modifier: Any, h: Hyper) -> Hyper:
    """`h` as a modifier sees it: its own hyper-parameters, then those of the rule."""
    if not modifier.name:
        return h
    values: Mapping[str, Any] = object.__getattribute__(h, "_values")
    fields: Mapping[str, Field] = object.__getattribute__(h, "_fields")
    own = {name: values[f"{modifier.name}.{name}"] for name in modifier.fields}
    return Hyper(modifier.__name__, {**fields, **modifier.fields}, {**values, **own})


class _SlotsOf:
    """`s` as a modifier sees it: its own slots, under their own letters."""

    __slots__ = ("_modifier", "_whole")

    def __init__(self, modifier: Any, whole: Any):
        object.__setattr__(self, "_modifier", modifier)
        object.__setattr__(self, "_whole", whole)

    def _letter(self, letter: str) -> str:
        modifier: Any = object.__getattribute__(self, "_modifier")
        if letter not in modifier.slots:
            raise rule_errors.no_such_slot(modifier.__name__, letter, modifier.slots)
        return f"{modifier.name}_{letter}"

    def __getattr__(self, letter: str) -> Any:
        return getattr(object.__getattribute__(self, "_whole"), self._letter(letter))

    def __setattr__(self, letter: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_whole"), self._letter(letter), value)


def one_step(whole: Composition, h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
    """The parameter after one step; the slots are set in `s`."""
    with words.step_by(p.machine):
        if whole.estimates:
            _estimate(whole, h, p, g, s, t)
            return p
        return _one_step(whole, h, p, g, s, t)


def _one_step(whole: Composition, h: Any, p: Number, g: Number, s: Any, t: Any) -> Number:
    before, decay, rule = p, whole.decay, whole.rule
    if whole.maximize:
        g = -g

    def asked(modifier: Any, place: str, *values: Any) -> Number:
        return _asked(modifier, place, p.machine, h, s, t, *values)

    for modifier in whole.at("gradient"):
        g = asked(modifier, "gradient", p, g)
    if hasattr(decay, "gradient"):
        g = asked(decay, "gradient", p, g)
    parameter = [*([decay] if hasattr(decay, "parameter") else []), *whole.at("parameter")]
    late = [modifier for modifier in parameter if modifier.sees_change]
    for modifier in parameter:
        if modifier not in late:
            p = asked(modifier, "parameter", p, None)
    seen = p if rule.decays_first else before
    of_rule = h if getattr(decay, "mode", None) == "own" else _without_own_decay(h)
    changed = called(
        f"{rule.__name__}.update", whole.update, lambda: whole.update(of_rule, Parameter.of(seen), g, s, t)
    )
    changes = whole.at("change")
    if changes or late:
        u = called(f"{rule.__name__}.update", whole.update, lambda: _one_change(whole, p, changed))
        for modifier in changes:
            u = asked(modifier, "change", before, g, u)
        for modifier in late:
            p = asked(modifier, "parameter", p, u)
        changed = u
    new = called(f"{rule.__name__}.update", whole.update, lambda: _changed(p, changed))
    for modifier in whole.at("apply"):
        new = asked(modifier, "apply", before, new)
    return new


def _estimate(whole: Composition, h: Any, p: Number, d: Number, s: Any, t: Any) -> None:
    """Have the rule take a curvature into its slots."""

    def call() -> None:
        result = whole.update(h, Parameter.of(p), d, s, t)
        if result is not None:
            raise rule_errors.estimate_returned(whole.method)

    called(whole.method, whole.update, call)


def weights(whole: Composition, h: Any, p: Number, s: Any, t: Any) -> Number:
    """The weights to evaluate with."""
    for modifier in whole.at("evaluate"):
        return _asked(modifier, "evaluate", p.machine, h, s, t, p)
    rule = whole.rule
    return called(f"{rule.__name__}.evaluate", rule.evaluate, lambda: rule.evaluate(h, p, s, t))


def _asked(modifier: Any, place: str, machine: Any, h: Any, s: Any, t: Any, *values: Any) -> Number:
    """What a modifier makes of these values at its place."""
    method, owner = getattr(modifier, place), (machine.rule, machine.stacked)
    own = s if not modifier.name else _SlotsOf(modifier, s)
    machine.rule = modifier.__name__
    machine.stacked = machine.on_matrices or modifier.matrices == "stacked"

    def call() -> Number:
        result = method(_hyper_of(modifier, h), *values, own, t)
        if isinstance(result, Number):
            return _per_element(result, values[0])
        if isinstance(result, Symbol) or type(result) in (int, float):
            return words.where(machine.plain(True), result, values[0])
        raise rule_errors.modifier_returned(modifier.__name__, place, result)

    try:
        return called(f"{modifier.__name__}.{place}", method, call)
    finally:
        machine.rule, machine.stacked = owner


def _per_element(value: Number, like: Number) -> Number:
    """A value per row or column as one per element; any other unchanged."""
    return value if value.level == "element" else words.where(value.machine.plain(True), value, like)


def _one_change(whole: Composition, p: Number, change: Any) -> Number:
    """The change as one value, for modifiers that go on with it."""
    if isinstance(change, Becomes):
        who = next((x for x in whole.modifiers if hasattr(x, "change")), None) or whole.decay
        raise rule_errors.no_change_to_modify(whole.rule.__name__, who.__name__)
    parts = cast(tuple[Any, ...], change if isinstance(change, tuple) else (change,))
    if change is None or not parts:
        _changed(p, change)  # raises
    first, *more = parts
    for part in parts:
        _check_part(p, part, isinstance(change, tuple))
    if not isinstance(first, Number):
        first = words.where(p.machine.plain(True), first, p)
    for part in more:
        first = first + part
    return _per_element(first, p)


def _changed(p: Number, change: Any) -> Number:
    """The parameter after what `update` returned."""
    rule = p.machine.rule
    if isinstance(change, Becomes):
        value = change.value
        known = isinstance(value, Number)
        return _per_element(value, p) if known else words.where(p.machine.plain(True), value, p)
    if change is None:
        raise rule_errors.nothing_returned(rule)
    parts = cast(tuple[Any, ...], change if isinstance(change, tuple) else (change,))
    if not parts:
        raise rule_errors.wrong_return(rule, (), True)
    for part in parts:
        _check_part(p, part, isinstance(change, tuple))
        p = p + part
    return p


def _check_part(p: Number, part: Any, in_tuple: bool) -> None:
    if isinstance(part, Parameter):
        raise rule_errors.parameter_returned(p.machine.rule)
    if isinstance(part, Condition):
        raise rule_errors.wrong_return(p.machine.rule, True, in_tuple)
    if not isinstance(part, Number):
        _check_plain_change(p, part, in_tuple)


def _check_plain_change(p: Number, part: Any, in_tuple: bool) -> None:
    if isinstance(part, bool) or (isinstance(part, Symbol) and part.truth):
        raise rule_errors.wrong_return(p.machine.rule, part, in_tuple)
    try:
        p.machine.plain(part)
    except TypeError:
        raise rule_errors.wrong_return(p.machine.rule, part, in_tuple) from None
