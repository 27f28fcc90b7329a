"""What a race left behind, read for its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steprule.lab.racing.folder import Contestant, CurvePoint, Plan, RaceFolder, Standing, Trial, Verdict
from steprule.lab.reporting.axes import setting_text, value_text
from steprule.lab.reporting.words import Words

__all__ = ["Entry", "Race", "above", "range_text", "read_race", "settings_text"]


@dataclass(frozen=True)
class Entry:
    """What is judged on fresh seeds: a contestant at the setting that was chosen, or at its defaults.

    style: the number of its colour. trials: its final trainings, with the curve of each.
    """

    style: int
    label: str
    contestant: Contestant
    at_defaults: bool
    standing: Standing | None
    trials: Sequence[Trial]
    curves: Sequence[Sequence[CurvePoint]]


@dataclass(frozen=True)
class Race:
    """All of a race, read.

    entries: in the order of their losses; of a tuning, each optimizer at its defaults as well. trials: by
    contestant.
    """

    plan: Plan
    verdict: Verdict | None
    entries: Sequence[Entry]
    trials: Mapping[str, Sequence[Trial]]
    best: Sequence[str]
    say: Words

    @property
    def tuned(self) -> list[Entry]:
        """One entry of each contestant."""
        return [entry for entry in self.entries if not entry.at_defaults]

    def tuning(self, entry: Entry) -> list[Trial]:
        """The trials that tuned a contestant."""
        return [trial for trial in self.trials[entry.contestant.name] if trial.stage == "tune"]

    def chosen(self, entry: Entry) -> Trial | None:
        """The trial of which the final trainings took the setting; the best so far before that."""
        trials = self.tuning(entry)
        if entry.standing is not None:
            setting = entry.standing.setting
            return next((trial for trial in trials if trial.setting == setting), None)
        whole = [trial for trial in trials if trial.loss is not None and trial.stopped_at is None]
        return min(whole, key=lambda trial: trial.loss or 0.0, default=None)

    def result(self, trial: Trial) -> str:
        """Where a training ended."""
        return self.say("diverged") if trial.diverged or trial.loss is None else value_text(trial.loss)

    def role(self, trial: Trial, chosen: bool = False) -> str:
        """What is special about a trial."""
        say = self.say
        stopped = trial.stopped_at
        words = [say("chosen")] if chosen else []
        words += [say("the default")] if trial.default else []
        if stopped is not None:
            planned = next(one.steps for one in self.plan.contestants if one.name == trial.optimizer)
            words.append(say("stopped at step {step} of {steps}", step=stopped, steps=planned))
        return ", ".join(words)


def read_race(folder: RaceFolder, say: Words) -> Race:
    """Read the folder of a race, complete or not. Raises `LabError`."""
    plan, verdict, trials = folder.read_plan(), folder.read_verdict(), folder.read_trials()
    standings = verdict.standings if verdict else ()
    entries: list[Entry] = []
    for at_defaults in (False, True) if plan.kind == "tune" else (False,):
        for one in plan.contestants:
            finals = [
                trial
                for trial in trials
                if trial.optimizer == one.name and trial.stage == "seeds" and trial.default == at_defaults
            ]
            # The standing at the defaults has a label of its own.
            own = [x for x in standings if x.optimizer == one.name and (x.label != one.label) == at_defaults]
            label = say("{label} at its defaults", label=one.label) if at_defaults else one.label
            curves = [folder.read_curve(one.name, trial.number) for trial in finals]
            standing = own[0] if own else None
            entries.append(Entry(len(entries), label, one, at_defaults, standing, finals, curves))
    order = {id(standing): number for number, standing in enumerate(standings)}
    entries.sort(key=lambda entry: order.get(id(entry.standing), entry.style))
    of_each = {one.name: [x for x in trials if x.optimizer == one.name] for one in plan.contestants}
    return Race(plan, verdict, entries, of_each, folder.read_best(), say)


def range_text(interval: tuple[float, float] | None) -> str:
    """An interval, or a dash."""
    return f"{value_text(interval[0])} – {value_text(interval[1])}" if interval else "–"


def above(label: str, against: float, interval: tuple[float, float] | None, by: str, say: Words) -> str:
    """How far from the lowest one something ended, in a sentence. by: "ratio" or "difference"."""
    if interval is None:
        return f"{label}: {value_text(against)}"
    english = "{label} ended {times} × as high (95 % interval {low} to {high})."
    if by != "ratio":
        english = "{label} ended {times} higher (95 % interval {low} to {high})."
    low, high = map(value_text, interval)
    return say(english, label=label, times=value_text(against), low=low, high=high)


def settings_text(setting: Mapping[str, float]) -> str:
    """Hyper-parameters with their values, or a dash."""
    return ", ".join(f"{name} {setting_text(value)}" for name, value in setting.items()) or "–"
