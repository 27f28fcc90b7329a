"""Every message that someone who writes a rule can see: the rule, what is wrong, and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from steprule.errors import checkpoint, close, in_group, nearest
from steprule.levels import ONE_PER


def no_such_slot(rule: str, name: str, slots: Iterable[str]):
    """A misspelt slot in a rule."""
    return AttributeError(f"{rule}.update: no slot '{name}'. {nearest(name, slots)}".rstrip())


def slot_too_long(rule: str, name: str, limit: str):
    """A slot of pairs used although its side is longer than allowed."""
    return AttributeError(
        f"{rule}.update: slot '{name}' exists only for sides up to {limit}; use it inside "
        f"'if rows(p) <= h.{limit}:' or 'if columns(p) <= h.{limit}:'."
    )


def slot_switched_off(rule: str, name: str, switch: str):
    """A slot used although the option it exists for is off."""
    return AttributeError(
        f"{rule}.update: slot '{name}' exists only when {switch} is on; use it inside 'if h.{switch}:'."
    )


def slot_of_others(rule: str, name: str, kind: str):
    """A slot that only matrices have, used for a vector."""
    test = "is_matrix(p)" if kind == "matrices" else "not is_matrix(p)"
    return AttributeError(
        f"{rule}.update: slot '{name}' exists only for {kind}, as it is declared; use it inside 'if {test}:'."
    )


def plain_slot_given_a_value(rule: str, name: str):
    """A slot of one plain number, given a value per element or a reduction."""
    return TypeError(
        f"{rule}.update: slot '{name}' is a scalar_slot: one plain number per tensor, made of h, t and other "
        "scalar slots. It was given a value made of p, g or a slot (a reduction such as norm(g) is one, too). "
        "Declare it as slot(…), which stores that value for every element."
    )


def no_such_hyperparameter_in_rule(rule: str, name: str, fields: Iterable[str]):
    """A misspelt hyper-parameter in a rule."""
    return AttributeError(f"{rule}.update: no hyper-parameter 'h.{name}'. {nearest(name, fields)}".rstrip())


def hyperparameter_assigned(rule: str, name: str):
    """`h.lr = …` in a rule."""
    return AttributeError(
        f"{rule}.update: h.{name} was assigned, but hyper-parameters belong to the user. Use a local variable, "
        "or a scalar_slot for a number that is kept between steps."
    )


def drawn_without_seed(rule: str, word: str):
    """Random numbers in a rule or a modifier that has no seed."""
    return TypeError(
        f"{rule}.update: {word}() draws random numbers, and nothing says where they start. Declare "
        "`seed: int = hyper(default=0, at_least=0)`."
    )


def drawn_outside_of_a_step(word: str):
    """Random numbers where a runner would not know which."""
    return RuntimeError(
        f"{word}() draws random numbers for a step. Call it in the update or estimate of a rule, or in the "
        "gradient, change, parameter or apply of a modifier."
    )


def bad_statement(rule: str, what: str, fix: str):
    """A rule whose declaration is wrong."""
    return TypeError(f"{rule}: {what}. {fix}")


def bad_default(problem: Exception):
    """A hyper-parameter whose default is not among its own allowed values."""
    return type(problem)(f"{problem} This is its default: change it, or what is allowed.")


def at_update(error: Exception, update: object) -> Exception:
    """The same error with the line where `update` begins."""
    code = getattr(update, "__code__", None)
    return error if code is None else type(error)(at_line(str(error), code.co_filename, code.co_firstlineno))


def no_update(rule: str, near: str | None):
    """A rule without an `update`."""
    fix = f"Is '{near}' meant to be it? " if near else ""
    return TypeError(
        f"{rule} has no update. {fix}Write @staticmethod, def update(h, p, g, s, t), which sets the slots and "
        "returns the change to the parameter."
    )


def no_step_param(rule: str, near: str | None):
    """A GenericAdaptiveOptimizer without its step."""
    fix = f"Is '{near}' meant to be it? " if near else ""
    return TypeError(
        f"{rule} has no step_param. {fix}Write def step_param(self, state, group, grad, param), which changes "
        "param in place."
    )


def template_arguments(rule: str, method: str, given: Sequence[str], wanted: Sequence[str]):
    """A method of a GenericAdaptiveOptimizer that cannot be called."""
    return TypeError(
        f"{rule}: {method} takes ({', '.join(given)}) after self. It must be "
        f"{method}(self, {', '.join(wanted)})."
    )


def template_returned(who: str, given: object):
    """A method of a GenericAdaptiveOptimizer that returns something instead of changing what it is given."""
    what = "fill the state that it is given" if who.endswith("init_state") else "change param in place"
    return TypeError(f"{who} returned {a_kind(given)}, which would be lost. Let it {what}, and return nothing.")


def state_has_keys(name: str, keys: Sequence[str]) -> str:
    """A note on a key that a state does not have: what it has, perhaps from another optimizer's checkpoint."""
    return f"The state of {name} has the keys: {', '.join(map(str, keys)) or 'none'}."


