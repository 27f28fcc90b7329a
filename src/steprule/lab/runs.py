"""Starting a run, resuming one, and what comes after the last step."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

import steprule
from steprule.lab.curves import curves_of
from steprule.lab.devices import device_facts, find_device
from steprule.lab.errors import Diverged, LabError, Stopped, did_you_mean, failing
from steprule.lab.mirrors import check_mirrors, mirroring
from steprule.lab.optimizer_classes import optimizer_class, optimizer_facts, optimizer_name, preset_settings
from steprule.lab.optimizers import SCHEDULES, parse_settings
from steprule.lab.progress import progress_on
from steprule.lab.randomness import seed_everything
from steprule.lab.rehearsal import rehearse
from steprule.lab.report import open_console, print_header, print_results
from steprule.lab.run_folder import RunConfig, RunFolder, find_run, new_run_folder
from steprule.lab.tasks import BUILT_IN, is_data, load_task
from steprule.lab.train import Training

__all__ = ["Asked", "go_on", "start"]

ITEMS_OF_TRAIN = "items of train"


@dataclass(frozen=True)
class Asked:
    """The options of `steprule train` as they were given; None if not given."""

    task: str | None
    optimizer: str | None
    lr: float | None
    settings: Sequence[str]
    schedule: str | None
    epochs: int | None
    batch_size: int | None
    seed: int | None
    device: str | None = None
    clip_norm: float | None = None

    def means(self, run: RunConfig) -> bool:
        """Whether the run is of the task and the optimizer that were asked for, if any were."""
        task = self.task is None or full_name(self.task) == run.task
        return task and (self.optimizer is None or optimizer_name(self.optimizer) == run.optimizer)

    def differences(self, run: RunConfig) -> list[str]:
        """The options that differ from the run's and cannot be changed."""
        longer = self.epochs is not None and self.epochs > run.epochs and run.schedule == "none"
        pairs: dict[str, tuple[object, object]] = {
            "--task": (None if self.task is None else full_name(self.task), run.task),
            "--optimizer": (None if self.optimizer is None else optimizer_name(self.optimizer), run.optimizer),
            "--clip-norm": (self.clip_norm, run.clip_norm),
            "--schedule": (self.schedule, run.schedule),
            "--epochs": (None if longer else self.epochs, run.epochs),
            "--batch-size": (self.batch_size, run.batch_size),
            "--seed": (self.seed, run.seed),
        }
        for name, value in parse_settings(self.lr, self.settings).items():
            pairs["--lr" if name == "lr" and self.lr is not None else f"--set {name}"] = (
                value,
                run.hyperparameters.get(name),
            )
        return [
            f"{option} {asked} (the run has {had})"
            for option, (asked, had) in pairs.items()
            if asked is not None and asked != had
        ]


def full_name(task: str) -> str:
    """A task's name that is valid in every folder: FILE.py:FUNCTION with the full path."""
    if is_data(task):
        return task
    file, colon, function = task.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if colon and file else task


def start(asked: Asked, out: Path | None, log: Sequence[str] = ()) -> None:
    """Begin a new run. Nothing is written before everything has been tried once.

    log: where the numbers go besides the run's own file.
    """
    check_mirrors(log)
    given = "adabelief" if asked.optimizer is None else asked.optimizer
    optimizer = optimizer_name(given)
    optimizer_class(optimizer)
    device = find_device("cpu" if asked.device is None else asked.device)
    schedule = "none" if asked.schedule is None else asked.schedule
    if schedule not in SCHEDULES:
        raise LabError(f"no schedule '{schedule}'. {did_you_mean(schedule, SCHEDULES)}")
    settings = preset_settings(given) | parse_settings(asked.lr, asked.settings)
    seed = asked.seed or 0
    name = BUILT_IN[0] if asked.task is None else asked.task
    seed_everything(seed)
    task = load_task(name)
    config = RunConfig(
        task=full_name(name),
        optimizer=optimizer,
        hyperparameters=settings,
        schedule=schedule,
        epochs=asked.epochs or task.epochs,
        batch_size=asked.batch_size or task.batch_size,
        seed=seed,
        threads=task.threads or torch.get_num_threads(),
        device=str(device),
        clip_norm=asked.clip_norm,
    )
    torch.set_num_threads(config.threads)
    training = rehearse(task, config)
    folder = new_run_folder(out, config.label)
    with folder.opened():
        _begin(training, folder, log)


