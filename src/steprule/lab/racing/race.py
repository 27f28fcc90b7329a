"""Starting a race or a tuning, resuming one, and what comes after the last training."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.text import Text

import steprule
from steprule.errors import counted
from steprule.lab.bench_machine import facts as machine_facts
from steprule.lab.devices import find_device
from steprule.lab.errors import LabError, Stopped, did_you_mean
from steprule.lab.optimizer_classes import optimizer_facts
from steprule.lab.optimizers import SCHEDULES
from steprule.lab.progress import clock
from steprule.lab.racing.conduct import Conductor
from steprule.lab.racing.contestants import Entrant, entrants
from steprule.lab.racing.folder import Contestant, Plan, RaceFolder
from steprule.lab.racing.planning import (
    FEWEST_SEEDS,
    FEWEST_TRIALS,
    STOP_AT,
    Budget,
    Size,
    contestants_of,
    race_seconds,
    size_for,
    trials_of,
)
from steprule.lab.racing.screen import print_verdict, race_screen
from steprule.lab.racing.trial import Measured, measure
from steprule.lab.racing.verdict import FEW_ITEMS, VALIDATION_ITEMS, best_commands, verdict_of
from steprule.lab.racing.workers import workers
from steprule.lab.report import SAID, open_console
from steprule.lab.reporting.command import write_report
from steprule.lab.run_folder import RUNS, RunConfig, lock, next_numbered
from steprule.lab.runs import facts_of, full_name
from steprule.lab.tasks import BUILT_IN, load_task

__all__ = ["Asked", "go_on", "start"]

SHORTEST = 10


@dataclass(frozen=True)
class Asked:
    """The options of `steprule race` and `tune`; None if not given."""

    kind: Literal["race", "tune"]
    command: str
    task: str | None
    optimizers: Sequence[str]
    tuned: Sequence[str] | None
    search: Sequence[str]
    minutes: float
    fit: bool
    budget: str
    trials: int | None
    seeds: int | None
    schedule: str
    epochs: int | None
    batch_size: int | None
    seed: int
    device: str
    workers: int | None

    def size(self) -> Size:
        """How thorough it is. Raises `LabError` for fewer trainings than a verdict needs."""
        usual = size_for(self.minutes)
        usual = replace(usual, seeds=min(usual.seeds, FEWEST_SEEDS)) if self.kind == "tune" else usual
        tuned = usual.tuned if self.tuned is None else tuple(dict.fromkeys(self.tuned))
        size = Size(self.trials or usual.trials, self.seeds or usual.seeds, tuned)
        if size.trials < FEWEST_TRIALS or size.seeds < FEWEST_SEEDS:
            raise LabError(
                f"{size.trials} trials and {size.seeds} seeds show too little; at least {FEWEST_TRIALS} trials "
                f"and {FEWEST_SEEDS} seeds are needed. To take less time, add --fit, which shortens every "
                "training."
            )
        return size

    def worker_count(self) -> int:
        """Two processes, or one on one core."""
        return self.workers or min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


def start(asked: Asked, out: Path | None) -> None:
    """Plan a race and carry it out. Nothing is written before every optimizer has been tried."""
    if asked.schedule not in SCHEDULES:
        raise LabError(f"no schedule '{asked.schedule}'. {did_you_mean(asked.schedule, SCHEDULES)}")
    if asked.budget not in ("steps", "time"):
        raise LabError(f"no budget '{asked.budget}'. Give steps or time.")
    size = asked.size()
    found = entrants(asked.optimizers, size.tuned, asked.search)
    device = str(find_device(asked.device))
    name = full_name(BUILT_IN[0] if asked.task is None else asked.task)
    console = open_console()
    task = load_task(name)
    config = RunConfig(
        task=name,
        optimizer="",
        hyperparameters={},
        schedule=asked.schedule,
        epochs=asked.epochs or task.epochs,
        batch_size=asked.batch_size or task.batch_size,
        seed=asked.seed,
        threads=1,
        device=device,
    )
    console.print(Text(f"trying {counted(len(found), 'optimizer')} on {config.task_label} …", style="dim"))
    measured = [
        measure(replace(config, optimizer=x.optimizer, hyperparameters={**x.fixed, **x.default})) for x in found
    ]
    contestants, seconds = _contestants(asked, size, found, measured)
    plan = _plan(asked, size, config, contestants, measured[0])
    _say_plan(console, plan, size, seconds)
    folder = RaceFolder(_new_folder(out, f"{config.task_label}-{asked.kind}"))
    folder.write_plan(plan)
    _carry_out(console, plan, folder, asked.worker_count())


def _contestants(
    asked: Asked, size: Size, found: Sequence[Entrant], measured: Sequence[Measured]
) -> tuple[list[Contestant], float]:
    """The contestants with their steps, and how long all will take. Raises `LabError` if it is too long."""
    whole = measured[0].training.steps
    seeds = size.seeds * (2 if asked.kind == "tune" else 1)
    limit = 60 * asked.minutes

    def at(steps: int) -> tuple[list[Contestant], float, float]:
        contestants = contestants_of(found, measured, Budget(asked.budget, steps), asked.schedule)
        return contestants, *race_seconds(contestants, measured, size, seeds, asked.worker_count())

    contestants, fixed, going = at(whole)
    if fixed + going <= limit:
        return contestants, fixed + going
    steps = int(whole * max(0.0, limit - fixed) / going)
    needed = f"--minutes {max(1, round((fixed + going) / 60 + 0.5))}"
    if steps < max(1, whole // SHORTEST):
        least = (fixed + going / SHORTEST) / 60
        raise LabError(
            f"it would take {_duration(fixed + going)}. In {asked.minutes:g} minutes, every training would "
            f"have less than a tenth of its {whole:,} steps. Give {needed}, at least --minutes "
            f"{least + 0.5:.0f} with --fit, or fewer optimizers."
        )
    if not asked.fit:
        raise LabError(
            f"it would take {_duration(fixed + going)}, more than the {asked.minutes:g} minutes. Add --fit to "
            f"shorten every training from {whole:,} to {steps:,} steps, or give {needed}."
        )
    contestants, fixed, going = at(steps)
    return contestants, fixed + going


def _plan(
    asked: Asked, size: Size, config: RunConfig, contestants: Sequence[Contestant], measured: Measured
) -> Plan:
    training = measured.training
    score = training.task.score
    seeds = tuple(range(asked.seed + 1, asked.seed + 1 + size.seeds))
    return Plan(
        kind=asked.kind,
        command=asked.command,
        task=config.task,
        task_label=config.task_label,
        loss_label=training.task.loss_label,
        score=None if score is None else (score.name, score.unit),
        device=config.device,
        epochs=config.epochs,
        batch_size=config.batch_size,
        steps_per_epoch=training.steps_per_epoch,
        parameters=sum(parameter.numel() for parameter in training.model.parameters()),
        budget="time" if asked.budget == "time" else "steps",
        tuned=tuple(name for name in size.tuned if any(name in one.ranges for one in contestants)),
        tuning_seed=asked.seed,
        seeds=seeds,
        stop_at=STOP_AT,
        facts={
            **facts_of(training),
            **_facts_of_files([one.optimizer for one in contestants]),
            **_where_and_when(training.device),
        },
        contestants=contestants,
        trials=trials_of(contestants, size, asked.seed, seeds, default_too=asked.kind == "tune"),
    )


def _facts_of_files(optimizers: Sequence[str]) -> dict[str, str]:
    """The hashes of the users' own files with optimizers."""
    return {name: fact for one in optimizers for name, fact in optimizer_facts(one).items()}