def declared_in_template(rule: str, name: str, hyper: bool):
    """`hyper()` or `slot()` in a rule that is written by hand."""
    fix = (
        f"Pass it on: super().__init__(params, {{'{name}': …}}), and read group['{name}']"
        if hyper
        else f"Make state['{name}'] in init_state"
    )
    return TypeError(
        f"{rule}: '{name}' is declared, but a GenericAdaptiveOptimizer has no declarations. {fix}, or subclass "
        "steprule.Elementwise."
    )


def truth_of_a_value(rule: str):
    """`if g > 0` in a rule."""
    return TypeError(
        f"{rule}.update: 'if' on a value that differs per element: the condition may hold for some elements "
        "and not for others. Use where(condition, a, b). 'and', 'or', 'not', 'while', a < x < b, min and max "
        "do not work on it either: multiply conditions for 'and', write smaller(a, b) and larger(a, b)."
    )


def truth_of_a_symbol(rule: str, spelt: str):
    """`if t > 1` or `if h.momentum` in a rule."""
    text = (
        f"{rule}.update: 'if' on {spelt}, which may change between steps; use where(condition, a, b), and "
        "smaller and larger for min and max."
    )
    if spelt.startswith("h.") and spelt[2:].isidentifier():
        text += f" If zero means absent, declare {spelt[2:]} with hyper(…, switch=True)."
    return TypeError(text)


# What values of a rule have in torch, and how a rule writes it.
OPERATORS = {
    "abs": "abs(x)",
    "absolute": "abs(x)",
    "add": "x + y",
    "addcdiv": "p + w * a / b",
    "addcmul": "p + w * a * b",
    "div": "x / y",
    "divide": "x / y",
    "max": "larger(x, y), or largest(x) over the tensor",
    "maximum": "larger(x, y)",
    "minimum": "smaller(x, y)",
    "min": "smaller(x, y)",
    "mul": "x * y",
    "multiply": "x * y",
    "neg": "-x",
    "normal": "gaussian()",
    "pow": "x ** y",
    "power": "x ** y",
    "randn": "gaussian()",
    "randn_like": "gaussian()",
    "reciprocal": "1 / x",
    "rsqrt": "1 / sqrt(x)",
    "square": "x * x",
    "sub": "x - y",
    "subtract": "x - y",
    "true_divide": "x / y",
}


def instead_of(name: str, words: Sequence[str]) -> str:
    """How a rule writes what a function or method of this name does elsewhere; empty if it has no such word."""
    name = name.strip("_")
    if name in words:
        return f"Write {name}(…), imported from steprule.words."
    return f"Write {OPERATORS[name]}." if name in OPERATORS else ""


def language(words: Sequence[str]) -> str:
    """The language that a rule is written in."""
    small = [word for word in words if word.islower()]
    text = "A rule is written with + - * / **, comparisons, abs and the words of steprule.words"
    return f"{text}: {', '.join(small)}."


def no_such_word(name: str, words: Sequence[str]):
    """`from steprule.words import tanh`."""
    near = None if name in OPERATORS else close(name, words)
    if not (near or name in OPERATORS or hasattr(math, name) or hasattr(torch, name)):
        # Test runners and editors ask modules for names of their own, and expect an AttributeError.
        return AttributeError(f"module 'steprule.words' has no attribute '{name}'")
    hint = f"Did you mean '{near}'?" if near else instead_of(name, words)
    # Not AttributeError, whose text `from steprule.words import …` throws away.
    return ImportError(f"steprule.words has no word '{name}'. {hint or language(words)}")


