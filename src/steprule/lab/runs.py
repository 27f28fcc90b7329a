"""Starting a run, going on with one, and what comes after the last step."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import steprule
from steprule.lab.curves import draw_curves
from steprule.lab.errors import LabError, Stopped, did_you_mean, told
from steprule.lab.optimizers import SCHEDULES, find_rule, parse_settings
from steprule.lab.progress import progress_on
from steprule.lab.randomness import seed_everything
from steprule.lab.report import open_console, print_header, print_results
from steprule.lab.run_folder import RunConfig, RunFolder, find_run, new_run_folder
from steprule.lab.tasks import BUILT_IN, Task, load_task
from steprule.lab.train import Training, rehearse

__all__ = ["Asked", "go_on", "start"]


@dataclass(frozen=True)
class Asked:
    """The options of `steprule train` as they were given; None is what was not given."""

    task: str | None
    optimizer: str | None
    lr: float | None
    settings: Sequence[str]
    schedule: str | None
    epochs: int | None
    batch_size: int | None
    seed: int | None

    def differences(self, run: RunConfig) -> list[str]:
        """What was asked for that the run does not have and cannot be given."""
        longer = self.epochs is not None and self.epochs > run.epochs and run.schedule == "none"
        pairs: dict[str, tuple[object, object]] = {
            "--task": (self.task and full_name(self.task), run.task),
            "--optimizer": (self.optimizer and find_rule(self.optimizer).__name__, run.optimizer),
            "--schedule": (self.schedule, run.schedule),
            "--epochs": (None if longer else self.epochs, run.epochs),
            "--batch-size": (self.batch_size, run.batch_size),
            "--seed": (self.seed, run.seed),
        }
        for name, value in parse_settings(self.lr, self.settings).items():
            pairs[f"--set {name}"] = (value, run.hyperparameters.get(name))
        return [
            f"{option} {asked} (the run has {had})"
            for option, (asked, had) in pairs.items()
            if asked is not None and asked != had
        ]


def full_name(task: str) -> str:
    """A task's name that holds in every folder: FILE.py:FUNCTION with the whole path."""
    file, colon, function = task.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if colon and file else task


def start(asked: Asked, out: Path | None) -> None:
    """Begin a new run. Nothing is written before everything about it was tried once."""
    rule = find_rule(asked.optimizer or "adabelief")
    schedule = asked.schedule or "none"
    if schedule not in SCHEDULES:
        raise LabError(f"no schedule '{schedule}'. {did_you_mean(schedule, SCHEDULES)}")
    settings = parse_settings(asked.lr, asked.settings)
    seed = asked.seed or 0
    name = asked.task or BUILT_IN[0]
    seed_everything(seed)
    task = load_task(name)
    config = RunConfig(
        task=full_name(name),
        optimizer=rule.__name__,
        hyperparameters=settings,
        schedule=schedule,
        epochs=asked.epochs or task.epochs,
        batch_size=asked.batch_size or task.batch_size,
        seed=seed,
        threads=task.threads or torch.get_num_threads(),
        facts=facts_of(task),
    )
    torch.set_num_threads(config.threads)
    training = rehearse(task, config)
    folder = new_run_folder(out, config.label)
    folder.save_config(training.config)
    with folder.opened():
        training.save(folder)
        _carry_out(training, folder)


def go_on(asked: Asked, out: Path | None) -> None:
    """Continue a run from its checkpoint, as if it had never been stopped."""
    folder = find_run(out, lambda config: not asked.differences(config))
    config = folder.load_config()
    differences = asked.differences(config)
    if differences:
        raise LabError(
            f"'{folder.path}' cannot go on with {', '.join(differences)}. Leave the option out, or "
            "start a new run without --resume. Only --epochs may grow, when there is no schedule."
        )
    with folder.opened():
        state = folder.load_checkpoint()
        seed_everything(config.seed)
        task = load_task(config.task)
        _say_what_changed(config, facts_of(task))
        torch.set_num_threads(config.threads)
        longer = replace(config, epochs=asked.epochs or config.epochs)
        training = Training(task, longer)
        training.load(state)
        if longer != config:
            folder.save_config(longer)
        folder.cut_metrics(state)
        _carry_out(training, folder)


def facts_of(task: Task) -> dict[str, str]:
    """The task's own facts and the versions that numbers may depend on."""
    versions = {"steprule": steprule.__version__, "torch": torch.__version__}
    return {**task.facts, **versions, "python": platform.python_version()}


def _say_what_changed(config: RunConfig, now: dict[str, str]) -> None:
    changed = [name for name in {**config.facts, **now} if config.facts.get(name) != now.get(name)]
    if changed:
        print(
            f"steprule: changed since the run began: {', '.join(changed)}. It goes on, but not as the "
            "same run would have without a stop.",
            file=sys.stderr,
        )


def _carry_out(training: Training, folder: RunFolder) -> None:
    console = open_console()
    print_header(console, training, folder)
    try:
        with progress_on(console, training) as screen:
            training.run(folder, screen)
        if training.test is not None:
            folder.add_metrics(training.measure("test", training.test))
        lines = folder.read_metrics()
        draw_curves(folder.path / "curves.svg", training, lines)
        _finish(training, folder)
        print_results(console, training, lines, folder)
    except KeyboardInterrupt:
        raise Stopped(
            f"stopped. Go on from the last checkpoint: steprule train --resume --out {folder.path}"
        ) from None


def _finish(training: Training, folder: RunFolder) -> None:
    if training.task.finish is None:
        return
    training.model.eval()
    try:
        training.task.finish(training.model, folder.path)
    except Exception as error:  # a user's own function may fail in any way
        raise LabError(f"the run is complete, but finish() failed: {told(error)}.") from error
