"""What is printed about a run: at its start, and when it is done."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import IO, Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steprule.lab.errors import LabError
from steprule.lab.modes import parts_in_eval_mode
from steprule.lab.optimizer_classes import optimizer_label, usual_settings
from steprule.lab.run_folder import RunConfig, RunFolder
from steprule.lab.tasks import loss_text, score_text
from steprule.lab.train import Training

__all__ = [
    "SAID",
    "Line",
    "extras_text",
    "final_lines",
    "hyperparameter_text",
    "open_console",
    "pace",
    "print_header",
    "print_results",
]

Line = Mapping[str, Any]

WIDTH_OF_LOGS = 160
# How many times the first step's loss the last epoch's must be for a word about it.
GROWTH = 10
# What a user cannot know of a task that was made from a file.
SAID = ("target", "inputs", "left out")


def open_console() -> Console:
    """Standard output: as wide as the terminal or as COLUMNS says, otherwise wide enough for a log."""
    console = Console(
        markup=False, highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto"
    )
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_LOGS
    if not console.is_terminal:
        console.file = cast(IO[str], _WithoutTrailingBlanks(console.file))
    return console


class _WithoutTrailingBlanks:
    """A text stream; the blanks with which rich fills lines up to the width of a table are left out."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text without blanks at the ends of lines."""
        self._stream.write(re.sub(r" +\n", "\n", text))
        return len(text)


def hyperparameter_text(config: RunConfig) -> str:
    """The learning rate, and every other hyper-parameter that is not at its default."""
    usual = usual_settings(config.optimizer)
    return ", ".join(
        f"{name} {value}"
        for name, value in config.hyperparameters.items()
        if name == "lr" or value != usual[name]
    )


def print_header(console: Console, training: Training, folder: RunFolder) -> None:
    """Print what will be trained, on how much data, and where it is kept."""
    config = training.config
    count = sum(parameter.numel() for parameter in training.model.parameters())
    sizes = ", ".join(f"{len(data):,} {name}" for name, data in training.splits().items())
    rows = {
        "task": f"{config.task_label}, {count:,} parameters; items: {sizes}",
        "optimizer": ", ".join(filter(None, (optimizer_label(config.optimizer), hyperparameter_text(config)))),
        "length": f"{config.epochs} × {training.steps_per_epoch} steps on {config.batch_size} items each, "
        f"schedule {config.schedule}, seed {config.seed}{extras_text(config)}",
        "folder": f"{folder.path}/",
    }
    rows |= {name: training.task.facts[name] for name in SAID if name in training.task.facts}
    still = parts_in_eval_mode(training.model)
    if still:
        rows["eval mode"] = f"stays on: {', '.join(still)}"
    if training.step == training.steps:
        longer = "; a larger --epochs continues it" if training.schedule is None else ""
        rows["resumed"] = f"the run is complete, there is nothing left to train{longer}"
    elif training.step:
        rows["resumed"] = f"after step {training.step} of {training.steps}"
    grid = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        grid.add_row(Text(name, style="dim"), Text(text))
    console.print(grid)


def extras_text(config: RunConfig) -> str:
    """Clipping and device, if they are not the default, as the end of a list."""
    clip = "" if config.clip_norm is None else f", gradients clipped to norm {config.clip_norm:g}"
    return clip if config.device == "cpu" else f"{clip}, on {config.device}"


def print_results(console: Console, training: Training, lines: Sequence[Line], folder: RunFolder) -> None:
    """Print the final table: loss and score on each part of the data, time, and what was written."""
    if not lines:
        return
    score = training.task.score
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("", "items", "loss", *([score.label] if score else [])):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, line in final_lines(lines).items():
        items = f"{len(training.splits()[name]):,}"
        note = " (while learning, last epoch)" if name == "train" else ""
        numbers = [loss_text(line["loss"])] + ([score_text(line[score.name])] if score else [])
        table.add_row(name + note, items, *numbers)
    console.print()
    console.print(table)
    first, last = float(lines[0]["loss"]), float(final_lines(lines)["train"]["loss"])
    if lines[0]["split"] == "train" and last > GROWTH * abs(first) > 0:
        grown = f"the loss grew from {loss_text(first)} to {loss_text(last)}"
        console.print(Text(f"\n{grown}: training diverges. Try a smaller --lr."))
    console.print(
        f"\n{training.step} steps in {training.seconds:.1f} s ({pace(training.step, training.seconds)})"
    )
    try:
        written = ", ".join(sorted(entry.name for entry in folder.path.iterdir()))
    except OSError as error:  # deleted in the meantime
        raise LabError(f"cannot read the folder '{folder.path}': {error.strerror}.") from error
    console.print(Text(f"in {folder.path}: {written}", overflow="fold"))


def pace(steps: int, seconds: float) -> str:
    """Steps per second, as a whole number unless they are slow."""
    per_second = steps / max(seconds, 1e-9)
    return f"{per_second:.0f} steps/s" if per_second >= 10 else f"{per_second:.2g} steps/s"


def final_lines(lines: Sequence[Line]) -> dict[str, Line]:
    """The last result on each part; for `train` the mean over the last epoch's steps."""
    last = {line["split"]: line for line in lines}
    steps = [x for x in lines if x["split"] == "train" and x["epoch"] == last["train"]["epoch"]]
    return {**last, "train": {key: _mean([x[key] for x in steps]) for key in last["train"] if key != "split"}}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