def no_such_method(rule: str, name: str, words: Sequence[str]):
    """`x.sqrt()` or `g.add_(p)` in a rule."""
    return AttributeError(
        f"{rule}.update: '.{name}' on a value; values have no methods or attributes, and nothing changes in "
        f"place. {instead_of(name, words) or language(words)}"
    )


def a_kind(given: object) -> str:
    """What kind of thing it is, in words."""
    kind = type(given).__name__
    return (
        "None" if given is None else f"an {kind}" if kind[0] in "aeioAEIO" or kind == "ndarray" else f"a {kind}"
    )


def no_operand(where: str, given: object):
    """Something in a formula that is not a number."""
    if type(given).__name__ == "Becomes":
        return TypeError(f"{where}: {VALUES['Becomes']}")
    shown = (
        f"{given!r} (a {type(given).__name__})" if isinstance(given, (str, bytes, complex)) else a_kind(given)
    )
    return TypeError(
        f"{where}: {shown} is not a number. Values are p, g, the slots, h's hyper-parameters, t, plain numbers "
        "and what is made of them."
    )


def reduced_plain_number(word: str):
    """`mean(h.lr)` in a rule."""
    return TypeError(f"{word}(…) takes a value per element, such as g, not a plain number. Drop {word}.")


def reduced_twice(word: str, level: str, over: str):
    """`norm(norm(g))` in a rule, or `norm(mean(g, over="row"))`."""
    other = {"row": "column", "column": "row"}.get(level)
    if other is not None and over != level:
        return TypeError(
            f"{word}(…, over='{over}') of a value that is {ONE_PER[level]}. Write over='{other}', which takes "
            f"one value of each {level}, or give it a value per element."
        )
    return TypeError(
        f"{word}(…) of a value that is {ONE_PER[level]} already, made of reductions. "
        f"Drop {word}, or give it a value per element."
    )


def fact_of_no_parameter(word: str):
    """`size(3)` in a rule."""
    return TypeError(f"{word}(…) takes the parameter: write {word}(p).")


def sums_by_kind(rule: str):
    """`if is_matrix(p):` around a sum over all parameters."""
    return TypeError(
        f"{rule}.update takes other sums over several parameters for matrices than for vectors, which are in "
        "the same groups. Take these sums outside of 'if is_matrix(p):', in the same order for both."
    )


def parameter_returned(rule: str):
    """An `update` that returns the new parameter as if it were the change."""
    return TypeError(
        f"{rule}.update returned p, or p plus something. What it returns is added to p, which is not changed "
        "in place: return the change alone, as in `return -h.lr * g`, or becomes(new_value)."
    )


def stored_element(rule: str):
    """`as_stored(g)` in a rule."""
    return TypeError(
        f"{rule}.update: as_stored(…) takes a plain number, such as what a slot per tensor is given. A value "
        "per element is rounded when its slot is stored."
    )


def changes_by_itself(where: str):
    """A rule with a random number or a counter of its own in it."""
    return RuntimeError(
        f"{where} does not say the same each time it is called. It is read once, so a random number, a "
        "counter or any other value of Python would stay as it was then. Make it a hyper-parameter or a slot. "
        "Random numbers are gaussian() and coin()."
    )


def no_such_level(word: str, over: Any, levels: Sequence[str]):
    """`mean(g, over="row")` in a rule."""
    return ValueError(f"{word}(…, over={over!r}): over must be one of {', '.join(map(repr, levels))}.")


def finer_than_slot(rule: str, name: str, slot: str, value: str):
    """A value per tensor, given to a slot that all parameters share."""
    if slot in ("row", "column"):
        way_out = f"Make the value with over='{slot}', or declare the slot with per='{value}'."
    else:
        way_out = (
            "t, the count of a tensor's own steps, is one per tensor too. Make the value with "
            f"over='{slot}', or declare the slot with per='{value}'."
        )
    return TypeError(
        f"{rule}.update: slot '{name}' is {ONE_PER[slot]} (per='{slot}') and is given a value that is "
        f"{ONE_PER[value]}. {way_out}"
    )