def _where_and_when(device: torch.device) -> dict[str, str]:
    machine = machine_facts(device)
    known = {name: str(machine[name]) for name in ("processor", "cores", "commit") if machine[name] is not None}
    return {**known, "date": datetime.date.today().isoformat()}


def _say_plan(console: Console, plan: Plan, size: Size, seconds: float) -> None:
    """Print what will be trained and until when."""
    tuned = ", ".join(plan.tuned) or "nothing"
    ends = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    for name in SAID:
        if name in plan.facts:
            console.print(Text(f"{name}: {plan.facts[name]}"))
    for one in plan.contestants:
        ranges = ", ".join(f"{name} {where.low:g} to {where.high:g}" for name, where in one.ranges.items())
        console.print(Text(f"{one.label}: {ranges or 'nothing to tune'}, {one.steps:,} steps"))
    console.print(
        Text(
            f"{len(plan.trials)} trainings: up to {size.trials} to tune {tuned} on seed {plan.tuning_seed}, "
            f"then {len(plan.seeds)} fresh seeds. About {clock(seconds)}, until {ends:%H:%M}."
        )
    )
    items = int(plan.facts.get(VALIDATION_ITEMS, FEW_ITEMS))
    if items < FEW_ITEMS:
        print(
            f"steprule: the validation data have only {items} items; with fewer than {FEW_ITEMS}, chance "
            "changes the loss a lot.",
            file=sys.stderr,
        )


