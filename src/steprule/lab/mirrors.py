"""Where the numbers of a run go besides `metrics.jsonl`: TensorBoard's event files, wandb and trackio.

`metrics.jsonl` is what counts: a mirror begins with all that is in it, and one that fails stops no training.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from steprule.lab.errors import LabError, did_you_mean
from steprule.lab.event_files import begin_events, event_of
from steprule.lab.run_folder import EVENTS, RunFolder

__all__ = ["MIRRORS", "check_mirrors", "mirroring"]

PROJECT = "steprule"
# What says where a line belongs, and is not a number of it.
PLACE = ("split", "step", "epoch", "seconds")
# What does not depend on the part of the data.
OF_ALL = ("lr", "gradient_norm", "update_to_weight", "skipped_steps")

Line = Mapping[str, Any]


class EventFile:
    """Writes TensorBoard's event file into the folder of the run."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._file: IO[bytes] = open(folder / EVENTS, "wb")  # noqa: SIM115
        self._began = time.time()
        self._seconds = 0.0
        self._file.write(begin_events(self._began))

    def write(self, line: Line) -> None:
        """Append the numbers of a line, at the time at which its step ended."""
        self._seconds = float(line.get("seconds") or self._seconds)
        self._file.write(event_of(int(line["step"]), self._began + self._seconds, dict(_numbers(line))))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Tracker:
    """Hands the numbers to wandb, or to trackio, which has the same functions."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._module: Any = importlib.import_module(name)
        self._module.init(project=PROJECT, name=folder.resolve().name, config=dict(config))

    def write(self, line: Line) -> None:
        """Log the numbers of a line under its step."""
        self._module.log(dict(_numbers(line)), step=int(line["step"]))

    def close(self) -> None:
        """End the run, so that all of it arrives."""
        self._module.finish()


Mirror = EventFile | Tracker
MIRRORS: dict[str, Callable[[Path, Mapping[str, Any]], Mirror]] = {
    "tensorboard": EventFile,
    "wandb": lambda folder, config: Tracker("wandb", folder, config),
    "trackio": lambda folder, config: Tracker("trackio", folder, config),
}


def _numbers(line: Line) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if name not in PLACE and isinstance(value, int | float):
            yield name if name in OF_ALL else f"{name}/{line['split']}", float(value)


def check_mirrors(names: Sequence[str]) -> None:
    """Refuse names of nothing that numbers can go to, and what is not installed. Raises `LabError`."""
    for name in names:
        if name not in MIRRORS:
            raise LabError(f"--log {name}: there is no such place for numbers. {did_you_mean(name, MIRRORS)}")
        if MIRRORS[name] is not EventFile and importlib.util.find_spec(name) is None:
            raise LabError(f"--log {name} needs {name}: pip install {name}")


@contextmanager
def mirroring(names: Sequence[str], folder: RunFolder, config: Mapping[str, Any]) -> Generator[None]:
    """Inside the block, what is added to the folder's metrics goes to these places, too.

    What is there already goes first. A place that fails is left with one line on standard error.
    """
    opened = [_Steady(name, folder.path, config) for name in dict.fromkeys(names)]
    if opened:
        for line in folder.read_metrics():
            for mirror in opened:
                mirror.write(line)
    folder.mirrors = [mirror.write for mirror in opened]
    try:
        yield
    finally:
        folder.mirrors = []
        for mirror in opened:
            mirror.close()


class _Steady:
    """A mirror whose failure stops nothing."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._name = name
        self._mirror: Mirror | None = None
        self._try(lambda: setattr(self, "_mirror", MIRRORS[name](folder, config)))

    def write(self, line: Line) -> None:
        self._try(lambda: self._mirror and self._mirror.write(line))

    def close(self) -> None:
        self._try(lambda: self._mirror and self._mirror.close())
        self._mirror = None

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a server, a disk or their libraries do
            self._mirror = None
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"steprule: --log {self._name} ends here, the run goes on: {text}", file=sys.stderr)