def nothing_returned(rule: str):
    """An `update` without a `return`."""
    return TypeError(
        f"{rule}.update returned None. p is not changed in place: end with `return` and the change, as in "
        "`return -h.lr * g`."
    )


def estimate_returned(where: str):
    """An `estimate` that returns something, as if it were a step."""
    return TypeError(
        f"{where} returned a value. It only sets slots, as in s.h = ema(s.h, d, h.betas[1]); leave the "
        "return out."
    )


def wrong_return(rule: str, given: object, in_tuple: bool):
    """An `update` that returns something other than a change."""
    kind = type(given).__name__
    if kind == "Becomes":
        return TypeError(
            f"{rule}.update returned becomes(…) inside a tuple. It is the whole new value, so it stands alone: "
            "`return becomes(value)`."
        )
    shown = "a condition" if kind in ("bool", "Symbol") else a_kind(given)
    shown = (
        "an empty tuple" if isinstance(given, tuple) else f"a tuple with {shown} in it" if in_tuple else shown
    )
    fix = " A rule on whole matrices puts it into Number(p.machine, tensor)." if kind == "Tensor" else ""
    return TypeError(
        f"{rule}.update returned {shown}; it must return the change to the parameter (a value, or several in a "
        f"tuple) or becomes(new_value).{fix}"
    )


def no_method_of_modifiers(modifier: str, given: list[str], known: list[str]):
    """A modifier without any of the methods that say where it acts."""
    near = next((f"Is '{x}' meant to be one? " for x in given), "")
    return TypeError(
        f"{modifier} has none of the methods {', '.join(known)}. {near}Write one as a static method; "
        "help(steprule.Modifier) says what each of them returns."
    )


def modifier_returned(modifier: str, method: str, given: object):
    """A method of a modifier that returns something other than a value."""
    what = {"gradient": "the gradient", "change": "the change"}.get(method, "the new parameter")
    return TypeError(
        f"{modifier}.{method} returned {a_kind(given)}; it must return {what}, a value per element."
    )


def no_change_to_modify(rule: str, modifier: str):
    """A modifier of the change on a rule that sets the parameter."""
    return TypeError(
        f"{modifier} modifies the change that a rule makes, but {rule} sets the new parameter itself. "
        "Leave the modifier out, or use another rule."
    )


def wrong_shape(rule: str, what: str, given: tuple[int, ...], wanted: tuple[int, ...]):
    """A result that does not fit its parameter or slot."""
    return ValueError(f"{rule}.update: {what} has shape {given}, must have {wanted}.")


# What Python calls the values of a rule in its own messages.
VALUES = {
    "Number": "(A Number is a value per element: p, g, a slot, and what is made of them.)",
    "Symbol": "(A Symbol is a plain number not known yet: h.lr, t, and what is made of them.)",
    "Becomes": "becomes(…) is the whole new value of p: compute it inside the parentheses and return it alone.",
    "Register": "(A rule works on numbers, not on tensors. To use a function of torch on whole matrices, put "
    "@steprule.matrix.words.matrix_word above it.)",
    "Hyper": "Write h.name for a hyper-parameter.",
    "Slots": "Write s.name for a slot.",
}


def conditions() -> str:
    """How a rule writes & | ~."""
    return "Write a * b for 'and', larger(a, b) for 'or', 1 - a for 'not'."


def raised_in_rule(who: str, problem: str, way_out: str) -> str:
    """What Python or the writer's own code raised inside a method of a rule, with the rule's name."""
    return f"{who}: {problem.rstrip('.')}. {way_out}".rstrip()


def at_line(text: str, file: str, line: int) -> str:
    """A message about a rule, with the line that it is about."""
    return f"{text} See line {line} of {file}."


# Rules and modifiers of groups


def no_rule_for_group(who: str, given: object, known: list[str], group: int | None):
    """A `rule` in a group that is neither a class nor a name that other groups have introduced."""
    return TypeError(
        f"{who}: rule = {given!r}{in_group(group)} is not a rule. Give a class, such as steprule.AdamW, or the "
        f"name of a rule that this optimizer has: {', '.join(known)}."
    )