def go_on(kind: str, out: Path | None, worker_count: int | None) -> None:
    """Train what is missing of a race, as if it had never been stopped."""
    folder = RaceFolder(out) if out is not None else _newest(kind)
    plan = folder.read_plan()
    if plan.kind != kind:
        raise LabError(f"'{folder.path}' holds a {plan.kind}. Resume it with steprule {plan.kind} --resume.")
    console = open_console()
    task = load_task(plan.task)
    now = {
        **task.facts,
        **_facts_of_files([one.optimizer for one in plan.contestants]),
        "torch": torch.__version__,
        "steprule": steprule.__version__,
    }
    changed = [name for name, fact in now.items() if plan.facts.get(name) != str(fact)]
    if changed:
        raise LabError(
            f"{', '.join(changed)} changed since it began; its trainings cannot be compared with "
            "new ones. Start another one."
        )
    count = worker_count or min(2, os.cpu_count() or 1)
    _carry_out(console, plan, folder, count)


def _carry_out(console: Console, plan: Plan, folder: RaceFolder, worker_count: int) -> None:
    with open(folder.path / "plan.json", "rb") as stream:
        lock(stream, folder.path)
        try:
            with race_screen(console, plan) as screen, workers(worker_count) as pool:
                trials = Conductor(plan, folder, screen).run(pool)
        except KeyboardInterrupt:
            raise Stopped(f"stopped. Continue with: {_resume_command(plan, folder)}") from None
        except LabError as error:
            raise LabError(
                f"{error} What was done is kept. Continue with: {_resume_command(plan, folder)}"
            ) from error
        verdict = verdict_of(plan, trials)
        folder.write_best(best_commands(plan, verdict))
        folder.write_verdict(verdict)
        write_report(folder.path)
    print_verdict(console, plan, verdict)
    console.print()
    for command in folder.read_best():
        console.print(Text(command), soft_wrap=True)
    console.print(
        Text(f"\nin {folder.path}: plan.json, trials.jsonl, curves/, verdict.json, best.txt, report.html")
    )


def _resume_command(plan: Plan, folder: RaceFolder) -> str:
    return f"steprule {plan.kind} --resume --out {shlex.quote(str(folder.path))}"


def _new_folder(out: Path | None, label: str) -> Path:
    try:
        if out is None:
            return next_numbered(label)
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise LabError(f"'{out}' is not empty. Give another --out, or --resume to continue a race in it.")
    except OSError as error:
        raise LabError(f"cannot make the folder '{out or RUNS}': {error.strerror}.") from error
    return out


def _newest(kind: str) -> RaceFolder:
    """The newest race or tuning in `runs/` that is not complete."""
    for path in sorted((file.parent for file in RUNS.glob("*/plan.json")), key=lambda x: -x.stat().st_mtime_ns):
        folder = RaceFolder(path)
        if folder.read_verdict() is None and folder.read_plan().kind == kind:
            return folder
    raise LabError(f"no {kind} in '{RUNS}/' is unfinished, so there is none to resume.")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"about {minutes:.0f} minutes" if minutes >= 1.5 else f"about {seconds:.0f} seconds"
