"""The page of a race or a tuning: what ended lowest, how it got there, and what it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from steprule.lab.racing.folder import Contestant, CurvePoint, Plan, RaceFolder, Standing, Trial, Verdict
from steprule.lab.reporting.axes import Axis, setting_text, value_text
from steprule.lab.reporting.charts import Point, Series, line_chart
from steprule.lab.reporting.page import Figure, Page, Table, View
from steprule.lab.reporting.rows import Bar, Interval, Row, bar_chart, interval_chart
from steprule.lab.reporting.words import Words

__all__ = ["race_page"]

NONE = math.nan


@dataclass(frozen=True)
class _Race:
    """All of a race, read; contestants in the order of the page, with the number of each one's colour."""

    plan: Plan
    trials: Mapping[str, Sequence[Trial]]
    curves: Mapping[str, Sequence[Sequence[CurvePoint]]]
    verdict: Verdict | None
    contestants: Sequence[tuple[int, Contestant]]
    best: Sequence[str]
    say: Words

    def standing(self, name: str) -> Standing | None:
        """The result of a contestant, once there is one."""
        standings = self.verdict.standings if self.verdict else ()
        return next((one for one in standings if one.optimizer == name), None)

    def of_stage(self, name: str, stage: str) -> list[Trial]:
        """The trials of a contestant in a stage."""
        return [trial for trial in self.trials[name] if trial.stage == stage]


def race_page(folder: RaceFolder, say: Words) -> Page:
    """The page of a race in a folder, complete or not. Raises `LabError` if it cannot be read."""
    race = _read(folder, say)
    plan = race.plan
    title = say("{task}: {count} optimizers in a race", task=plan.task_label, count=len(plan.contestants))
    if plan.kind == "tune":
        title = say("{task}: {label}, tuned", task=plan.task_label, label=plan.contestants[0].label)
    figures = [
        _training(race),
        *(_hyperparameter(race, name) for name in plan.tuned),
        _finals(race),
        _best_of(race),
        *_costs(race),
    ]
    return Page(
        title=title,
        subtitle=_conditions(race),
        verdict=_sentences(race),
        main=_standings(race),
        notes=_notes(race),
        legend=[(one.label, style) for style, one in race.contestants],
        figures=[figure for figure in figures if figure is not None],
        tables=[(say("All trainings"), _all_trials(race))],
        commands=[plan.command, *(["\n".join(race.best)] if race.best else [])],
        facts=[*plan.facts.items()],
    )


def _read(folder: RaceFolder, say: Words) -> _Race:
    plan, verdict = folder.read_plan(), folder.read_verdict()
    trials = folder.read_trials()
    order = {one.optimizer: number for number, one in enumerate(verdict.standings)} if verdict else {}
    contestants = sorted(enumerate(plan.contestants), key=lambda x: order.get(x[1].name, x[0]))
    return _Race(
        plan,
        {one.name: [trial for trial in trials if trial.optimizer == one.name] for one in plan.contestants},
        {
            one.name: [
                folder.read_curve(one.name, trial.number)
                for trial in trials
                if trial.optimizer == one.name and trial.stage == "seeds"
            ]
            for one in plan.contestants
        },
        verdict,
        contestants,
        folder.read_best(),
        say,
    )


def _conditions(race: _Race) -> str:
    plan, say = race.plan, race.say
    steps = sorted({one.steps for one in plan.contestants})
    many = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,}…{steps[-1]:,}"
    schedules = say.listed(sorted({one.schedule for one in plan.contestants}))
    tuning = sum(trial.stage == "tune" for trial in plan.trials) // max(1, len(plan.contestants))
    text = say(
        "{steps} steps of {batch} items, schedule {schedule}. Tuned: {tuned}, on seed {seed} with {trials} "
        "trials each; judged on {seeds} other seeds.",
        steps=many,
        batch=plan.batch_size,
        schedule=schedules,
        tuned=say.listed([*plan.tuned]),
        seed=plan.tuning_seed,
        trials=tuning,
        seeds=len(plan.seeds),
    )
    equal = say("Every optimizer had the same number of steps.")
    if plan.budget == "time":
        equal = say("Every optimizer had the same time.")
    return text if plan.kind == "tune" else f"{text} {equal}"


