"""Carries a race out, from its plan or from where it was stopped, to its verdict."""

from __future__ import annotations

from dataclasses import replace

from steprule.lab.errors import LabError
from steprule.lab.racing.folder import Contestant, Plan, RaceFolder, Trial
from steprule.lab.racing.planning import rung_of
from steprule.lab.racing.screen import RaceScreen
from steprule.lab.racing.stages import Next, next_of
from steprule.lab.racing.trial import Job, Outcome, read_paused
from steprule.lab.racing.workers import Workers
from steprule.lab.run_folder import RunConfig

__all__ = ["Conductor"]


class Conductor:
    """A race in progress: what has been measured, and what comes next."""

    def __init__(self, plan: Plan, folder: RaceFolder, screen: RaceScreen) -> None:
        self.plan, self.folder, self.screen = plan, folder, screen
        folder.make_paused()
        names = [one.name for one in plan.contestants]
        self._planned = {name: [trial for trial in plan.trials if trial.optimizer == name] for name in names}
        self._done: dict[str, dict[int, Trial]] = {name: {} for name in names}
        self._rung: dict[str, dict[int, float | None]] = {name: {} for name in names}
        self._running: dict[tuple[str, int], tuple[Contestant, Next]] = {}
        self._pick_up()

    def _pick_up(self) -> None:
        """Take over what an earlier process has measured."""
        done = self.folder.read_trials()
        self.folder.write_trials(done)
        for trial in done:
            self._done[trial.optimizer][trial.number] = trial
        for one in self.plan.contestants:
            for planned in self._planned[one.name]:
                if planned.number in self._done[one.name]:
                    curve = self.folder.read_curve(one.name, planned.number)
                    at = {point.step: point.loss for point in curve}
                    self._rung[one.name][planned.number] = at.get(rung_of(one.steps))
                elif (paused := read_paused(self.folder.paused(one.name, planned.number))) is not None:
                    self._rung[one.name][planned.number] = paused.loss_at(rung_of(one.steps))

    def run(self, workers: Workers) -> list[Trial]:
        """Train all that is missing; gives all trials in the order of the plan."""
        while True:
            for one, following in self._ready():
                if workers.room():
                    self._running[one.name, following.planned.number] = one, following
                    workers.start(self._job(one, following))
            self.screen.show(self.trials(), list(self._running))
            if not self._running:
                break
            for job, outcome in workers.finished():
                one, following = self._running.pop((job.optimizer, job.number))
                self._take(one, following, outcome)
        trials = self.trials()
        self.folder.write_trials(trials)
        self.folder.drop_paused()
        return trials

    def trials(self) -> list[Trial]:
        """Those that have ended, in the order of the plan."""
        done = [self._done[x.optimizer].get(x.number) for x in self.plan.trials]
        return [trial for trial in done if trial is not None]

    def _ready(self) -> list[tuple[Contestant, Next]]:
        """What can be trained now, in the order of the plan. Trials that only have to be stopped end here."""
        ready: list[tuple[Contestant, Next]] = []
        for one in self.plan.contestants:
            following = self._next_of(one)
            while any(each.stop for each in following):
                for each in following:
                    if each.stop:
                        self._stop(one, each)
                following = self._next_of(one)
            ready += [(one, each) for each in following if (one.name, each.planned.number) not in self._running]
        return ready

    def _next_of(self, one: Contestant) -> list[Next]:
        return next_of(one, self._planned[one.name], self._done[one.name], self._rung[one.name])

    def _stop(self, one: Contestant, following: Next) -> None:
        file = self.folder.paused(one.name, following.planned.number)
        paused = read_paused(file)
        if paused is None:
            raise LabError(f"{file} is gone; resume the race to make it again.")
        self._end(one, following, paused, paused.steps)
        file.unlink(missing_ok=True)

    def _job(self, one: Contestant, following: Next) -> Job:
        planned = following.planned
        config = RunConfig(
            task=self.plan.task,
            optimizer=one.optimizer,
            hyperparameters={**one.fixed, **following.setting},
            schedule=one.schedule,
            epochs=1,
            batch_size=self.plan.batch_size,
            seed=planned.seed,
            threads=1,
            device=self.plan.device,
        )
        paused = self.folder.paused(one.name, planned.number)
        return Job(one.name, planned.number, config, one.steps, following.until, one.evaluated_at, paused)

    def _take(self, one: Contestant, following: Next, outcome: Outcome) -> None:
        """Write down what a job has measured."""
        number = following.planned.number
        self._rung[one.name][number] = outcome.loss_at(rung_of(one.steps))
        if outcome.diverged or outcome.steps == one.steps:
            self._end(one, following, outcome, outcome.steps if outcome.diverged else None)
            self.folder.paused(one.name, number).unlink(missing_ok=True)

    def _end(self, one: Contestant, following: Next, outcome: Outcome, stopped_at: int | None) -> None:
        planned, last = following.planned, outcome.points[-1]
        trial = Trial(
            optimizer=one.name,
            number=planned.number,
            stage=planned.stage,
            seed=planned.seed,
            setting=dict(following.setting),
            default=planned.default,
            loss=last.loss,
            score=last.score,
            steps=outcome.steps,
            stopped_at=stopped_at,
            diverged=outcome.diverged,
            ms_per_step=round(1000 * outcome.seconds / max(1, outcome.steps), 4),
            seconds=round(outcome.whole_seconds, 3),
            state_bytes_per_element=round(outcome.state_bytes_per_element, 4),
        )
        # The curve first: a trial that is in the list has all its files.
        points = [replace(point, seconds=round(point.seconds, 4)) for point in outcome.points]
        self.folder.write_curve(one.name, planned.number, points)
        self.folder.add_trial(trial)
        self._done[one.name][planned.number] = trial
