"""Checks the declaration of a rule when its class is created."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any, cast

from steprule import errors, rule_errors
from steprule.engine.fields import FLAGS, OPTIONS, TAKEN_KEYS, Field, Slot, identity, parameter
from steprule.engine.rule import RuleOptimizer
from steprule.engine.storage import EXTRA_KEYS
from steprule.levels import LEVELS

ARGUMENTS = ["h", "p", "g", "s", "t"]
# The methods of a modifier and their arguments.
OF_MODIFIERS = {
    "gradient": ["h", "p", "g", "s", "t"],
    "change": ["h", "p", "g", "u", "s", "t"],
    "parameter": ["h", "p", "u", "s", "t"],
    "apply": ["h", "p", "new", "s", "t"],
    "evaluate": ["h", "p", "s", "t"],
    "climb": ["h", "p", "g", "s", "t"],
}
# Those that are part of a step, or come after one.
OF_STEPS = [name for name in OF_MODIFIERS if name != "climb"]
# The parameters that a slot may be for.
ONLY = (None, "matrices", "vectors")
# What a tensor of more than two dimensions may be seen as.
MATRICES = ("flattened", "stacked")
# In the names of Python's instructions that load local variables.
OF_VARIABLES = {"FAST", "DEREF", "CLOSURE"}
# What an optimizer has besides the attributes of its class.
_OF_INSTANCES = frozenset({"defaults", "param_groups", "params", "self", "state", "step"})


def check(rule: type[RuleOptimizer], body: Mapping[str, Any]) -> None:
    """Refuse names that collide, slots that cannot be stored and an `update` with other arguments.

    Raises: TypeError, or ValueError for a default outside its own range.
    """
    who = rule.__name__
    own = [x for x, value in body.items() if isinstance(value, (Field, Slot))]
    for name in own:
        if name in _OF_INSTANCES or name in TAKEN_KEYS or hasattr(RuleOptimizer, name):
            raise rule_errors.bad_statement(
                who, f"the name '{name}' is taken by every optimizer", "Use another one."
            )
    inherited = {name for base in rule.__mro__[1:] for name in getattr(base, "fields", ())}
    for name in (x for x in own if x in (*FLAGS, *OPTIONS) and x in inherited):
        raise rule_errors.bad_statement(
            who, f"'{name}' is an option that every rule has", "Use another name, or leave the declaration out."
        )
    clashes = set(rule.fields) & set(rule.slots)
    if clashes:
        what = f"'{min(clashes)}' is both a hyper-parameter and a slot"
        raise rule_errors.bad_statement(who, what, "Rename one of them.")
    for name in own:
        if isinstance(body[name], Field) and name not in (*FLAGS, *OPTIONS):
            _check_field(who, rule.fields[name], rule.fields)
    keys = [slot.key for slot in rule.slots.values()]
    for slot in rule.slots.values():
        _check_letter(who, slot)
        _check_key(who, slot, keys)
        _check_slot(rule, slot)
    _check_matrices(rule)
    _check_update(rule, body)


def _check_matrices(owner: Any) -> None:
    if owner.matrices not in MATRICES:
        fix = f"It must be one of {', '.join(map(repr, MATRICES))}."
        raise rule_errors.bad_statement(owner.__name__, f"matrices is {owner.matrices!r}", fix)


def _check_field(who: str, field: Field, fields: Mapping[str, Field]) -> None:
    default = field.default
    what = f"the default of '{field.name}' is {default!r}"
    if isinstance(default, list):
        raise rule_errors.bad_statement(who, what, f"Write a tuple: {tuple(default)!r}.")  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(default, str) and field.choices is None:
        raise rule_errors.bad_statement(
            who, what, f"Text needs its choices: hyper({default!r}, choices=({default!r}, …))."
        )
    try:
        field.check(who, default, None)
    except (TypeError, ValueError) as problem:
        raise rule_errors.bad_default(problem) from None
    if field.decay and field.name != "weight_decay":
        what = f"decay() is declared as '{field.name}'"
        raise rule_errors.bad_statement(who, what, "Call it weight_decay, as groups and torch do.")
    if field.decay == "decoupled" and "lr" not in fields:
        what = "decoupled weight decay needs a hyper-parameter 'lr', and there is none"
        raise rule_errors.bad_statement(who, what, "Declare lr, or use mode='l2'.")


def _check_letter(who: str, slot: Slot) -> None:
    if slot.letter in ("p", "g"):
        what = f"slot '{slot.letter}' has the name of the {'parameter' if slot.letter == 'p' else 'gradient'}"
        raise rule_errors.bad_statement(who, what, "Choose another letter.")


def _check_key(who: str, slot: Slot, keys: list[Any]) -> None:
    key: Any = slot.key
    if not isinstance(key, str) or not key:
        what = f"slot '{slot.letter}' has the key {key!r}"
        raise rule_errors.bad_statement(who, what, "Give it a name for checkpoints, as in slot('exp_avg').")
    if key == "step":
        what = f"slot '{slot.letter}' has the key 'step'"
        raise rule_errors.bad_statement(who, what, "'step' is reserved for the step count.")
    taken = (*EXTRA_KEYS, *(f"{other}_{what}" for other in keys for what in ("codes", "scale")))
    if keys.count(key) > 1 or key in taken:
        raise rule_errors.bad_statement(who, f"slot key '{key}' is taken", "Give every slot a key of its own.")
    if slot.subtracted_from is not None and slot.subtracted_from not in keys:
        what = f"slot '{slot.letter}' is subtracted from '{slot.subtracted_from}', which is not a slot's key"
        raise rule_errors.bad_statement(who, what, errors.nearest(slot.subtracted_from, keys))


def _check_slot(rule: Any, slot: Slot) -> None:
    who = rule.__name__
    for what, given, allowed in (
        ("per", slot.per, tuple(x for x in LEVELS if x not in ("matrix", "transposed"))),
        ("only", slot.only, ONLY if slot.has_elements or slot.per_tensor else ONLY[:1]),
    ):
        if given not in allowed:
            fix = f"It must be one of {', '.join(map(repr, allowed))}."
            raise rule_errors.bad_statement(who, f"slot '{slot.letter}' has {what}={given!r}", fix)
    starts: Any = slot.starts
    for name in (slot.when, slot.up_to, starts):
        if isinstance(name, str) and name not in rule.fields:
            what = f"slot '{slot.letter}' refers to '{name}', which is not a hyper-parameter"
            raise rule_errors.bad_statement(who, what, errors.nearest(name, rule.fields))
    if slot.when is not None and not rule.fields[slot.when].static:
        what = f"slot '{slot.letter}' exists when {slot.when} is on, but {slot.when} is not a switch"
        raise rule_errors.bad_statement(
            who, what, f"Make {slot.when} a boolean, or declare it with switch=True."
        )
    first = rule.fields[starts].default if isinstance(starts, str) else starts
    of_its_kind = slot.per == "element" if first is parameter else slot.of_pairs and first is identity
    if not isinstance(first, (int, float)) and not of_its_kind:
        what = f"slot '{slot.letter}' starts at {starts!r}"
        raise rule_errors.bad_statement(
            who, what, "It must be a number, or the name of a hyper-parameter that is one."
        )
    if slot.up_to is not None and not slot.of_pairs:
        what = f"slot '{slot.letter}' is limited by '{slot.up_to}', which is for sides"
        raise rule_errors.bad_statement(who, what, 'Declare it with per="left" or per="right".')
    if slot.of_pairs and not rule.on_matrices:
        what = f"slot '{slot.letter}' has one value per pair of {'rows' if slot.per == 'left' else 'columns'}"
        raise rule_errors.bad_statement(
            who, what, "Only rules that subclass steprule.declare.Matrix have those."
        )


def check_modifier(modifier: Any, body: Mapping[str, Any]) -> None:
    """Refuse a modifier without a method, with other arguments, or with slots that cannot be stored.

    Raises: TypeError, or ValueError for a default outside its own range.
    """
    who = modifier.__name__
    clashes = set(modifier.fields) & set(modifier.slots)
    if clashes:
        what = f"'{min(clashes)}' is both a hyper-parameter and a slot"
        raise rule_errors.bad_statement(who, what, "Rename one of them.")
    for name in (x for x, value in body.items() if isinstance(value, Field)):
        _check_field(who, modifier.fields[name], modifier.fields)
    keys = [slot.key for slot in modifier.slots.values()]
    for slot in modifier.slots.values():
        _check_letter(who, slot)
        _check_key(who, slot, keys)
        _check_slot(modifier, slot)
    _check_matrices(modifier)
    rhythm = "every" in modifier.fields and any(
        x.key == "steps" and x.per == "group" for x in modifier.slots.values()
    )
    if modifier.acts != "always" and not (modifier.acts in ("first", "last") and rhythm):
        fix = 'It is "first" or "last", with hyper(…) as `every` and slot("steps", per="group") as `steps`.'
        raise rule_errors.bad_statement(who, f"acts is {modifier.acts!r}", fix)
    if not any(hasattr(modifier, method) for method in OF_MODIFIERS):
        methods = [name for name, value in body.items() if isinstance(value, staticmethod)]
        raise rule_errors.no_method_of_modifiers(who, methods, list(OF_MODIFIERS))
    for method in OF_MODIFIERS:
        _check_method(modifier, body, method, OF_MODIFIERS[method])
    if "climb" in body and uses_step(modifier, ["climb"]):
        problem = rule_errors.bad_statement(
            who, "climb uses t", "It is no step: use a slot, or the values in h."
        )
        raise rule_errors.at_update(problem, modifier.climb)


def uses_step(owner: Any, methods: Iterable[str]) -> bool:
    """Whether one of these methods does anything with its last argument, the number of the step."""
    functions = (getattr(owner, method, None) for method in methods)
    return any(_uses_last(x) for x in functions if inspect.isfunction(x))


def _uses_last(function: FunctionType) -> bool:
    last = list(inspect.signature(function).parameters)[-1]
    for one in dis.get_instructions(function):
        # Newer Pythons load two variables at once.
        given: Any = one.argval
        names = cast("tuple[Any, ...]", given) if isinstance(given, tuple) else (given,)
        if "LOAD" in one.opname and OF_VARIABLES.intersection(one.opname.split("_")) and last in names:
            return True
    return False


def _check_update(rule: type[RuleOptimizer], body: Mapping[str, Any]) -> None:
    _check_method(rule, body, "update", ARGUMENTS)
    if "update" in body and rule.counts_steps is False and uses_step(rule, ["update"]):
        what = "update uses the number of the step, but counts_steps is False"
        problem = rule_errors.bad_statement(rule.__name__, what, "Leave counts_steps out.")
        raise rule_errors.at_update(problem, rule.update)
    _check_method(rule, body, "estimate", ["h", "p", "d", "s", "t"])


def _check_method(rule: Any, body: Mapping[str, Any], method: str, arguments: list[str]) -> None:
    who = rule.__name__
    if method not in body:
        return
    written = body[method]
    wanted = f"{method}({', '.join(arguments)})"
    if not isinstance(written, staticmethod):
        fix = "Put @staticmethod above it."
        raise rule_errors.at_update(
            rule_errors.bad_statement(who, f"{method} must be a static method", fix), written
        )
    function = getattr(rule, method)
    if not callable(function):
        what = f"{method} is {function!r}"
        raise rule_errors.bad_statement(who, what, f"It must be a function {wanted}.")
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    listed = ", ".join(names)
    fix = f"It must be {wanted}."
    if len(names) != len(arguments):
        problem = rule_errors.bad_statement(who, f"{method} takes {len(names)} arguments ({listed})", fix)
        raise rule_errors.at_update(problem, function)
    by_name = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    odd = any(x.kind in by_name for x in parameters.values())
    if odd or (names != arguments and sorted(names) == sorted(arguments)) or names[0] == "self":
        raise rule_errors.at_update(rule_errors.bad_statement(who, f"{method} takes ({listed})", fix), function)
