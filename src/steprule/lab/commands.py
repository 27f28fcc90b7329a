"""The commands of `steprule` and their options."""

from __future__ import annotations

import re
import shlex
import sys
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
        """`RULE` and `PATHS...` for arguments that must be given, not typer's `{rule}` and `{paths}...`."""
        return [re.sub("[{}]", "", piece).upper() for piece in super().collect_usage_pieces(ctx)]


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


_Task = Annotated[
    str | None,
    _option("--task", "NAME", "digits, mnist, text, code, photo or FILE.py:FUNCTION (default: digits)"),
]


_Data = Annotated[
    Path | None,
    _option(
        "--data",
        "PATH",
        "your own data instead of a task: CSV, TSV, Parquet, .npz, .txt, a folder of folders of images, idx "
        "files, or a folder of Hugging Face's save_to_disk",
        _path,
    ),
]
_Target = Annotated[str | None, _option("--target", "COLUMN", "the column of --data to predict")]
_Validation = Annotated[
    Path | None,
    _option(
        "--validation", "PATH", "data to validate with (default: 15 % of --data, and 15 % for a test)", _path
    ),
]
_Size = Annotated[
    int | None, _option("--size", "NUMBER", "height and width for the images of a folder (default: 32)", _count)
]


def _task_of(
    task: str | None, data: Path | None, target: str | None, validation: Path | None, size: int | None
) -> str | None:
    """The name of the task that these options mean."""
    given = {"--target": target, "--validation": validation, "--size": size}
    for name, value in given.items():
        if data is None and value is not None:
            raise typer.BadParameter(f"{name} is a part of --data, which is missing.")
    if data is None:
        return task
    if task is not None:
        raise typer.BadParameter("--task and --data are two ways to say what is trained; give one of them.")
    from steprule.lab.own_data.source import Source

    return Source(data, target, validation, size).name