def _sentences(race: _Race) -> Sequence[str]:
    """The verdict in words. Its own sentences are English; in other languages the numbers tell it."""
    say = race.say
    if race.verdict is None:
        done = sum(map(len, race.trials.values()))
        return [say("Not complete: {done} of {all} trainings are done.", done=done, all=len(race.plan.trials))]
    if say.language == "en" or race.plan.kind == "tune":
        return race.verdict.sentences
    lowest = next((one for one in race.verdict.standings if one.lowest), None)
    if lowest is None:
        return race.verdict.sentences
    tied = [one for one in race.verdict.standings if one.tied and not one.lowest]
    lines = [
        say("{label} ended with the lowest loss, {loss}.", label=lowest.label, loss=value_text(lowest.loss))
    ]
    if tied:
        lines.append(
            say("{labels} cannot be told apart from it.", labels=say.listed([one.label for one in tied]))
        )
    for one in race.verdict.standings:
        if not one.tied and not one.lowest:
            lines.append(f"{one.label}: {_against(race.verdict, one)}")
    return lines


def _notes(race: _Race) -> Sequence[str]:
    return race.verdict.notes if race.verdict and race.say.language == "en" else ()


def _against(verdict: Verdict, one: Standing) -> str:
    """How far above the lowest a loss is, with its interval."""
    if one.lowest:
        return "–"
    sign = " ×" if verdict.compared_by == "ratio" else ""
    middle = f"{value_text(one.against_lowest)}{sign}"
    return f"{middle} ({_range(one.against_interval)})" if one.against_interval else middle


def _range(interval: tuple[float, float] | None) -> str:
    return f"{value_text(interval[0])} – {value_text(interval[1])}" if interval else "–"


