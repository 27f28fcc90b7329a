"""The commands of `steprule` and their options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    # Plain help: frames and colours would leave too little room for the words on a narrow terminal.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SEEDS = 2**31


class _Command(TyperCommand):
    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`RULE` for an argument that must be given, not typer's `{rule}`."""
        return [piece.strip("{}").upper() for piece in super().collect_usage_pieces(ctx)]


def _number(kind: type[float], allowed: str, is_allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A parser for an option's number; its error says in words what is allowed."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise typer.BadParameter(f"{text!r} must be {allowed}.")
        return value

    return parse


def _path(text: str) -> Path:
    """A path; an empty one, as from an unset variable of a script, would mean the current folder."""
    if not text:
        raise typer.BadParameter("it is empty. Give a path, or leave the option out.")
    return Path(text)


_any_number = _number(float, "a number", lambda _: True)
_above_zero = _number(float, "a number above 0", lambda value: value > 0)
_count = _number(int, "a whole number of at least 1", lambda value: value >= 1)
_samples = _number(int, "a whole number of at least 2", lambda value: value >= 2)
_seed = _number(int, f"a whole number of at least 0 and below {SEEDS}", lambda value: 0 <= value < SEEDS)


def _option(name: str, metavar: str, text: str, parse: Callable[[str], Any] | None = None) -> Any:
    """An option whose help text says its default."""
    return typer.Option(name, metavar=metavar, help=text, parser=parse, show_default=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        import platform

        import torch

        import steprule

        typer.echo(
            f"steprule {steprule.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
        )
        raise typer.Exit


@app.callback()
def steprule_(
    version: Annotated[  # the callback has done its work by now
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit."),
    ] = False,
) -> None:
    """Optimizers for PyTorch, each step rule written once: look at them, train with them, time them.

    `steprule COMMAND -h` says more about a command.
    """


@app.command(cls=_Command, short_help="Train a model on real data.")
def train(
    task: Annotated[
        str | None,
        _option("--task", "NAME", "digits, text, photo or FILE.py:FUNCTION (default: digits)"),
    ] = None,
    optimizer: Annotated[
        str | None,
        _option(
            "--optimizer",
            "NAME",
            "a rule of `steprule list`, with modifiers as in adamw+ema; FILE.py:CLASS for your own, or "
            "torch:CLASS for one of torch.optim (default: adabelief)",
        ),
    ] = None,
    lr: Annotated[
        float | None, _option("--lr", "NUMBER", "learning rate (default: the optimizer's)", _any_number)
    ] = None,
    settings: Annotated[
        list[str] | None,
        _option("--set", "NAME=VALUE", "a hyper-parameter, as in --set betas=0.9,0.95; can be repeated"),
    ] = None,
    schedule: Annotated[
        str | None,
        _option("--schedule", "NAME", "none, warmup, or cosine with a warm-up (default: none)"),
    ] = None,
    clip_norm: Annotated[
        float | None,
        _option(
            "--clip-norm",
            "NUMBER",
            "clip the gradients to this norm, taken over all of them (default: no clipping)",
            _above_zero,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        _option("--epochs", "NUMBER", "passes over the training data (default: the task's)", _count),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option("--batch-size", "NUMBER", "items per step (default: the task's)", _count),
    ] = None,
    seed: Annotated[
        int | None,
        _option("--seed", "NUMBER", "the seed of all random numbers (default: 0)", _seed),
    ] = None,
    device: Annotated[
        str | None, _option("--device", "NAME", "cpu, cuda, cuda:1, mps … (default: cpu)")
    ] = None,
    out: Annotated[
        Path | None,
        _option("--out", "FOLDER", "where the run is kept (default: a new folder in runs/)", _path),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the run in --out, or the newest in runs/ that fits")
    ] = False,
) -> None:
    """Train a model on real data.

    The run's folder gets its metrics, curves, configuration and a checkpoint to resume from.
    """
    # The function is long because its arguments are the options.
    from steprule.lab.runs import Asked, go_on, start

    asked = Asked(
        task=task,
        optimizer=optimizer,
        lr=lr,
        settings=settings or [],
        schedule=schedule,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        device=device,
        clip_norm=clip_norm,
    )
    (go_on if resume else start)(asked, out)


@app.command("list", cls=_Command, short_help="List the rules, presets and modifiers.")
def list_rules(
    pattern: Annotated[str, typer.Argument(hidden=True)] = "",
) -> None:
    """List the rules, presets and modifiers, with a sentence about each.

    PATTERN is part of a name, a pattern such as 'ada*', or a word of what they say of when to use them, such as
    memory; without it, all are listed.
    """
    from steprule.lab.rules import print_list

    print_list(pattern)


@app.command(cls=_Command, short_help="Show a rule or modifier: formula, hyper-parameters, source.")
def show(
    rule: Annotated[
        str,
        typer.Argument(hidden=True),
    ],
) -> None:
    """Show a rule, a preset or a modifier: when to use it, its formula, hyper-parameters, state and source.

    RULE is a name from `steprule list`, or FILE.py:CLASS for a rule of your own.
    """
    from steprule.lab.rules import print_rule

    print_rule(rule)


@app.command(cls=_Command, short_help="Time a step of each rule, compared with torch's.")
def bench(
    model: Annotated[
        str,
        _option(
            "--model",
            "NAME",
            "gpt2, resnet18, many-small, mlp, or FILE.py:FUNCTION for your own (default: resnet18)",
        ),
    ] = "resnet18",
    optimizers: Annotated[
        str,
        _option(
            "--optimizers",
            "NAMES",
            "rules, with modifiers as in adamw+ema, separated by commas, or all (default: "
            "adamw,adabelief,lion,sgd)",
        ),
    ] = "adamw,adabelief,lion,sgd",
    dtype: Annotated[str, _option("--dtype", "NAME", "fp32, fp64, bf16 or fp16 (default: fp32)")] = "fp32",
    device: Annotated[str, _option("--device", "NAME", "cpu, cuda, cuda:1 … (default: cpu)")] = "cpu",
    repeats: Annotated[
        int, _option("--repeats", "NUMBER", "samples of each time (default: 15)", _samples)
    ] = 15,
    out: Annotated[
        Path | None,
        _option(
            "--out",
            "FILE.json",
            "where the measurements are kept, with a chart next to them (default: a new file in runs/)",
            _path,
        ),
    ] = None,
) -> None:
    """Time a step of each rule, compared with torch's and with the time to read and write its memory."""
    from steprule.lab.bench import Asked
    from steprule.lab.bench import bench as measure

    measure(Asked(model, optimizers, dtype, device, repeats), out)


@app.command(cls=_Command, short_help="Make a page of runs, a race or measurements.")
def report(
    paths: Annotated[list[str], typer.Argument(hidden=True)],
    out: Annotated[
        Path | None,
        _option(
            "--out",
            "FILE.html",
            "where the page is written (default: report.html, in the folder of a single run or race)",
            _path,
        ),
    ] = None,
    lang: Annotated[str, _option("--lang", "NAME", "en, or zh for Chinese (default: en)")] = "en",
) -> None:
    """Make a page of runs, a race or measurements: one HTML file that needs no network and no other file.

    Each PATH is a run, a folder of runs, a race or tuning, a file that `steprule bench` kept, a log of others
    with a step column (.csv, .tsv, .jsonl), or TensorBoard's event files. Runs that differ in their seed only
    are shown as one, with their range.
    """
    from steprule.lab.reporting.command import report as make

    typer.echo(make([_path(path) for path in paths], out, lang))
