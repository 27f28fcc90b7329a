"""`steprule list` and `steprule show`: the rules as they describe themselves."""

from __future__ import annotations

import fnmatch

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import steprule
from steprule.lab.errors import LabError, did_you_mean
from steprule.lab.optimizers import find_rule

__all__ = ["print_list", "print_rule"]


def print_list(pattern: str) -> None:
    """Print one line for every rule whose name holds the pattern or matches it."""
    rules = steprule.catalogue()
    wanted = pattern.lower()
    names = [name for name in rules if wanted in name.lower() or fnmatch.fnmatch(name.lower(), wanted)]
    if not names:
        raise LabError(f"no rule matches '{pattern}'. {did_you_mean(pattern, rules)}")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("rule", no_wrap=True, style="bold")
    table.add_column("state", justify="right")
    table.add_column("what it does")
    for name in names:
        about = steprule.describe(rules[name])
        table.add_row(name, f"{about.numbers_per_parameter:g}", about.summary)
    console = Console()
    console.print(table)
    console.print(Text("state: numbers kept per parameter. `steprule show RULE` shows one.", style="dim"))


def print_rule(name: str) -> None:
    """Print everything that a rule says about itself."""
    about = steprule.describe(find_rule(name))
    console = Console()
    console.print(Text(about.name, style="bold"), Text(about.summary))
    console.print(Text("\nwhen to use", style="dim"))
    console.print(Padding(Text(about.when), (0, 4)))
    console.print(Text("\nformula", style="dim"))
    console.print(Padding(Text(about.formula, no_wrap=True, overflow="ignore"), (0, 0, 0, 4)))
    console.print(Text("\nhyper-parameters", style="dim"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("name", "default", "allowed", "meaning"):
        table.add_column(heading, no_wrap=heading == "name")
    for hyper in about.hyperparameters:
        table.add_row(hyper.name, str(hyper.default), hyper.allowed, hyper.meaning)
    console.print(Padding(table, (0, 0, 0, 4)))
    console.print(Text("\nstate", style="dim"))
    console.print(Padding(Text(about.state), (0, 4)))
    console.print(Text("\nsource", style="dim"))
    console.print(Padding(Text(about.source), (0, 4)))
