"""`steprule list` and `steprule show`: the rules as they describe themselves."""

from __future__ import annotations

import fnmatch

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import steprule
from steprule.lab.errors import LabError, did_you_mean
from steprule.lab.optimizer_classes import find_rule
from steprule.lab.report import open_console

__all__ = ["print_list", "print_rule"]

INDENT = 4


def print_list(pattern: str) -> None:
    """Print one line for every rule whose name contains the pattern or matches it.

    Raises `LabError` if there is none.
    """
    rules = steprule.catalogue()
    wanted = pattern.lower()
    names = [name for name in rules if wanted in name.lower() or fnmatch.fnmatch(name.lower(), wanted)]
    if not names:
        raise LabError(f"no rule matches '{pattern}'. {did_you_mean(pattern, rules)}")
    table = _table("rule", "numbers", "what it does")
    for name in names:
        about = steprule.describe(rules[name])
        table.add_row(Text(name, style="bold"), f"{about.numbers_per_parameter:g}", about.summary)
    console = open_console()
    console.print(table)
    console.print("\nnumbers: state kept per parameter. More on one: steprule show RULE", style="dim")


def print_rule(name: str) -> None:
    """Print everything that a rule says about itself. Raises `LabError` if there is no such rule."""
    about = steprule.describe(find_rule(name))
    settings = _table("name", "default", "allowed", "meaning")
    for hyper in about.hyperparameters:
        settings.add_row(hyper.name, str(hyper.default), hyper.allowed, hyper.meaning)
    console = open_console()
    console.print(Text.assemble((about.name, "bold"), "  ", about.summary))
    for heading, content in {
        "when to use": Text(about.when),
        "formula": about.formula,
        "hyper-parameters": settings,
        "state": Text(about.state),
        "source": Text(about.source),
    }.items():
        console.print(f"\n{heading}", style="dim")
        if isinstance(content, str):
            for line in content.splitlines():  # a folded formula is no formula
                console.print(Text(" " * INDENT + line), soft_wrap=True)
        else:
            console.print(Padding(content, (0, 0, 0, INDENT), expand=False))


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for i, heading in enumerate(headings):
        table.add_column(heading, no_wrap=i < len(headings) - 1, justify="left")
    return table
