"""What a training shows while it runs: a line for every epoch, and on a terminal a live bar below them."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from steprule.lab.tasks import loss_text
from steprule.lab.train import Screen, Training

__all__ = ["progress_on"]

LINE_SECONDS = 60.0


class EpochLines:
    """A line for every epoch, and in long epochs one a minute, for logs, pipes and continuous integration."""

    def __init__(self, console: Console, training: Training) -> None:
        self._console = console
        self._steps, self._epochs = training.steps, training.config.epochs
        self._losses: list[float] = []
        self._began, self._first = time.perf_counter(), training.step
        self._shown, self._step = self._began, training.step
        self._epoch = training.step // training.steps_per_epoch

    def step(self, step: int, epoch: int, loss: float) -> None:
        """Record the step; print a line if the last one is a minute old."""
        self._step, self._epoch = step, epoch
        self._losses.append(loss)
        if time.perf_counter() - self._shown >= LINE_SECONDS:
            self._print(f"step {step}/{self._steps}")

    def validated(self, result: str) -> None:
        """Print the epoch's line."""
        self._print(f"validation {result}")
        self._losses.clear()

    def _print(self, more: str) -> None:
        self._shown = time.perf_counter()
        # Nothing has been trained yet if a resumed run begins with the validation at which it stopped.
        steps = max(1, self._step - self._first)
        left = (self._shown - self._began) / steps * (self._steps - self._step)
        loss = f"loss {loss_text(sum(self._losses) / len(self._losses))}  " if self._losses else ""
        self._console.print(
            f"epoch {self._epoch}/{self._epochs}  {loss}{more}  ETA {clock(left)}",
            highlight=False,
            soft_wrap=True,
        )


class LiveBar(EpochLines):
    """The same lines, and a live one below them: epoch, bar, loss, time left."""

    def __init__(self, progress: Progress, training: Training) -> None:
        super().__init__(progress.console, training)
        self._progress = progress
        self._bar = progress.add_task("", total=training.steps, completed=training.step, epoch="", loss="")

    def step(self, step: int, epoch: int, loss: float) -> None:
        """Move the bar."""
        super().step(step, epoch, loss)
        number, value = f"epoch {epoch}/{self._epochs}", f"loss {loss_text(loss)}"
        self._progress.update(self._bar, completed=step, epoch=number, loss=value)


def clock(seconds: float) -> str:
    """Minutes and seconds, as on a clock, with hours where there are some: 0:07, 12:00, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_on(console: Console, training: Training) -> Generator[Screen]:
    """The bar if the console is a terminal, otherwise plain lines."""
    if not console.is_terminal:
        yield EpochLines(console, training)
        return
    with Progress(
        TextColumn("{task.fields[epoch]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        expand=True,
    ) as progress:
        yield LiveBar(progress, training)