@app.command(cls=_Command, short_help="Train a model on real data.")
def train(
    task: _Task = None,
    data: _Data = None,
    target: _Target = None,
    validation: _Validation = None,
    size: _Size = None,
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
    log: Annotated[
        str | None,
        _option(
            "--log",
            "NAMES",
            "tensorboard, wandb or trackio, separated by commas: the numbers go there, too (default: only to "
            "metrics.jsonl)",
        ),
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
        task=_task_of(task, data, target, validation, size),
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
    names = [name.strip() for name in (log or "").split(",") if name.strip()]
    (go_on if resume else start)(asked, out, names)


def _names(text: str) -> list[str]:
    """Names that are separated by commas."""
    return [name.strip() for name in text.split(",")]


_Tuned = Annotated[
    str | None,
    _option(
        "--tune",
        "NAMES",
        "the hyper-parameters to tune, separated by commas (default: lr; from 30 minutes on lr,weight_decay)",
    ),
]
_Search = Annotated[
    list[str] | None,
    _option(
        "--search",
        "NAME=LOW..HIGH",
        "where to look, as in --search lr=1e-4..0.1, or --search sgd.lr=0.1..30 for one of several; can be "
        "repeated (default: what each rule declares)",
    ),
]
_Minutes = Annotated[
    float,
    _option(
        "--minutes",
        "NUMBER",
        "how long it may take: below 5, 8 trainings tune each optimizer, and 3 seeds compare; below 30, 16 and "
        "5; from there on 32 and 10 (default: 10)",
        _above_zero,
    ),
]
_Fit = Annotated[bool, typer.Option("--fit", help="shorten every training, so that all fit into --minutes")]
_Trials = Annotated[
    int | None,
    _option("--trials", "NUMBER", "trainings to tune each optimizer (default: by --minutes)", _count),
]
_Seeds = Annotated[
    int | None, _option("--seeds", "NUMBER", "fresh seeds to compare on (default: by --minutes)", _count)
]
_Schedule = Annotated[
    str, _option("--schedule", "NAME", "none, warmup, or cosine with a warm-up (default: cosine)")
]
_Epochs = Annotated[
    int | None,
    _option("--epochs", "NUMBER", "passes over the training data (default: the task's)", _count),
]
_BatchSize = Annotated[
    int | None, _option("--batch-size", "NUMBER", "items per step (default: the task's)", _count)
]
_Seed = Annotated[
    int, _option("--seed", "NUMBER", "the seed to tune on; the fresh ones follow it (default: 0)", _seed)
]
_Device = Annotated[str, _option("--device", "NAME", "cpu, cuda, cuda:1, mps … (default: cpu)")]
_Workers = Annotated[
    int | None,
    _option("--workers", "NUMBER", "trainings at a time, of one thread each (default: 2)", _count),
]
_RaceOut = Annotated[
    Path | None,
    _option("--out", "FOLDER", "where everything is kept (default: a new folder in runs/)", _path),
]
_RaceResume = Annotated[
    bool,
    typer.Option("--resume", help="go on with the one in --out, or the newest in runs/ that is not complete"),
]


@app.command(cls=_Command, short_help="Find out which optimizer trains a task best, each tuned alike.")
def race(
    task: _Task = None,
    data: _Data = None,
    target: _Target = None,
    validation: _Validation = None,
    size: _Size = None,
    optimizers: Annotated[
        str,
        _option(
            "--optimizers",
            "NAMES",
            "rules of `steprule list`, with modifiers as in adamw+ema, FILE.py:CLASS or torch:CLASS, separated "
            "by commas (default: adamw,lion,muon,sgd)",
        ),
    ] = "adamw,lion,muon,sgd",
    minutes: _Minutes = 10.0,
    fit: _Fit = False,
    budget: Annotated[
        str,
        _option(
            "--budget",
            "NAME",
            "what is the same for all: steps (gradients), or time, that of the first one's steps (default: "
            "steps)",
        ),
    ] = "steps",
    tuned: _Tuned = None,
    search: _Search = None,
    trials: _Trials = None,
    seeds: _Seeds = None,
    schedule: _Schedule = "cosine",
    epochs: _Epochs = None,
    batch_size: _BatchSize = None,
    seed: _Seed = 0,
    device: _Device = "cpu",
    workers: _Workers = None,
    out: _RaceOut = None,
    resume: _RaceResume = False,
) -> None:
    """Tune several optimizers alike, train each on fresh seeds, and say what that shows.

    Every optimizer gets the same number of gradients, data order, schedule and start. Its default setting is
    the first one tried. The result says which ones cannot be distinguished.
    """
    # The function is long because its arguments are the options.
    from steprule.lab.racing.race import Asked, go_on, start

    if resume:
        go_on("race", out, workers)
        return
    asked = Asked(
        kind="race",
        command=_typed_command(),
        task=_task_of(task, data, target, validation, size),
        optimizers=_names(optimizers),
        tuned=None if tuned is None else _names(tuned),
        search=search or [],
        minutes=minutes,
        fit=fit,
        budget=budget,
        trials=trials,
        seeds=seeds,
        schedule=schedule,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        device=device,
        workers=workers,
    )
    start(asked, out)


@app.command(cls=_Command, short_help="Tune an optimizer on a task.")
def tune(
    task: _Task = None,
    data: _Data = None,
    target: _Target = None,
    validation: _Validation = None,
    size: _Size = None,
    optimizer: Annotated[
        str, _option("--optimizer", "NAME", "as for `steprule train` (default: adamw)")
    ] = "adamw",
    minutes: _Minutes = 10.0,
    fit: _Fit = False,
    tuned: _Tuned = None,
    search: _Search = None,
    trials: _Trials = None,
    seeds: _Seeds = None,
    schedule: _Schedule = "cosine",
    epochs: _Epochs = None,
    batch_size: _BatchSize = None,
    seed: _Seed = 0,
    device: _Device = "cpu",
    workers: _Workers = None,
    out: _RaceOut = None,
    resume: _RaceResume = False,
) -> None:
    """Tune an optimizer, and compare its best setting with its default on fresh seeds.

    It ends with the `steprule train` line to use.
    """
    from steprule.lab.racing.race import Asked, go_on, start

    if resume:
        go_on("tune", out, workers)
        return
    asked = Asked(
        kind="tune",
        command=_typed_command(),
        task=_task_of(task, data, target, validation, size),
        optimizers=[optimizer],
        tuned=None if tuned is None else _names(tuned),
        search=search or [],
        minutes=minutes,
        fit=fit,
        budget="steps",
        trials=trials,
        seeds=seeds,
        schedule=schedule,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        device=device,
        workers=workers,
    )
    start(asked, out)


def _typed_command() -> str:
    """The command as it was typed, to repeat it."""
    return shlex.join(["steprule", *sys.argv[1:]])


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
