"""What a training shows while it runs: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from steprule.lab.report import pace
from steprule.lab.train import Screen, Training

__all__ = ["progress_on"]

LINE_SECONDS = 3.0


class LiveBar:
    """One line that moves: epoch, bar, loss, validation, time left."""

    def __init__(self, progress: Progress, training: Training) -> None:
        self._progress = progress
        self._bar = progress.add_task("", total=training.steps, completed=training.step, epoch="", numbers="")
        self._epochs = training.config.epochs
        self._validation = ""

    def step(self, step: int, epoch: int, loss: float) -> None:
        """Move the bar."""
        self._progress.update(
            self._bar,
            completed=step,
            epoch=f"epoch {epoch}/{self._epochs}",
            numbers=f"loss {loss:.3f}{self._validation}",
        )

    def validated(self, result: str) -> None:
        """Keep the validation's result in sight."""
        self._validation = f" · validation {result}"


class PlainLines:
    """A line every few seconds, for logs, pipes and continuous integration."""

    def __init__(self, console: Console, training: Training) -> None:
        self._console = console
        self._steps = training.steps
        self._epochs = training.config.epochs
        self._validation = ""
        self._since, self._since_step = time.perf_counter(), training.step

    def step(self, step: int, epoch: int, loss: float) -> None:
        """Print a line if the last is some seconds old."""
        now = time.perf_counter()
        if now - self._since < LINE_SECONDS:
            return
        speed = pace(step - self._since_step, now - self._since)
        self._since, self._since_step = now, step
        self._console.print(
            f"epoch {epoch}/{self._epochs}  step {step}/{self._steps}  loss {loss:.3f}"
            f"{self._validation}  {speed}",
            highlight=False,
            soft_wrap=True,
        )

    def validated(self, result: str) -> None:
        """Keep the validation's result for the next line."""
        self._validation = f"  validation {result}"


@contextmanager
def progress_on(console: Console, training: Training) -> Generator[Screen]:
    """The bar where the console is a terminal, else plain lines."""
    if not console.is_terminal:
        yield PlainLines(console, training)
        return
    with Progress(
        TextColumn("{task.fields[epoch]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        expand=True,
    ) as progress:
        yield LiveBar(progress, training)
