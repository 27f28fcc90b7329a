"""Logs of trainings: our own run folders, other people's tables with a step column, TensorBoard's files."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from steprule.lab.errors import LabError
from steprule.lab.event_files import read_events
from steprule.lab.run_folder import CONFIG, METRICS, RunConfig, RunFolder

__all__ = [
    "EVENTS",
    "Key",
    "Log",
    "Number",
    "event_files_in",
    "falls",
    "read_event_log",
    "read_run",
    "read_table",
]

EVENTS = "tfevents"
STEPS = (
    "step",
    "steps",
    "global_step",
    "_step",
    "iteration",
    "iter",
    "iterations",
    "epoch",
    "trainer/global_step",
)
SECONDS = ("seconds", "elapsed", "_runtime", "time", "wall time", "wall_time", "_timestamp", "timestamp")
SPLIT = "split"
# Columns that count or tell the time, and are not drawn against a step.
CLOCKS = {*STEPS, *SECONDS, SPLIT}
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "eval": "validation",
    "test": "test",
}
FIRST = re.compile(rf"({'|'.join(SPLITS)})[/_ .:-]+(.+)", re.IGNORECASE)
LAST = re.compile(rf"(.+)[/_ .:-]+({'|'.join(SPLITS)})", re.IGNORECASE)
# Times above this are since 1970; no training takes that long.
SINCE_1970 = 5e8

# Words in the names of quantities of which less is better.
FALLING = ("loss", "error", "perplexity", "nll", "mse", "mae")

Key = tuple[str, str]
"""Which part of the data ("train", "validation", "test" or ""), and which quantity."""


@dataclass(frozen=True)
class Number:
    """A number that was logged. seconds: since the beginning, NaN if it is not known."""

    step: float
    seconds: float
    value: float


@dataclass(frozen=True)
class Log:
    """What was logged of one training. config: of a run of `steprule train`."""

    name: str
    path: Path
    curves: Mapping[Key, Sequence[Number]]
    config: RunConfig | None = None


def falls(name: str) -> bool:
    """Whether less of a quantity is better."""
    return any(word in name.lower() for word in FALLING)


def read_run(folder: Path) -> Log:
    """A run of `steprule train`, or what a `steprule.lab.Logger` wrote. Raises `LabError`."""
    config = RunFolder(folder).load_config() if (folder / CONFIG).exists() else None
    file = folder / METRICS
    if not file.exists():
        raise LabError(f"'{folder}' has no {METRICS}: nothing was logged in it.")
    return Log(_name(folder), folder, _curves(_json_lines(file), file), config)


def read_table(file: Path) -> Log:
    """A CSV, TSV or JSON-lines file with a step column. Raises `LabError` that says where it is not one."""
    rows = _json_lines(file) if file.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(file)
    curves = _curves(rows, file)
    # TensorBoard's own export calls every quantity the same.
    named = {(split, file.stem if name == "value" else name): x for (split, name), x in curves.items()}
    return Log(_name(file.with_suffix("")), file, named)


def event_files_in(folder: Path) -> list[Path]:
    """TensorBoard's files in a folder itself, oldest first."""
    return sorted(file for file in folder.glob(f"*{EVENTS}*") if file.is_file())


def read_event_log(files: Sequence[Path], name: str) -> Log:
    """The numbers of TensorBoard's files of one training. Raises `LabError`."""
    found: dict[Key, dict[int, Number]] = {}
    scalars = [scalar for file in files for scalar in read_events(file)]
    first = min((scalar.seconds for scalar in scalars), default=0.0)
    for scalar in scalars:
        # A resumed training logs some steps again: the last word counts.
        number = Number(scalar.step, scalar.seconds - first, scalar.value)
        found.setdefault(_key(scalar.tag), {})[scalar.step] = number
    if not found:
        raise LabError(f"{files[0]} has no numbers: only scalars are read.")
    curves = {key: [number for _, number in sorted(x.items())] for key, x in found.items()}
    return Log(name, files[0], curves)


def _name(path: Path) -> str:
    return path.name or path.resolve().name


def _key(name: str) -> Key:
    """`val_loss`, `loss/val` and `eval/loss` are all the loss on validation data."""
    if match := FIRST.fullmatch(name):
        return SPLITS[match[1].lower()], match[2]
    if match := LAST.fullmatch(name):
        return SPLITS[match[2].lower()], match[1]
    return "", name


def _json_lines(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"cannot read {file}: {_why(error)}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines):  # it is being written
                return
            raise LabError(f"{file}, line {number}: not JSON.") from None
        if not isinstance(value, dict):
            raise LabError(f"{file}, line {number}: a JSON object with a step is needed, not {line[:40]}.")
        yield number, dict(_flat(cast("dict[str, Any]", value)))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(cast("dict[str, Any]", value), f"{before}{name}/")
        else:
            yield f"{before}{name}", value


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            separator = max("\t;,", key=first.count)
            reader = csv.DictReader(stream, delimiter=separator, restval="")
            for row in reader:
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabError(f"cannot read {file}: {_why(error)}.") from error


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    return str(error.strerror if isinstance(error, OSError) else error)


def _curves(rows: Iterable[tuple[int, Mapping[str, Any]]], file: Path) -> dict[Key, list[Number]]:
    found: dict[Key, list[Number]] = {}
    start = math.nan
    seconds_at: dict[float, float] = {}
    step_name = ""
    for line, row in rows:
        names = {str(name).lower(): str(name) for name in row}
        step_name = next((names[x] for x in STEPS if x in names and row[names[x]] not in ("", None)), "")
        if not step_name:
            raise LabError(
                f"{file}, line {line}: no step. It needs a column called {', '.join(STEPS[:4])} or {STEPS[7]}; "
                f"there are: {', '.join(names.values()) or 'none'}."
            )
        step = _number(row[step_name])
        if step is None or not math.isfinite(step):
            raise LabError(f"{file}, line {line}: {step_name} is {row[step_name]!r}, must be a number.")
        seconds = next(
            (x for name in SECONDS if name in names and (x := _number(row[names[name]])) is not None), None
        )
        if seconds is not None:
            start = (seconds if seconds > SINCE_1970 else 0.0) if math.isnan(start) else start
            seconds_at[step] = seconds - start
        split = str(row[names[SPLIT]]) if SPLIT in names else None
        for name, text in row.items():
            value = None if str(name).lower() in CLOCKS else _number(text)
            if text is None and falls(str(name)):
                value = math.nan  # JSON has no NaN; in a table, an empty cell is text
            if value is not None:
                key = _key(str(name)) if split is None else (SPLITS.get(split.lower(), split), str(name))
                found.setdefault(key, []).append(Number(step, seconds_at.get(step, math.nan), value))
    if not found:
        raise LabError(f"{file} has no numbers to draw.")
    return {key: sorted(numbers, key=lambda number: number.step) for key, numbers in found.items()}


def _number(value: Any) -> float | None:
    """A number, or text that is one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
