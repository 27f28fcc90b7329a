"""Errors in what the writer of a rule wrote: they name the rule, its method and the line."""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Callable
from traceback import walk_tb
from typing import Any

from steprule import rule_errors, words


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
        # Most messages are about the rule's `update`; a modifier has other methods.
        about_update = re.match(r"\w+\.update: ", given)
        given = f"{who}: {given[about_update.end() :]}" if about_update else given
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