def _setting(setting: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {setting_text(value)}" for name, value in setting.items()) or "–"


def _score_name(plan: Plan) -> str:
    if plan.score is None:
        return ""
    name, unit = plan.score
    return f"{name} ({unit})" if unit else name


def _standings(race: _Race) -> Table | None:
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
    rows: list[list[str]] = []
    styles: list[int | None] = []
    for style, one in race.contestants:
        standing = race.standing(one.name)
        if standing is None:
            continue
        scores = [value for value in standing.scores if value is not None]
        rows.append(
            [
                one.label,
                say("diverged") if standing.loss is None else value_text(standing.loss),
                _range(standing.interval),
                _against(race.verdict, standing),
                *([value_text(statistics.fmean(scores), 4) if scores else "–"] if score else []),
                _setting(standing.setting) + _edges(standing, say),
                value_text(standing.default_loss),
                value_text(standing.ms_per_step),
                value_text(standing.state_bytes_per_element),
                say("{count} of {all}", count=standing.diverged, all=standing.trials),
            ]
        )
        styles.append(style)
    return Table(headings, rows, styles)


def _edges(standing: Standing, say: Words) -> str:
    return say(" (at the edge)") if standing.at_edge else ""


def _training(race: _Race) -> Figure | None:
    """Loss over steps and over seconds: the median over the fresh seeds, and the range of all."""
    say, plan = race.say, race.plan
    if not any(any(curves) for curves in race.curves.values()):
        return None
    views: list[View] = []
    title = say("Training")
    for over in ("steps", "seconds"):
        drawn = [
            _curve(race, style, one, over) for style, one in race.contestants if any(race.curves[one.name])
        ]
        x = Axis(say("step") if over == "steps" else say("seconds of training"))
        views += [
            View(line_chart(drawn, x, Axis(plan.loss_label, log), f"{title}: {plan.loss_label}"), over, scale)
            for log, scale in ((True, "log"), (False, "linear"))
        ]
    rows = [
        [one.label, *cells]
        for _, one in race.contestants
        for cells in (
            [f"{step:,}", *map(value_text, (seconds, middle, low, high))]
            for step, seconds, middle, low, high in _medians(race.curves[one.name])
        )
    ]
    headings = [say("optimizer"), say("step"), say("seconds"), say("median"), say("lowest"), say("highest")]
    note = say(
        "Validation loss: the median of {count} seeds, and the range of all of them.", count=len(plan.seeds)
    )
    return Figure(title, note, views, Table(headings, rows))


def _curve(race: _Race, style: int, one: Contestant, over: str) -> Series:
    say, curves = race.say, race.curves[one.name]
    medians = _medians(curves)

    def place(step: float, seconds: float) -> float:
        return step if over == "steps" else seconds

    points = [
        Point(
            place(step, seconds),
            middle,
            say(
                "{label}, step {step}, {seconds} s: {loss} ({low} to {high})",
                label=one.label,
                step=f"{step:,}",
                seconds=value_text(seconds),
                loss=value_text(middle),
                low=value_text(low),
                high=value_text(high),
            ),
        )
        for step, seconds, middle, low, high in medians
    ]
    band = [
        (place(step, seconds), low, high)
        for step, seconds, _, low, high in medians
        if math.isfinite(low + high)
    ]
    seeds = [[(place(p.step, p.seconds), p.loss) for p in curve if p.loss is not None] for curve in curves]
    return Series(one.label, style, points, band=band if len(curves) > 1 else (), seeds=seeds)


def _medians(curves: Iterable[Sequence[CurvePoint]]) -> list[tuple[int, float, float, float, float]]:
    """For every step: seconds, and median, lowest and highest loss; a seed that diverged is infinite."""
    found: dict[int, list[tuple[float, float]]] = {}
    count = 0
    for curve in curves:
        count += 1
        for point in curve:
            loss = math.inf if point.loss is None else point.loss
            found.setdefault(point.step, []).append((point.seconds, loss))
    rows: list[tuple[int, float, float, float, float]] = []
    for step, values in sorted(found.items()):
        losses = sorted(loss for _, loss in values) + [math.inf] * (count - len(values))
        seconds = statistics.median(time for time, _ in values)
        rows.append((step, seconds, statistics.median(losses), losses[0], losses[-1]))
    return rows


def _hyperparameter(race: _Race, name: str) -> Figure | None:
    """Final loss of every trial against one tuned hyper-parameter."""
    say, plan = race.say, race.plan
    one_minus = any(one.ranges[name].scale == "one_minus" for _, one in race.contestants if name in one.ranges)
    label = f"1 - {name}" if one_minus else name
    drawn: list[Series] = []
    rows: list[list[str]] = []
    for style, one in race.contestants:
        trials = [trial for trial in race.of_stage(one.name, "tune") if name in trial.setting]
        points = [(_place(trial.setting[name], one_minus), trial) for trial in trials]
        least = min((x for x, _ in points if x > 0), default=1.0)
        chosen = _chosen(race, one.name)
        marked = sorted(
            (_trial_point(race, one, trial, max(x, least / 3), trial is chosen) for x, trial in points),
            key=lambda point: point.x,
        )
        # Where other hyper-parameters differ as well, neighbours have nothing in common.
        drawn.append(Series(one.label, style, marked, line=len(plan.tuned) == 1))
        rows += [
            [
                one.label,
                setting_text(trial.setting[name]),
                _result(race, trial),
                _role(race, trial, trial is chosen),
            ]
            for _, trial in sorted(points, key=lambda x: x[0])
        ]
    if not any(one.points for one in drawn):
        return None
    title = say("Learning rate") if name == "lr" else name
    says = say("{title}: final loss of every trial", title=title)
    lost = say("diverged")
    views = [
        View(
            line_chart(drawn, Axis(label, log=True), Axis(plan.loss_label, log), says, lost, named=False),
            scale=scale,
        )
        for log, scale in ((True, "log"), (False, "linear"))
    ]
    note = say(
        "One point for each trial. Filled: chosen; in a ring: the default; faint: stopped early; cross: "
        "diverged."
    )
    return Figure(title, note, views, Table([say("optimizer"), name, say("final loss"), ""], rows))


def _place(value: float, one_minus: bool) -> float:
    return 1 - value if one_minus else value


def _chosen(race: _Race, name: str) -> Trial | None:
    """The trial of which a contestant's final trainings took the setting; the best so far before that."""
    standing = race.standing(name)
    trials = race.of_stage(name, "tune")
    if standing is not None:
        return next((trial for trial in trials if trial.setting == standing.setting), None)
    whole = [trial for trial in trials if trial.loss is not None and trial.stopped_at is None]
    return min(whole, key=lambda trial: trial.loss or 0.0, default=None)


def _trial_point(race: _Race, one: Contestant, trial: Trial, x: float, chosen: bool) -> Point:
    role = _role(race, trial, chosen)
    says = f"{one.label}, {_setting(trial.setting)}: {_result(race, trial)}"
    kinds = ["full"] if chosen else ["faint"] if trial.stopped_at is not None and not trial.diverged else []
    if trial.default:
        kinds.append("ring")
    loss = NONE if trial.diverged or trial.loss is None else trial.loss
    return Point(x, loss, f"{says}, {role}" if role else says, " ".join(kinds))


def _role(race: _Race, trial: Trial, chosen: bool) -> str:
    say = race.say
    words = [
        *([say("chosen")] if chosen else []),
        *([say("the default")] if trial.default else []),
        *(
            [say("stopped at step {step} of {steps}", step=trial.stopped_at, steps=trial.steps)]
            if trial.stopped_at is not None
            else []
        ),
    ]
    return ", ".join(words)


def _result(race: _Race, trial: Trial) -> str:
    return race.say("diverged") if trial.diverged or trial.loss is None else value_text(trial.loss)


def _finals(race: _Race) -> Figure | None:
    """The final loss on every fresh seed, and the interval of its mean."""
    say, plan = race.say, race.plan
    rows: list[Row] = []
    cells: list[list[str]] = []
    for style, one in race.contestants:
        trials = race.of_stage(one.name, "seeds")
        losses = [NONE if trial.loss is None else trial.loss for trial in trials]
        standing = race.standing(one.name)
        if not losses:
            continue
        middle = NONE if standing is None or standing.loss is None else standing.loss
        low, high = (standing.interval if standing else None) or (NONE, NONE)
        says = say(
            "{label}: {loss}, 95 % interval {low} to {high}",
            label=one.label,
            loss=value_text(middle),
            low=value_text(low),
            high=value_text(high),
        )
        notes = [
            say("{label}, seed {seed}: {loss}", label=one.label, seed=trial.seed, loss=_result(race, trial))
            for trial in trials
        ]
        rows.append(Row(one.label, style, Interval(middle, low, high, says, losses, notes)))
        cells += [[one.label, str(trial.seed), _result(race, trial)] for trial in trials]
    if not rows:
        return None
    title = say("Final loss")
    views = [
        View(interval_chart(rows, Axis(plan.loss_label, log), f"{title}: {plan.loss_label}"), scale=scale)
        for log, scale in ((True, "log"), (False, "linear"))
    ]
    note = say(
        "Filled: the mean, with its 95 % interval; below it, every seed. Where intervals overlap, the losses "
        "may still differ: the verdict compares them."
    )
    return Figure(title, note, views, Table([say("optimizer"), say("seed"), say("final loss")], cells))


def _best_of(race: _Race) -> Figure | None:
    """What tuning buys: the best loss that k trials find, in the median of all ways to draw them."""
    say, plan = race.say, race.plan
    drawn: list[Series] = []
    rows: list[list[str]] = []
    for style, one in race.contestants:
        best = _medians_of_best(race.of_stage(one.name, "tune"))
        points = [
            Point(
                k,
                loss,
                say("{label}, {k} trials: {loss}", label=one.label, k=k, loss=value_text(loss)),
            )
            for k, loss in enumerate(best, 1)
            if math.isfinite(loss)
        ]
        if points:
            drawn.append(Series(one.label, style, points))
        rows += [[one.label, str(k), value_text(loss)] for k, loss in enumerate(best, 1)]
    if not drawn:
        return None
    title = say("What tuning buys")
    says = say("Best loss after a number of trials")
    x = Axis(say("trials"), whole=True)
    views = [
        View(line_chart(drawn, x, Axis(plan.loss_label, log), says), scale=scale)
        for log, scale in ((True, "log"), (False, "linear"))
    ]
    note = say(
        "The best of k trials, if they are drawn at random from those of the race: half of all draws find at "
        "least this."
    )
    return Figure(title, note, views, Table([say("optimizer"), say("trials"), say("best loss")], rows))


def _medians_of_best(trials: Sequence[Trial]) -> list[float]:
    """For k = 1, 2, …: the loss that the best of k of the trials reaches in half of all draws.

    Trials that diverged or were stopped rank behind all others.
    """
    unfinished = [trial.loss is None or trial.diverged or trial.stopped_at is not None for trial in trials]
    losses = sorted(
        math.inf if lost or trial.loss is None else trial.loss
        for trial, lost in zip(trials, unfinished, strict=True)
    )
    count = len(losses)
    best: list[float] = []
    for k in range(1, count + 1):
        # The best is at rank r or above unless all k are among the count - r others.
        rank = next(r for r in range(1, count + 1) if math.comb(count - r, k) * 2 <= math.comb(count, k))
        best.append(losses[rank - 1])
    return best


def _costs(race: _Race) -> list[Figure]:
    """Time of a step, and bytes of state, beside each other and in the order of the losses."""
    say = race.say
    times: list[tuple[str, list[Bar]]] = []
    sizes: list[tuple[str, list[Bar]]] = []
    for style, one in race.contestants:
        trials = race.trials[one.name]
        if not trials:
            continue
        standing = race.standing(one.name)
        ms = standing.ms_per_step if standing else statistics.median(trial.ms_per_step for trial in trials)
        size = trials[0].state_bytes_per_element
        text = f"{value_text(ms)} ms"
        times.append((one.label, [Bar(ms, text, f"{one.label}: {text}", style)]))
        bytes_ = say("{bytes} bytes", bytes=value_text(size))
        sizes.append((one.label, [Bar(size, bytes_, f"{one.label}: {bytes_}", style)]))
    if not times:
        return []
    made: list[Figure] = []
    for title, label, note, rows in (
        (
            say("Time of a step"),
            say("ms per step"),
            say("With forward and backward pass; evaluations left out."),
            times,
        ),
        (
            say("State"),
            say("bytes per element"),
            say("What the optimizer keeps for each element of a parameter."),
            sizes,
        ),
    ):
        table = Table([say("optimizer"), label], [[name, bars[0].text] for name, bars in rows])
        made.append(Figure(title, note, [View(bar_chart(rows, Axis(label), title))], table))
    return made


def _all_trials(race: _Race) -> Table:
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
    for _, one in race.contestants:
        for trial in sorted(race.trials[one.name], key=lambda trial: trial.number):
            rows.append(
                [
                    one.label,
                    str(trial.number),
                    say("tuning") if trial.stage == "tune" else say("judging"),
                    str(trial.seed),
                    *(setting_text(trial.setting.get(name)) for name in plan.tuned),
                    _result(race, trial),
                    *([value_text(trial.score, 4)] if score else []),
                    value_text(trial.ms_per_step),
                    _role(race, trial, chosen=False),
                ]
            )
    return Table(headings, rows)