def go_on(asked: Asked, out: Path | None, log: Sequence[str] = ()) -> None:
    """Continue a run from its checkpoint, as if it had never been stopped."""
    check_mirrors(log)
    folder = find_run(out, asked.means)
    config = folder.load_config()
    differences = asked.differences(config)
    if differences:
        spans = f"--epochs cannot change, because the {config.schedule} schedule spans the whole run."
        epochs = "Only --epochs may grow." if config.schedule == "none" else spans
        raise LabError(
            f"'{folder.path}' cannot continue with {', '.join(differences)}. Leave the option out, or "
            f"start a new run without --resume. {epochs}"
        )
    with folder.opened():
        state = folder.load_checkpoint() if folder.has_begun else None
        seed_everything(config.seed)
        task = load_task(config.task)
        torch.set_num_threads(config.threads)
        longer = replace(
            config,
            epochs=asked.epochs or config.epochs,
            device=config.device if asked.device is None else asked.device,
        )
        if state is None:  # stopped before its first checkpoint
            _begin(rehearse(task, longer), folder, log)
            return
        training = Training(task, longer)
        _say_what_changed(config, facts_of(training))
        training.load(state)
        if longer != config:
            folder.save_config(longer)
        folder.cut_metrics(state)
        _carry_out(training, folder, log)


def _begin(training: Training, folder: RunFolder, log: Sequence[str]) -> None:
    folder.save_config(replace(training.config, facts=facts_of(training)))
    training.save(folder)
    _carry_out(training, folder, log)


def facts_of(training: Training) -> dict[str, str]:
    """The task's own facts, the size of its data, and the file, device and versions that results depend on."""
    sizes = {f"items of {name}": str(len(data)) for name, data in training.splits().items()}
    versions = {"steprule": steprule.__version__, "torch": torch.__version__}
    task = training.task
    labels = {"loss": task.loss_label} | ({} if task.score is None else {"score": task.score.label})
    own = {
        **labels,
        **task.facts,
        **optimizer_facts(training.config.optimizer),
        **device_facts(training.device),
    }
    return {**own, **sizes, **versions, "python": platform.python_version()}


def _say_what_changed(config: RunConfig, now: dict[str, str]) -> None:
    changed = [name for name, before in config.facts.items() if before != now.get(name)]
    if ITEMS_OF_TRAIN in changed:
        raise LabError(
            f"train has {now[ITEMS_OF_TRAIN]} items now, but had {config.facts[ITEMS_OF_TRAIN]} when the run "
            "began; it cannot continue in the middle of other data. Start a new run without --resume."
        )
    if changed:
        print(
            f"steprule: changed since the run began: {', '.join(changed)}. It continues, but not "
            "exactly as the run would have without a stop.",
            file=sys.stderr,
        )


def _carry_out(training: Training, folder: RunFolder, log: Sequence[str]) -> None:
    """Train, measure the test data, and show what there is, even after something has failed."""
    console = open_console()
    print_header(console, training, folder)
    failures: list[LabError] = []

    def succeeds(action: Callable[[], object]) -> bool:
        try:
            action()
        except LabError as error:
            failures.append(error)
        return not failures

    try:
        with mirroring(log, folder, asdict(training.config)):
            complete = succeeds(lambda: _train(console, training, folder))
            if complete:
                succeeds(lambda: _test(training, folder))
        succeeds(lambda: _draw(training, folder))
        if complete:
            succeeds(lambda: _finish(training, folder))
        succeeds(lambda: print_results(console, training, folder.read_metrics(), folder))
    except KeyboardInterrupt:
        raise Stopped(
            f"stopped at step {training.step} of {training.steps}; the checkpoint has step "
            f"{training.saved_step}. Continue from there with: {_resume_command(folder)}"
        ) from None
    if failures:
        raise _with_what_remains(failures[0], complete, folder) from failures[0]


def _with_what_remains(error: LabError, complete: bool, folder: RunFolder) -> LabError:
    if complete:
        return LabError(f"the run is complete, but {error}")
    if isinstance(error, Diverged):
        return error
    return LabError(f"{error} What was done is kept. Continue from there with: {_resume_command(folder)}")


def _resume_command(folder: RunFolder) -> str:
    return f"steprule train --resume --out {shlex.quote(str(folder.path))}"


def _train(console: Console, training: Training, folder: RunFolder) -> None:
    with progress_on(console, training) as screen:
        training.run(folder, screen)


def _test(training: Training, folder: RunFolder) -> None:
    if training.test is not None:
        folder.add_metrics(training.measure("test", training.test))


def _draw(training: Training, folder: RunFolder) -> None:
    lines = folder.read_metrics()
    if lines:
        with failing("drawing the curves"):
            drawn = curves_of(training, lines).alone().encode()
            folder.write("curves.svg", lambda stream: stream.write(drawn))


def _finish(training: Training, folder: RunFolder) -> None:
    if training.task.finish is None:
        return
    with failing("finish()"):
        training.model.eval()
        training.task.finish(training.model.cpu(), folder.path)
