"""The commands of `steprule`: what can be said on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    help="Write an optimizer's step rule once. Here: look at the rules, and train with them.",
    add_completion=False,
)


@app.command()
def train(
    task: Annotated[
        str | None,
        typer.Option(help="digits, text, photo or FILE.py:FUNCTION", show_default="digits"),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="a rule of `steprule list`", show_default="adabelief")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate", show_default="the rule's")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="a hyper-parameter, as in --set betas=0.9,0.95"),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="none, warmup, or cosine (with warm-up)", show_default="none"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, show_default="the task's")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, show_default="the task's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, show_default="0")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="a folder for this run", show_default="runs/TASK-OPTIMIZER-NUMBER"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in --out, or the newest in runs/")
    ] = False,
) -> None:
    """Train a model on real data; keep metrics, curves, configuration and a checkpoint."""
    from steprule.lab.runs import Asked, go_on, start

    asked = Asked(task, optimizer, lr, settings or [], schedule, epochs, batch_size, seed)
    (go_on if resume else start)(asked, out)


@app.command("list")
def list_rules(
    pattern: Annotated[str, typer.Argument(help="part of a name, or a pattern such as 'ada*'")] = "",
) -> None:
    """List the rules, in a line each."""
    from steprule.lab.rules import print_list

    print_list(pattern)


@app.command()
def show(rule: Annotated[str, typer.Argument(help="a rule of `steprule list`")]) -> None:
    """Show a rule: formula, when to use it, hyper-parameters, state, source."""
    from steprule.lab.rules import print_rule

    print_rule(rule)


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="gpt2, resnet18, many-small, mlp or FILE.py:FUNCTION, which returns a model")
    ] = "gpt2",
    optimizers: Annotated[
        str, typer.Option(help="rules of `steprule list` with commas between, or all")
    ] = "adamw,rmsprop,nadam,adabelief",
    dtype: Annotated[str, typer.Option(help="fp32, fp64, bf16 or fp16")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Annotated[int, typer.Option(min=2, help="samples of everything")] = 15,
    out: Annotated[
        Path | None,
        typer.Option(help="a .json file; a chart goes beside it", show_default="runs/bench-MODEL-NUMBER.json"),
    ] = None,
) -> None:
    """Measure how long a step takes, beside torch's and beside what the memory allows."""
    from steprule.lab.bench import Asked
    from steprule.lab.bench import bench as measure

    measure(Asked(model, optimizers, dtype, device, repeats), out)
