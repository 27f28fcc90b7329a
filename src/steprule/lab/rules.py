"""`steprule list` and `steprule show`: the rules as they describe themselves."""

from __future__ import annotations

import fnmatch
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

import steprule
from steprule.catalogue import PRESETS, Description, HyperParameter, modifiers_named
from steprule.engine.optimizer import CheckedOptimizer
from steprule.engine.rule import FLAGS, OPTIONS
from steprule.lab.errors import LabError, did_you_mean
from steprule.lab.optimizer_classes import find_rule, optimizer_class, optimizer_label, optimizer_name
from steprule.lab.report import open_console

__all__ = ["print_list", "print_rule"]

INDENT = "    "
ROOMY = 60
NARROWEST = 24
READABLE = 100
# Where a formula may be broken: after a clause, before an operator, at any space.
BREAKS = (r"(?<=[,;→]) ", r" (?=[-+·/] )", " ")


def print_list(pattern: str) -> None:
    """Print a sentence about every rule, preset and modifier whose name contains the pattern or matches it.

    If there is none, of those that have the pattern in what they say of when to use them. Raises `LabError` if
    there is none of those, either.
    """
    rules, modifiers = steprule.catalogue(), steprule.modifier_catalogue()
    presets = dict(zip(PRESETS, PRESETS, strict=True))
    every: dict[str, Mapping[str, Any]] = {"rule": rules, "preset": presets, "modifier": modifiers}
    found = {what: _matching(pattern, known) for what, known in every.items()}
    if not any(found.values()):
        found = {what: _about(pattern, known) for what, known in every.items()}
    shown = {what: names for what, names in found.items() if names}
    if not shown:
        near = did_you_mean(pattern, [*rules, *presets, *modifiers])
        raise LabError(f"no rule, preset or modifier matches '{pattern}'. {near}")
    console = open_console()
    longest = max(len(name) for what, names in shown.items() for name in (what, *names))
    margin = " " * (longest + 9) if _width(console) >= ROOMY else INDENT
    for place, (what, names) in enumerate(shown.items()):
        _print_lines(console, [*[""] * (place > 0), f"{what:{longest}}  state  what it does"], "dim")
        for name in names:
            about = steprule.describe(every[what][name])
            _print_entry(console, f"{name:{longest}}  {about.numbers_per_parameter:5g}", about.summary, margin)
    notes = ["state: values kept per element. More about one: steprule show NAME."]
    notes += ["A preset is a rule with modifiers and values of its own."] if "preset" in shown else []
    notes += ["A modifier is added to a rule with +, as in adamw+ema."] if "modifier" in shown else []
    _print_lines(console, ["", *_wrapped(" ".join(notes), _width(console))], "dim")


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    wanted = pattern.lower()
    return [name for name in names if wanted in name.lower() or fnmatch.fnmatch(name.lower(), wanted)]


def _about(pattern: str, known: Mapping[str, Any]) -> list[str]:
    """The names of what has the pattern in its sentence, or in what it says of when to use it."""
    wanted = re.compile(rf"\b{re.escape(pattern)}", re.IGNORECASE)
    found = {name: steprule.describe(known[name]) for name in known}
    return [name for name, about in found.items() if wanted.search(f"{about.summary} {about.when}")]


def print_rule(name: str) -> None:
    """Print everything that a rule, preset or modifier says about itself. Raises `LabError` for other names."""
    modifier, preset = _modifier(name), name.strip().lower() in PRESETS
    about = steprule.describe(name if preset else _find(name) if modifier is None else modifier)
    console = open_console()
    width = min(_width(console), READABLE)
    own = [hyper for hyper in about.hyperparameters if hyper.name not in (*FLAGS, *OPTIONS)]
    _print_entry(console, about.name, about.summary, INDENT)
    for heading, lines in {
        "when to use": _wrapped(about.when, width, INDENT),
        "formula": [part for line in about.formula.splitlines() for part in _folded(line, _width(console))],
        "hyper-parameters": [line for hyper in own for line in _paragraph(hyper, width)],
        "shared options": _wrapped(_shared(about), width, INDENT),
        "how to use": _wrapped(_use(about.name, modifier, preset), width, INDENT),
        "state": _wrapped(about.state, width, INDENT),
        "differs": _wrapped(about.differs, width, INDENT),
        "source": _wrapped(about.source, width, INDENT),
    }.items():
        if lines:
            _print_lines(console, ["", heading], "dim")
            _print_lines(console, lines)


def _modifier(name: str) -> type[steprule.Modifier] | None:
    """The modifier of that name; a rule's name is its own."""
    try:
        (found,) = modifiers_named([name])
    except ValueError:
        return None
    return found


