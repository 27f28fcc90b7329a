"""`steprule report`: finds out what the paths are, and writes their page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from steprule.engine.checkpoint.file import replace_file
from steprule.lab.errors import LabError
from steprule.lab.racing.folder import PLAN, RaceFolder
from steprule.lab.reporting.bench_page import bench_page, read_bench
from steprule.lab.reporting.logs import EVENTS, Log, event_files_in, read_event_log, read_run, read_table
from steprule.lab.reporting.logs_page import logs_page
from steprule.lab.reporting.page import MADE_BY, Page, page_text
from steprule.lab.reporting.race_page import race_page
from steprule.lab.reporting.words import Words, words_of
from steprule.lab.run_folder import CONFIG, METRICS

__all__ = ["report", "write_report"]

FILE = "report.html"
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
DEEPEST = 4
ALLOWED = (
    "a run, a race or tuning, a folder of runs, a file of `steprule bench`, a log in .csv, .tsv or .jsonl, or "
    "TensorBoard's event files"
)


def report(paths: Sequence[Path], out: Path | None = None, language: str = "en") -> Path:
    """Write the page of these paths and return its file.

    out: the file; by default report.html in the folder of the run or race, or in this one if there are several.

    Raises `LabError` if they cannot be read, do not go together, or `out` is something else's file.
    """
    say = words_of(language)
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise LabError(f"no such file or folder: {missing[0]}")
    command = shlex.join(["steprule", "report", *map(str, paths)])
    races = [path for path in paths if (path / PLAN).is_file()]
    if races:
        if len(paths) > 1:
            raise LabError(f"'{races[0]}' is a race, which has a page of its own. Make a report of it alone.")
        page = race_page(RaceFolder(races[0]), say)
    else:
        page = _page_of_measurements(paths, command, say)
    only = paths[0] if len(paths) == 1 and (paths[0] / CONFIG).is_file() | bool(races) else None
    file = out or (only or Path()) / FILE
    _write(file, page, say)
    return file


def write_report(folder: Path) -> None:
    """Write report.html into the folder of a race or a tuning. Raises `LabError`."""
    say = words_of("en")
    _write(folder / FILE, race_page(RaceFolder(folder), say), say)


def _page_of_measurements(paths: Sequence[Path], command: str, say: Words) -> Page:
    benches = [path for path in paths if path.suffix.lower() == ".json"]
    if benches and len(benches) < len(paths):
        other = next(path for path in paths if path not in benches)
        raise LabError(f"{benches[0]} and {other} do not go together: one is a bench file, the other is not.")
    if benches:
        return bench_page([(file, read_bench(file)) for file in benches], command, say)
    logs = _logs(paths)
    return logs_page(logs, command, say)


def _logs(paths: Sequence[Path]) -> list[Log]:
    logs: list[Log] = []
    for path in paths:
        found = _logs_in(path, DEEPEST) if path.is_dir() else [_log_of_file(path)]
        if not found:
            raise LabError(f"there is nothing to report in '{path}'. A report is made of {ALLOWED}.")
        logs += found
    return _with_names_apart(logs)


def _log_of_file(file: Path) -> Log:
    if EVENTS in file.name:
        return read_event_log([file], file.parent.resolve().name)
    if file.suffix.lower() in TABLES:
        return read_table(file)
    raise LabError(f"'{file}' is not something to report. A report is made of {ALLOWED}.")


def _logs_in(folder: Path, depth: int) -> list[Log]:
    """The run or events in a folder, else those in the folders within."""
    if (folder / METRICS).is_file() or (folder / CONFIG).is_file():
        return [read_run(folder)]
    files = event_files_in(folder)
    if files:
        return [read_event_log(files, folder.resolve().name)]
    if not depth:
        return []
    inside = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not (entry / PLAN).is_file())
    return [log for entry in inside for log in _logs_in(entry, depth - 1)]


def _with_names_apart(logs: Sequence[Log]) -> list[Log]:
    """The same logs; where names are equal, as much of the paths as tells them apart."""
    names = [log.name for log in logs]
    return [log if names.count(log.name) == 1 else replace(log, name=str(log.path)) for log in logs]


def _write(file: Path, page: Page, say: Words) -> None:
    text = page_text(page, say).encode(errors="backslashreplace")
    try:
        if file.is_dir():
            raise LabError(f"--out {file} is a folder. Give a file, as in {file / FILE}.")
        if file.exists() and MADE_BY.encode() not in file.read_bytes()[:2000]:
            raise LabError(f"{file} exists and is no report of steprule. Give another --out.")
        replace_file(file, lambda stream: stream.write(text))
    except OSError as error:
        raise LabError(f"cannot write {file}: {error.strerror or error}.") from error
