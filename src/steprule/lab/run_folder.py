"""The folder of one run: its configuration, its metrics, and a checkpoint that a kill cannot damage."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import unquote, urlsplit

import torch

from steprule.engine.checkpoint.file import TEMPORARY, replace_file, save_checkpoint
from steprule.lab.errors import LabError
from steprule.lab.optimizer_classes import optimizer_label

__all__ = ["RUNS", "RunConfig", "RunFolder", "find_run", "lock", "new_run_folder", "next_numbered"]

RUNS = Path("runs")
CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.pt"
# TensorBoard looks for files with "tfevents" in their names.
EVENTS = "events.out.tfevents.steprule"
OWN_FILES = (CONFIG, METRICS, EVENTS, f"{CONFIG}{TEMPORARY}", f"{CHECKPOINT}{TEMPORARY}")
METRICS_BYTES = "metrics_bytes"
WHOLE_NUMBERS = ("epochs", "batch_size", "seed", "threads")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes, and the facts that identify its data."""

    task: str
    optimizer: str
    hyperparameters: Mapping[str, Any]
    schedule: str
    epochs: int
    batch_size: int
    seed: int
    threads: int
    device: str = "cpu"
    clip_norm: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def task_label(self) -> str:
        """The task's name without the path of its file."""
        if self.task.startswith("file:"):
            return Path(unquote(urlsplit(self.task).path)).name.partition(".")[0]
        file, _, name = self.task.rpartition(":")
        return f"{Path(file).stem}-{name}" if file else name

    @property
    def label(self) -> str:
        """Task and optimizer as a part of a folder's name."""
        return f"{self.task_label}-{optimizer_label(self.optimizer).lower().replace('torch.optim.', 'torch-')}"


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: IO[bytes] | None = None
        # Called with every line that is added to the metrics.
        self.mirrors: list[Callable[[Mapping[str, Any]], object]] = []

    def save_config(self, config: RunConfig) -> None:
        """Write `config.json`."""
        text = json.dumps(asdict(config), indent=2, ensure_ascii=False) + "\n"
        # A path may contain bytes that are not text; they are escaped.
        self.write(CONFIG, lambda stream: stream.write(text.encode(errors="backslashreplace")))

    def load_config(self) -> RunConfig:
        """Read `config.json`. Raises `LabError` if it is missing or invalid."""
        file = self.path / CONFIG
        try:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            settings: dict[str, Any] = values["hyperparameters"]
            for name, value in settings.items():
                settings[name] = tuple(cast("list[Any]", value)) if isinstance(value, list) else value
            config = RunConfig(**values)
            if not all(type(values[name]) is int for name in WHOLE_NUMBERS):
                raise TypeError(f"{', '.join(WHOLE_NUMBERS)} must be whole numbers")
        except FileNotFoundError:
            raise LabError(f"'{self.path}' is not the folder of a run: it has no {CONFIG}.") from None
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise LabError(f"{file} cannot be read as a run's configuration: {error}.") from error
        return config

    def write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Write a file of the folder completely, or keep the previous one. Raises `LabError`."""
        try:
            replace_file(self.path / name, write)
        except OSError as error:
            raise LabError(str(error)) from error

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to continue, or to lose: a checkpoint or metrics."""
        metrics = self.path / METRICS
        return (self.path / CHECKPOINT).exists() or (metrics.exists() and metrics.stat().st_size > 0)

    @contextmanager
    def opened(self) -> Generator[None]:
        """Reserve the run for this process; the methods below need that.

        Raises `LabError` if the folder cannot be written or another process trains in it.
        """
        file = self.path / METRICS
        try:
            stream = open(file, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise LabError(f"cannot write {file}: {error.strerror}.") from error
        with stream:
            lock(stream, self.path)
            self._metrics = stream
            yield
        self._metrics = None

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, or nothing."""
        metrics, text = self._opened(), json.dumps(line).encode() + b"\n"
        with self._writing_metrics():
            end = metrics.seek(0, os.SEEK_END)
            try:
                written = metrics.write(text)
                if written != len(text):  # a disk that is nearly full accepts only a part
                    metrics.write(text[written:])
            except OSError:
                metrics.truncate(end)
                raise
        for mirror in self.mirrors:
            mirror(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`."""
        try:
            text = (self.path / METRICS).read_text(encoding="utf-8")
        except OSError as error:
            raise LabError(f"cannot read {self.path / METRICS}: {error.strerror}.") from error
        return [json.loads(line) for line in text.splitlines()]

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by this state and the length of the metrics, or keep the previous one."""
        metrics = self._opened()
        with self._writing_metrics():
            os.fsync(metrics.fileno())
            full = {**state, METRICS_BYTES: metrics.seek(0, os.SEEK_END)}
        try:
            save_checkpoint(self.path / CHECKPOINT, full)
        except (OSError, TypeError) as error:
            raise LabError(str(error)) from error

    def load_checkpoint(self) -> dict[str, Any]:
        """Read the checkpoint, checking every byte and running no code in it; nothing is written.

        Raises `LabError` if it is missing or damaged, or if the metrics are shorter than it says.
        """
        file = self.path / CHECKPOINT
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} is not what was written")
            state = cast("dict[str, Any]", torch.load(file, map_location="cpu", weights_only=True))
            metrics_bytes = int(state[METRICS_BYTES])
        except FileNotFoundError:
            raise LabError(f"'{self.path}' has no {CHECKPOINT} to resume from. Start a new run.") from None
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise LabError(
                f"{file} is damaged or not a checkpoint ({type(error).__name__}); the run cannot be resumed."
            ) from error
        if self._opened().seek(0, os.SEEK_END) < metrics_bytes:
            raise LabError(
                f"{self.path / METRICS} has lost lines since its checkpoint; the run cannot be resumed."
            )
        return state

    def cut_metrics(self, state: Mapping[str, Any]) -> None:
        """Drop the lines of `metrics.jsonl` that were written after this checkpoint."""
        with self._writing_metrics():
            self._opened().truncate(state[METRICS_BYTES])

    def cut_metrics_after(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of `metrics.jsonl` from the first one of a later step on; returns what is kept."""
        file, kept, end = self.path / METRICS, list[dict[str, Any]](), 0
        try:
            for line in file.read_bytes().splitlines(keepends=True):
                values = (
                    json.loads(line) if line.endswith(b"\n") else {"step": step + 1}
                )  # not written to its end
                if int(values["step"]) > step:
                    break
                kept.append(values)
                end += len(line)
        except OSError as error:
            raise LabError(f"cannot read {file}: {error.strerror}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise LabError(f"{file} has a line {len(kept) + 1} that is not one of a log.") from error
        self.cut_metrics({METRICS_BYTES: end})
        return kept

    @contextmanager
    def _writing_metrics(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise LabError(f"cannot write {self.path / METRICS}: {error.strerror}.") from error

    def _opened(self) -> IO[bytes]:
        if self._metrics is None:
            raise RuntimeError("a RunFolder is read and written inside `with folder.opened():`")
        return self._metrics


def new_run_folder(out: Path | None, label: str) -> RunFolder:
    """Make the folder `out`, or the next free `runs/LABEL-1`, `-2` …, for a new run.

    A run that was stopped before its first checkpoint starts again in its folder. Raises `LabError` if `out`
    holds anything else or cannot be written.
    """
    try:
        if out is None:
            return RunFolder(next_numbered(label))
        out.mkdir(parents=True, exist_ok=True)
        held = sorted(entry.name for entry in out.iterdir())
    except OSError as error:
        raise LabError(f"cannot make the folder '{out or RUNS}': {error.strerror}.") from error
    folder = RunFolder(out)
    if CONFIG in held and folder.has_begun:
        raise LabError(f"'{out}' already holds a run. Continue it with --resume, or give another --out.")
    foreign = [name for name in held if name not in OWN_FILES]
    if foreign or folder.has_begun:
        raise LabError(f"'{out}' is not empty (it holds {(foreign or held)[0]}). Give another --out.")
    return folder


def next_numbered(label: str) -> Path:
    """Make the next free folder `runs/LABEL-1`, `-2` …."""
    RUNS.mkdir(exist_ok=True)
    number = 1
    while True:
        path = RUNS / f"{label}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def find_run(out: Path | None, fits: Callable[[RunConfig], bool]) -> RunFolder:
    """The run to resume: the one in `out`, or the newest in `runs/` whose configuration fits."""
    if out is not None:
        return RunFolder(out)
    for path in sorted((file.parent for file in RUNS.glob(f"*/{CONFIG}")), key=_age):
        folder = RunFolder(path)
        if fits(folder.load_config()):
            return folder
    raise LabError(
        f"no run in '{RUNS}/' fits these options, so there is none to resume. "
        "Leave out --resume to start one, or name its folder with --out."
    )


def _age(path: Path) -> int:
    checkpoint = path / CHECKPOINT
    return -(checkpoint if checkpoint.exists() else path / CONFIG).stat().st_mtime_ns


def lock(stream: IO[bytes], path: Path) -> None:
    """Reserve the folder for this process while the stream is open. Raises `LabError` if another one has it."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LabError(f"another process is training in '{path}' now.") from None
    except OSError:  # file systems that cannot lock
        pass
