"""The docstrings of rules: what their writers wrote, followed by every argument, from the fields."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from functools import cache

from steprule.engine.fields import Field

_HEAD = "\n\nArgs:\n"
_PARAMS = "params: the model, or its parameters: tensors, (name, tensor) pairs, or groups (dicts) of them."


def with_arguments(rule: type, fields: Mapping[str, Field]) -> str:
    """The rule's docstring and all arguments of its constructor."""
    lines = [_PARAMS, *map(_line, fields.values())]
    return (written(rule) + _HEAD + "\n".join(map(_folded, lines))).lstrip("\n")


def of_modifier(modifier: type, fields: Mapping[str, Field]) -> str:
    """The modifier's docstring and all arguments of its constructor."""
    text = ("\n\n" + inspect.cleandoc(modifier.__doc__ or "")).partition(_HEAD)[0].lstrip("\n")
    return text + _HEAD + "\n".join(map(_folded, map(_line, fields.values()))) if fields else text


def written(rule: type) -> str:
    """The docstring without the arguments; a rule without one has that of the class whose `update` it uses."""
    text = rule.__doc__ or next((x.__doc__ for x in rule.__mro__ if "update" in vars(x)), None)
    return ("\n\n" + inspect.cleandoc(text or "")).partition(_HEAD)[0].lstrip("\n")


def _line(field: Field) -> str:
    of_its_type = field.free or field.type in ("bool", "bool | None")
    said = field.meaning if of_its_type else "; ".join(filter(None, (field.meaning, field.allowed)))
    about = f": {said}" if said else ""
    return f"{field.name} ({field.type}, default {field.default!r}){about}."


@cache
def _folded(line: str) -> str:
    if len(line) <= 96:
        return "    " + line
    return textwrap.fill(line, 100, initial_indent=" " * 4, subsequent_indent=" " * 8)
