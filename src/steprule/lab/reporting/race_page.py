"""The page of a race or a tuning: what ended lowest, how it got there, and what it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from steprule.lab.racing.folder import Plan, RaceFolder, Standing, Verdict
from steprule.lab.racing.verdict import AT_DEFAULTS
from steprule.lab.reporting.axes import setting_text, value_text
from steprule.lab.reporting.page import Page, Table
from steprule.lab.reporting.race_figures import race_figures
from steprule.lab.reporting.races import Entry, Race, above, range_text, read_race, settings_text
from steprule.lab.reporting.words import Words

__all__ = ["race_page"]


def race_page(folder: RaceFolder, say: Words) -> Page:
    """The page of a race in a folder, complete or not. Raises `LabError` if it cannot be read."""
    race = read_race(folder, say)
    plan = race.plan
    title = say("{task}: {count} optimizers in a race", task=plan.task_label, count=len(plan.contestants))
    if plan.kind == "tune":
        title = say("{task}: {label}, tuned", task=plan.task_label, label=plan.contestants[0].label)
    return Page(
        title=title,
        subtitle=_conditions(race),
        verdict=_sentences(race),
        main=_standings(race),
        notes=_notes(race),
        legend=[(entry.label, entry.style) for entry in race.entries],
        figures=race_figures(race),
        tables=[(say("All trainings"), _all_trials(race))],
        commands=[plan.command, *(["\n".join(race.best)] if race.best else [])],
        facts=[*plan.facts.items()],
    )


def _conditions(race: Race) -> str:
    """The size of it in a line; the verdict's notes say more."""
    plan, say = race.plan, race.say
    steps = sorted({one.steps for one in plan.contestants})
    trials = sum(trial.stage == "tune" for trial in plan.trials) // max(1, len(plan.contestants))
    return say(
        "{steps} steps of {batch} items; {trials} trials to tune {tuned}, then {seeds} fresh seeds",
        steps=f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} – {steps[-1]:,}",
        batch=plan.batch_size,
        tuned=say.listed([*plan.tuned]),
        trials=trials,
        seeds=len(plan.seeds),
    )


def _sentences(race: Race) -> Sequence[str]:
    """The verdict in words. Its own sentences are English; in other languages the numbers tell it."""
    say = race.say
    if race.verdict is None:
        done = sum(map(len, race.trials.values()))
        return [say("Not complete: {done} of {all} trainings are done.", done=done, all=len(race.plan.trials))]
    if say.language == "en":
        return race.verdict.sentences
    if race.plan.kind == "tune":
        return _sentences_of_tuning(race, race.verdict)
    lowest = next((one for one in race.verdict.standings if one.lowest), None)
    if lowest is None:
        return race.verdict.sentences
    tied = [one for one in race.verdict.standings if one.tied and not one.lowest]
    lines = [
        say("{label} ended with the lowest loss, {loss}.", label=lowest.label, loss=value_text(lowest.loss))
    ]
    if tied:
        lines.append(
            say("{labels} cannot be distinguished from it.", labels=say.listed([one.label for one in tied]))
        )
    for one in race.verdict.standings:
        if not one.tied and not one.lowest:
            against = one.against_lowest if one.against_lowest is not None else math.nan
            lines.append(above(one.label, against, one.against_interval, race.verdict.compared_by, say))
    return lines


def _sentences_of_tuning(race: Race, verdict: Verdict) -> list[str]:
    """How the tuned values and the defaults ended, from the numbers of the verdict."""
    say, lines = race.say, list[str]()
    for one in verdict.standings:
        label = one.label.removesuffix(f" {AT_DEFAULTS}")
        label = label if label == one.label else say("{label} at its defaults", label=label)
        values = say.listed([f"{name} {value:g}" for name, value in one.setting.items()])
        if one.loss is None:
            lines.append(say("{label} with {values} diverged.", label=label, values=values))
        else:
            text = "{label} with {values} ended at loss {loss}."
            lines.append(say(text, label=label, values=values, loss=value_text(one.loss)))
    if all(one.tied for one in verdict.standings):
        lines.append(say("The seeds alone could explain the difference."))
    return lines


def _notes(race: Race) -> Sequence[str]:
    return race.verdict.notes if race.verdict and race.say.language == "en" else ()


def _against(verdict: Verdict, one: Standing) -> str:
    """How far above the lowest a loss is, with its interval."""
    if one.lowest:
        return "–"
    sign = " ×" if verdict.compared_by == "ratio" else ""
    middle = f"{value_text(one.against_lowest)}{sign}"
    return f"{middle} ({range_text(one.against_interval)})" if one.against_interval else middle


def _score_name(plan: Plan) -> str:
    if plan.score is None:
        return ""
    name, unit = plan.score
    return f"{name} ({unit})" if unit else name


def _standings(race: Race) -> Table | None:
    say, plan = race.say, race.plan
    if race.verdict is None:
        return None
    score = _score_name(plan)
    apart = say("× the lowest") if race.verdict.compared_by == "ratio" else say("above the lowest")
    headings = [
        say("optimizer"),
        say("final loss"),
        say("95 % interval"),
        apart,
        *([score] if score else []),
        say("chosen"),
        say("loss at the default"),
        say("ms per step"),
        say("state, bytes per element"),
        say("diverged"),
    ]
    judged = [entry for entry in race.entries if entry.standing is not None]
    rows = [_row(race, entry, entry.standing, race.verdict) for entry in judged if entry.standing is not None]
    return Table(headings, rows, [entry.style for entry in judged])


def _row(race: Race, entry: Entry, standing: Standing, verdict: Verdict) -> list[str]:
    say = race.say
    scores = [value for value in standing.scores if value is not None]
    edge = say(" (at the edge)") if standing.at_edge else ""
    return [
        entry.label,
        say("diverged") if standing.loss is None else value_text(standing.loss),
        range_text(standing.interval),
        _against(verdict, standing),
        *([value_text(statistics.fmean(scores), 4) if scores else "–"] if race.plan.score else []),
        settings_text(standing.setting) + edge,
        value_text(standing.default_loss),
        value_text(standing.ms_per_step),
        value_text(standing.state_bytes_per_element),
        str(standing.diverged),
    ]


def _all_trials(race: Race) -> Table:
    say, plan = race.say, race.plan
    score = _score_name(plan)
    headings = [
        say("optimizer"),
        say("number"),
        say("for"),
        say("seed"),
        *plan.tuned,
        say("final loss"),
        *([score] if score else []),
        say("ms per step"),
        "",
    ]
    rows: list[list[str]] = []
    for entry in race.tuned:
        for trial in sorted(race.trials[entry.contestant.name], key=lambda trial: trial.number):
            rows.append(
                [
                    entry.label,
                    str(trial.number),
                    say("tuning") if trial.stage == "tune" else say("judging"),
                    str(trial.seed),
                    *(setting_text(trial.setting.get(name)) for name in plan.tuned),
                    race.result(trial),
                    *([value_text(trial.score, 4)] if score else []),
                    value_text(trial.ms_per_step),
                    race.role(trial),
                ]
            )
    return Table(headings, rows)
