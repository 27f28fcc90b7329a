"""What a race shows while it runs: a live table on a terminal, otherwise a line for every training."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from steprule.lab.progress import clock
from steprule.lab.racing.folder import Contestant, Plan, Trial, Verdict
from steprule.lab.racing.search import best_of
from steprule.lab.tasks import loss_text, score_text

__all__ = ["RaceScreen", "print_verdict", "setting_text"]


class RaceScreen:
    """Prints a line for each training that has ended."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self.console, self.plan = console, plan
        self.began, self._at_first = time.perf_counter(), 0.0
        self._shown: set[tuple[str, int]] | None = None

    def show(self, trials: Sequence[Trial], running: Sequence[tuple[str, int]]) -> None:
        """Show the trials that have ended, and which ones run."""
        keys = {(trial.optimizer, trial.number) for trial in trials}
        if self._shown is None:  # a resumed race has some already
            self._shown, self._at_first = keys, _work(self.plan, trials)
        fresh = [trial for trial in trials if (trial.optimizer, trial.number) not in self._shown]
        for number, trial in enumerate(fresh, len(self._shown) + 1):
            self._print(trial, f"{number}/{len(self.plan.trials)}", trials)
        self._shown |= keys

    def _print(self, trial: Trial, count: str, trials: Sequence[Trial]) -> None:
        what = "diverged" if trial.diverged else f"loss {loss_text(trial.loss or 0)}"
        if trial.stopped_at is not None:
            what += f" at step {trial.stopped_at:,}"
        stage = f"seed {trial.seed}" if trial.stage == "seeds" else "default" if trial.default else "tuning"
        label = next(one.label for one in self.plan.contestants if one.name == trial.optimizer)
        text = f"{count}  {label}  {stage}  {setting_text(trial.setting)}  {what}  ETA {self._left(trials)}"
        self.console.print(text, highlight=False, soft_wrap=True)

    def _left(self, trials: Sequence[Trial]) -> str:
        """The time left, by what has been done since this process began."""
        done, whole = _work(self.plan, trials), _work_of_all(self.plan, trials)
        fresh = done - self._at_first
        if fresh <= 0:
            return "–"
        return clock((time.perf_counter() - self.began) / fresh * max(0.0, whole - done))


class LiveTable(RaceScreen):
    """A table with a row for each optimizer, redrawn when something has changed."""

    def __init__(self, live: Live, plan: Plan) -> None:
        super().__init__(live.console, plan)
        self._live = live

    def show(self, trials: Sequence[Trial], running: Sequence[tuple[str, int]]) -> None:
        """Redraw the table."""
        if self._shown is None:
            self._shown, self._at_first = set(), _work(self.plan, trials)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("", "done", "best so far", "with", "on fresh seeds", "now"):
            table.add_column(heading, justify="right" if heading == "done" else "left")
        for one in self.plan.contestants:
            table.add_row(*self._row(one, trials, running))
        table.caption = f"{len(trials)} of {len(self.plan.trials)} trainings, {self._left(trials)} left"
        table.caption_justify = "left"
        self._live.update(table, refresh=True)

    def _row(self, one: Contestant, trials: Sequence[Trial], running: Sequence[tuple[str, int]]) -> list[str]:
        own = [trial for trial in trials if trial.optimizer == one.name]
        count = sum(trial.optimizer == one.name for trial in self.plan.trials)
        tuning = [trial for trial in own if trial.stage == "tune" and trial.stopped_at is None]
        best = best_of(tuning) if tuning else None
        finals = [trial for trial in own if trial.stage == "seeds" and not trial.default]
        losses = [loss_text(trial.loss) if trial.loss is not None else "diverged" for trial in finals]
        now = [self._doing(one, number) for name, number in running if name == one.name]
        return [
            one.label,
            f"{len(own)}/{count}",
            loss_text(best.loss) if best is not None and best.loss is not None else "–",
            setting_text(best.setting) if best is not None else "",
            f"{min(losses)} to {max(losses)}" if len(losses) > 1 else "".join(losses),
            ", ".join(dict.fromkeys(now)),
        ]

    def _doing(self, one: Contestant, number: int) -> str:
        planned = next(x for x in self.plan.trials if (x.optimizer, x.number) == (one.name, number))
        return (
            f"seed {planned.seed}" if planned.stage == "seeds" else "default" if planned.default else "tuning"
        )


def _work(plan: Plan, trials: Sequence[Trial]) -> float:
    """Seconds that these trials took."""
    return sum(trial.seconds for trial in trials)


def _work_of_all(plan: Plan, trials: Sequence[Trial]) -> float:
    """Seconds that all trials of the plan will take, by what a step of each optimizer takes so far."""
    pace: dict[str, float] = {}
    for trial in trials:
        pace[trial.optimizer] = trial.seconds / max(1, trial.steps)
    usual = sum(pace.values()) / len(pace) if pace else 0.0
    done = {(trial.optimizer, trial.number): trial.seconds for trial in trials}
    total = 0.0
    for planned in plan.trials:
        first = planned.stage == "tune" and planned.setting is not None and not planned.default
        share = (1 + plan.stop_at) / 2 if first else 1.0
        expected = planned.steps * share * pace.get(planned.optimizer, usual)
        total += done.get((planned.optimizer, planned.number), expected)
    return total


def setting_text(setting: Mapping[str, float]) -> str:
    """`lr 0.001, weight_decay 0.1`."""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


@contextmanager
def race_screen(console: Console, plan: Plan) -> Generator[RaceScreen]:
    """The table if the console is a terminal, otherwise plain lines."""
    if not console.is_terminal:
        yield RaceScreen(console, plan)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield LiveTable(live, plan)


def print_verdict(console: Console, plan: Plan, verdict: Verdict) -> None:
    """Print what the race shows: a table, the sentences, the conditions."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    score = plan.score[0] if plan.score else None
    compared = "× the lowest" if verdict.compared_by == "ratio" else "above the lowest"
    headings = [
        "",
        "chosen",
        "loss",
        "95 % interval",
        compared,
        *([score] if score else []),
        "ms/step",
        "state bytes",
    ]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("", "chosen") else "right")
    for one in verdict.standings:
        scores = [value for value in one.scores if value is not None]
        cells: list[Any] = [
            one.label,
            setting_text(one.setting),
            "diverged" if one.loss is None else loss_text(one.loss),
            _interval(one.interval, 3),
            "lowest" if one.lowest else _interval(one.against_interval, 3),
            *([score_text(sum(scores) / len(scores)) if scores else "–"] if score else []),
            f"{one.ms_per_step:.2f}",
            f"{one.state_bytes_per_element:.3g}",
        ]
        table.add_row(*cells)
    console.print()
    console.print(table)
    console.print()
    for sentence in verdict.sentences:
        console.print(Text(sentence))
    console.print()
    for note in verdict.notes:
        console.print(Text(note, style="dim"))


def _interval(ends: tuple[float, float] | None, digits: int) -> str:
    return "–" if ends is None else f"{ends[0]:.{digits}g} to {ends[1]:.{digits}g}"