def _use(name: str, modifier: type[steprule.Modifier] | None, preset: bool) -> str:
    """How a modifier is added or a preset is made, in Python and on the command line."""
    if preset:
        return f'In Python: steprule.create("{name}", model). On the command line: --optimizer {name}.'
    if modifier is None:
        return ""
    shown = "".join(f" --set {modifier.name}.{x.name}={x.default}" for x in modifier.fields.values())
    return (
        f"In Python: AdamW(model, modifiers=[steprule.{modifier.__name__}()]). In a name: "
        f"--optimizer adamw+{modifier.name}{shown}."
    )


def _find(name: str) -> type[CheckedOptimizer]:
    """The rule of that name, or the one in FILE.py:CLASS."""
    if ":" not in name and not name.endswith(".py"):
        return find_rule(name)
    full = optimizer_name(name)
    found = optimizer_class(full)
    if not issubclass(found, CheckedOptimizer):
        raise LabError(f"{optimizer_label(full)} is not a rule of steprule, so it says nothing about itself.")
    return found


def _paragraph(hyper: HyperParameter, width: int) -> list[str]:
    searched = "" if hyper.search is None else f"tuned from {hyper.search[0]:g} to {hyper.search[1]:g}"
    text = "; ".join(filter(None, (hyper.meaning, hyper.allowed, searched)))
    head = textwrap.indent("\n".join(_wrapped(f"{hyper.name} = {hyper.default}", width - len(INDENT))), INDENT)
    return [*head.splitlines(), *_wrapped(text, width, 2 * INDENT)]


def _shared(about: Description) -> str:
    """The options that nearly every rule has, in sentences."""
    theirs = getattr(torch.optim, about.name, None)
    of_torch = FLAGS if theirs is None else inspect.signature(theirs).parameters
    shared = [hyper for hyper in about.hyperparameters if hyper.name in (*FLAGS, *OPTIONS)]
    parts = {
        "As in torch": [hyper for hyper in shared if hyper.name in of_torch],
        "In every rule of steprule": [hyper for hyper in shared if hyper.name not in of_torch],
    }
    sentences = [
        f"{head}: {', '.join(f'{hyper.name}={hyper.default}' for hyper in hypers)}."
        for head, hypers in parts.items()
        if hypers
    ]
    return " ".join([*sentences, "In Python, help(steprule.AdamW) explains them."]) if shared else ""


# Lines that fit


def _width(console: Console) -> int:
    return max(console.width, NARROWEST)


def _wrapped(text: str, width: int, margin: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _folded(line: str, width: int) -> list[str]:
    """A line of a formula; if it is too long, one statement per line, broken where it hurts least."""
    if len(INDENT + line) <= width:
        return [INDENT + line]
    margin = INDENT + " " * (len(line) - len(line.lstrip()))
    lines: list[str] = []
    for statement in re.split(r"\s{2,}", line.strip()):
        fits = len(margin + statement) <= width
        first, *rest = [statement] if fits else _filled(statement, width - len(margin + INDENT), BREAKS)
        lines += [margin + first, *(margin + INDENT + part for part in rest)]
    return [piece for text in lines for piece in _at_spaces(text, width)]


def _filled(text: str, width: int, breaks: Sequence[str]) -> list[str]:
    """The text in lines, broken at the first of these kinds of place; at the next kind only if necessary."""
    if len(text) <= width or not breaks:
        return [text]
    lines: list[str] = []
    for piece in _outermost(breaks[0], text):
        if lines and len(f"{lines[-1]} {piece}") <= width:
            lines[-1] += f" {piece}"
        else:
            lines += _filled(piece, width, breaks[1:])
    return lines


def _outermost(place: str, text: str) -> list[str]:
    """The text, split at these places, except inside brackets."""
    pieces: list[str] = []
    begin = 0
    for found in re.finditer(place, text):
        before = text[: found.start()]
        if sum(map(before.count, "([{")) == sum(map(before.count, ")]}")):
            pieces.append(text[begin : found.start()])
            begin = found.end()
    return [*pieces, text[begin:]]


def _at_spaces(line: str, width: int) -> list[str]:
    """The line; if it is still too long, wrapped at any space."""
    margin = " " * (len(line) - len(line.lstrip()))
    return [line] if len(line) <= width else _wrapped(line.strip(), width, margin)


def _print_entry(console: Console, head: str, text: str, margin: str) -> None:
    """Print a head and a text, side by side if the head fits into the margin, otherwise one below the other."""
    width = _width(console)
    lines = _wrapped(text, width, margin)
    if len(head) < len(margin) and lines:
        lines[0] = head + lines[0][len(head) :]
    elif margin == INDENT and len(f"{head}  {text}") <= width:
        lines = [f"{head}  {text}".rstrip()]
    else:
        lines.insert(0, head)
    name = len(head.split()[0])
    console.print(Text.assemble((lines[0][:name], "bold"), lines[0][name:]), soft_wrap=True)
    _print_lines(console, lines[1:])


def _print_lines(console: Console, lines: list[str], style: str = "") -> None:
    for line in lines:
        console.print(Text(line, style=style), soft_wrap=True)