def rule_with_methods(who: str, rule: str, method: str, group: int | None):
    """A rule in a group that needs a method which only optimizers of its class have."""
    return TypeError(
        f"{who}: rule = {rule}{in_group(group)} needs {method}, which only an optimizer of the class {rule} "
        f"has. Build {rule} from all groups, and give the others a rule: {{'params': ..., 'rule': {who}}}."
    )


def one_rule_only(who: str, group: int | None):
    """A rule for a group of an optimizer that has no other rule than its own."""
    return TypeError(
        f"{who} steps every parameter in its own way, so a group cannot have a 'rule'{in_group(group)}. "
        "Leave it out, and give these parameters an optimizer of their own."
    )


def no_modifier(who: str, given: object, group: int | None):
    """Something else in the list of modifiers."""
    return TypeError(
        f"{who}: {given!r} is not a modifier{in_group(group)}. Give a list of modifiers, as in "
        "modifiers=[steprule.Cautious()]."
    )


def create_without_name(given: object):
    """Something else than a name for `create`."""
    shown = given.__name__ if isinstance(given, type) else repr(given)
    return TypeError(
        f"create: {shown} is not a name. Give the name of a rule, as in create('adamw+ema', model); a class is "
        "called directly, as in AdamW(model)."
    )


def empty_part_of_name():
    """A name that begins or ends with a plus sign, or has two in a row."""
    return ValueError("a + has nothing after it. Write the name of a modifier there, as in 'adamw+ema'.")


def no_such_modifier(given: str, known: list[str], is_rule: bool):
    """An unknown modifier in the name that `create` was given."""
    if is_rule:
        return ValueError(f"'{given}' is a rule. A name has one rule, which comes first, and then modifiers.")
    return ValueError(f"there is no modifier '{given}'. {nearest(given, known)}")


def modifier_comes_first(name: str):
    """A modifier where a name begins."""
    return ValueError(f"'{name}' is a modifier. Write a rule before it, as in 'adamw+{name}'.")


def takes_no_modifiers(rule: str):
    """Modifiers for a rule that calls the loss again, or is written by hand."""
    return ValueError(f"{rule} takes no modifiers, because its step is not declared. Leave them out.")


def option_without_its_modifier(key: str, full: str):
    """`max_norm` for a rule with GlobalNormClip."""
    return ValueError(f"'{key}' belongs to a modifier: write '{full}'.")


def option_of_no_modifier(key: str, name: str, known: list[str]):
    """`ema.decay` where there is no EMA."""
    prefix = key.partition(".")[0]
    if prefix.lower() in known:
        return ValueError(
            f"'{key}' belongs to the modifier {prefix.lower()}, which '{name}' does not have. Write "
            f"'{name}+{prefix.lower()}', or leave '{key}' out."
        )
    return ValueError(f"'{key}': there is no modifier '{prefix}'. {nearest(prefix, known)}")


def two_of_one_name(who: str, name: str, group: int | None):
    """Two classes that a checkpoint could not tell from each other."""
    return ValueError(
        f"{who}: there are two different classes with the name {name}{in_group(group)}. Rename one of them: "
        "groups and checkpoints know them by name."
    )


def modifier_twice(who: str, name: str, group: int | None):
    """A modifier that is listed twice."""
    return ValueError(f"{who}: {name} is listed twice{in_group(group)}. Leave one of them out.")


def not_together(who: str, modifier: str, other: str, reason: str, group: int | None):
    """Modifiers that make no sense together, or with the rule."""
    return ValueError(f"{who}: {modifier} does not go with {other}{in_group(group)}: {reason}")


def decay_beside_the_step(who: str, mode: str, reason: str):
    """Weight decay of a kind that the rule cannot have."""
    return ValueError(
        f"{who} does not go with weight decay in the mode '{mode}': {reason} Give weight_decay a number, which "
        "decays as the rule says, or WeightDecay(..., weight_decouple=False)."
    )


def other_modifiers(who: str, what: str, saved: str, current: str, group: int):
    """A checkpoint of another rule, or with other modifiers."""
    return checkpoint(
        who,
        f"parameter group {group} was saved with {what} {saved}, and now has {current}",
        "strict=False starts what is new, drops what is gone, and reports both.",
    )
