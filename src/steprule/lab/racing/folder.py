"""The folder of a race: what is planned, what has been measured, and what it shows.

    plan.json               every training of the race, written before the first one
    trials.jsonl            one line for every training that has ended
    curves/NAME-NUMBER.jsonl    what was measured on the way of one of them
    verdict.json            what the race shows; there once it is complete
    best.txt                a `steprule train` line for each optimizer
    report.html             all of it as a page
    paused/                 while it runs: trainings that wait for others

Losses are validation losses. JSON has no NaN and no infinity: None stands for them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

from steprule.engine.checkpoint.file import replace_file
from steprule.lab.errors import LabError

__all__ = [
    "Contestant",
    "CurvePoint",
    "Plan",
    "PlannedTrial",
    "RaceFolder",
    "Range",
    "Standing",
    "Trial",
    "Verdict",
]

PLAN, TRIALS, CURVES, VERDICT, BEST = "plan.json", "trials.jsonl", "curves", "verdict.json", "best.txt"
PAUSED = "paused"
Read = TypeVar("Read")


@dataclass(frozen=True)
class Range:
    """Where to look for a hyper-parameter.

    scale: "log" for equal ratios, "one_minus" for equal ratios of 1 minus the value, as for decays of averages.
    """

    low: float
    high: float
    scale: Literal["log", "one_minus"] = "log"


@dataclass(frozen=True)
class Contestant:
    """An optimizer in a race.

    name: short, unique and fit for a file's name, as in `adamw` or `torch-adamw`. label: as it is shown.
    optimizer: what --optimizer takes. fixed: settings that all its trials have. default: the values that the
    tuned hyper-parameters have by default. ranges: where they are looked for. gradients_per_step: how often a
    step evaluates the loss and its gradient. evaluated_at: the steps after which the validation loss is
    measured.
    """

    name: str
    label: str
    optimizer: str
    fixed: Mapping[str, Any]
    default: Mapping[str, float]
    ranges: Mapping[str, Range]
    schedule: str
    steps: int
    gradients_per_step: float
    evaluated_at: Sequence[int]


@dataclass(frozen=True)
class PlannedTrial:
    """A training of a race.

    optimizer: the contestant's name. number: from 0, counted for each optimizer. setting: the tuned hyper-
    parameters; None where earlier trials decide: stage "seeds" has the best setting of stage "tune", and a
    trial with `near` a setting near the best so far, `near` being its place in a box around that, from 0 to
    1.
    """

    optimizer: str
    number: int
    stage: Literal["tune", "seeds"]
    seed: int
    default: bool
    steps: int
    setting: Mapping[str, float] | None = None
    near: Sequence[float] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a race computes, and the facts that identify its data and machine.

    kind: "race" or "tune". score: name and unit, None if the task has none. epochs: of a whole training of the
    task, which --fit may have shortened. seeds: the fresh ones of the final trainings. stop_at: the share of
    the steps after which the worse half of an optimizer's first trials stops.
    """

    kind: Literal["race", "tune"]
    command: str
    task: str
    task_label: str
    loss_label: str
    score: tuple[str, str] | None
    device: str
    epochs: int
    batch_size: int
    steps_per_epoch: int
    parameters: int
    budget: Literal["steps", "time"]
    tuned: Sequence[str]
    tuning_seed: int
    seeds: Sequence[int]
    stop_at: float
    facts: Mapping[str, str]
    contestants: Sequence[Contestant]
    trials: Sequence[PlannedTrial]


@dataclass(frozen=True)
class CurvePoint:
    """The validation loss and score after a step. seconds: of training until then, evaluations left out."""

    step: int
    seconds: float
    loss: float | None
    score: float | None


@dataclass(frozen=True)
class Trial:
    """A training that has ended.

    loss, score: the last ones measured; loss is None if it diverged. stopped_at: the step at which it was
    stopped as one of the worse half, or diverged; None if it took all its steps.
    """

    optimizer: str
    number: int
    stage: Literal["tune", "seeds"]
    seed: int
    setting: Mapping[str, float]
    default: bool
    loss: float | None
    score: float | None
    steps: int
    stopped_at: int | None
    diverged: bool
    ms_per_step: float
    seconds: float
    state_bytes_per_element: float


@dataclass(frozen=True)
class Standing:
    """One optimizer's result, on the seeds of the final trainings.

    setting: the chosen one. losses: of each seed, None if it diverged. loss: their geometric mean, or their
    mean where a loss of the race is not positive; None if one of them diverged. interval: where loss lies
    with 95 % confidence; None where it cannot be said. against_lowest: loss as a multiple of the lowest one
    (`Verdict.compared_by` "ratio"), or minus it ("difference"), and against_interval its 95 % interval, which
    holds for all optimizers together. tied: cannot be distinguished from the lowest. at_edge: the hyper-
    parameters whose best value is at the edge of what was tried, with "low" or "high". diverged: how many of
    its trainings.
    """

    optimizer: str
    label: str
    setting: Mapping[str, float]
    losses: Sequence[float | None]
    scores: Sequence[float | None]
    loss: float | None
    interval: tuple[float, float] | None
    against_lowest: float | None
    against_interval: tuple[float, float] | None
    tied: bool
    lowest: bool
    default_loss: float | None
    ms_per_step: float
    state_bytes_per_element: float
    trials: int
    diverged: int
    at_edge: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Verdict:
    """What a race shows.

    sentences: in words, the most important first. notes: what was and was not tuned, and under what
    conditions. smallest_difference: the smallest ratio (or difference) that this many seeds can show.
    seeds_needed: how many would show the widest gap among those that are tied, if it is real; None if that is
    not asked or more than 999.
    """

    sentences: Sequence[str]
    notes: Sequence[str]
    compared_by: Literal["ratio", "difference"]
    smallest_difference: float | None
    seeds_needed: int | None
    standings: Sequence[Standing]


class RaceFolder:
    """One race on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_plan(self, plan: Plan) -> None:
        """Write `plan.json`."""
        self._write(PLAN, _indented(asdict(plan)))

    def read_plan(self) -> Plan:
        """Read `plan.json`. Raises `LabError` if it is missing or invalid."""
        return self._read(PLAN, _plan_from)

    def write_curve(self, optimizer: str, number: int, points: Sequence[CurvePoint]) -> None:
        """Write the curve of a trial."""
        (self.path / CURVES).mkdir(exist_ok=True)
        self._write(f"{CURVES}/{optimizer}-{number}.jsonl", "".join(map(_line, points)))

    def read_curve(self, optimizer: str, number: int) -> list[CurvePoint]:
        """The curve of a trial; empty if there is none."""
        name = f"{CURVES}/{optimizer}-{number}.jsonl"
        if not (self.path / name).exists():
            return []
        return self._read(name, lambda text: [CurvePoint(**json.loads(line)) for line in text.splitlines()])

    def add_trial(self, trial: Trial) -> None:
        """Append a line to `trials.jsonl`."""
        try:
            with open(self.path / TRIALS, "a", encoding="utf-8") as stream:
                stream.write(_line(trial))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise LabError(f"cannot write {self.path / TRIALS}: {error.strerror}.") from error

    def write_trials(self, trials: Sequence[Trial]) -> None:
        """Replace `trials.jsonl` by these."""
        self._write(TRIALS, "".join(map(_line, trials)))

    def read_trials(self) -> list[Trial]:
        """The trials that have ended, in the order of their ends; a line that a kill cut off is left out."""
        if not (self.path / TRIALS).exists():
            return []

        def whole_lines(text: str) -> list[Trial]:
            *lines, _ = text.split("\n")
            return [Trial(**json.loads(line)) for line in lines]

        return self._read(TRIALS, whole_lines)

    def paused(self, optimizer: str, number: int) -> Path:
        """The file of a trial that waits for the others of its optimizer."""
        return self.path / PAUSED / f"{optimizer}-{number}.pt"

    def make_paused(self) -> None:
        """Make the folder for those files."""
        (self.path / PAUSED).mkdir(exist_ok=True)

    def drop_paused(self) -> None:
        """Delete it, at the end of a race."""
        shutil.rmtree(self.path / PAUSED, ignore_errors=True)

    def write_verdict(self, verdict: Verdict) -> None:
        """Write `verdict.json`."""
        self._write(VERDICT, _indented(asdict(verdict)))

    def read_verdict(self) -> Verdict | None:
        """Read `verdict.json`; None while the race is not complete."""
        return self._read(VERDICT, _verdict_from) if (self.path / VERDICT).exists() else None

    def write_best(self, commands: Sequence[str]) -> None:
        """Write `best.txt`, one command a line."""
        self._write(BEST, "".join(f"{command}\n" for command in commands))

    def read_best(self) -> list[str]:
        """The lines of `best.txt`; none while the race is not complete."""
        return self._read(BEST, str.splitlines) if (self.path / BEST).exists() else []

    def _write(self, name: str, text: str) -> None:
        def write(stream: IO[bytes]) -> None:
            # A path may contain bytes that are not text; they are escaped.
            stream.write(text.encode(errors="backslashreplace"))

        try:
            replace_file(self.path / name, write)
        except OSError as error:
            raise LabError(str(error)) from error

    def _read(self, name: str, parse: Callable[[str], Read]) -> Read:
        file = self.path / name
        try:
            return parse(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LabError(f"'{self.path}' is not the folder of a race: it has no {name}.") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise LabError(f"{file} cannot be read as a part of a race: {error}.") from error


def _indented(values: Any) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _line(value: Any) -> str:
    return json.dumps(asdict(value), ensure_ascii=False, allow_nan=False) + "\n"


def _plan_from(text: str) -> Plan:
    values: dict[str, Any] = json.loads(text)
    for one in values["contestants"]:
        one["fixed"] = {name: _as_tuple(value) for name, value in one["fixed"].items()}
        one["ranges"] = {name: Range(**given) for name, given in one["ranges"].items()}
    values["contestants"] = [Contestant(**one) for one in values["contestants"]]
    values["trials"] = [PlannedTrial(**one) for one in values["trials"]]
    values["score"] = _as_tuple(values["score"])
    return Plan(**values)


def _verdict_from(text: str) -> Verdict:
    values: dict[str, Any] = json.loads(text)
    for one in values["standings"]:
        one["interval"] = _as_tuple(one["interval"])
        one["against_interval"] = _as_tuple(one["against_interval"])
    values["standings"] = [Standing(**one) for one in values["standings"]]
    return Verdict(**values)


def _as_tuple(value: Any) -> Any:
    """JSON has lists only."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value
