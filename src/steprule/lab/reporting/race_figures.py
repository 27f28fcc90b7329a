"""The charts of a race: training, learning rates, final losses, what tuning buys, costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from steprule.lab.racing.folder import CurvePoint, Trial
from steprule.lab.reporting.axes import Axis, setting_text, value_text
from steprule.lab.reporting.charts import Point, Series, line_chart
from steprule.lab.reporting.page import Figure, Table, View
from steprule.lab.reporting.races import Entry, Race, settings_text
from steprule.lab.reporting.rows import Bar, Interval, Row, bar_chart, interval_chart
from steprule.lab.reporting.svg import Drawing

__all__ = ["race_figures"]

NONE = math.nan


def race_figures(race: Race) -> list[Figure]:
    """All charts for which there are numbers."""
    figures = [
        _training(race),
        *(_hyperparameter(race, name) for name in race.plan.tuned),
        _finals(race),
        _best_of(race),
        *_costs(race),
    ]
    return [figure for figure in figures if figure is not None]


def _both_scales(draw: Callable[[bool], Drawing], over: str = "") -> list[View]:
    """The chart with a logarithmic axis, and with a linear one."""
    return [View(draw(log), over, scale) for log, scale in ((True, "log"), (False, "linear"))]


class Middle(NamedTuple):
    """The losses of all seeds at a step; a seed that diverged is infinite."""

    step: int
    seconds: float
    median: float
    lowest: float
    highest: float


def _training(race: Race) -> Figure | None:
    """Loss over steps and over seconds: the median over the fresh seeds, and the range of all."""
    say, label = race.say, race.plan.loss_label
    entries = [entry for entry in race.entries if any(entry.curves)]
    if not entries:
        return None
    title = say("Training")
    views: list[View] = []
    for over, x in (("steps", Axis(say("step"))), ("seconds", Axis(say("seconds of training")))):
        drawn = [_curve(race, entry, over == "seconds") for entry in entries]

        def draw(log: bool, drawn: Sequence[Series] = drawn, x: Axis = x) -> Drawing:
            return line_chart(drawn, x, Axis(label, log), f"{title}: {label}")

        views += _both_scales(draw, over)
    rows = [
        [entry.label, f"{at.step:,}", *map(value_text, at[1:])]
        for entry in entries
        for at in _middles(entry.curves)
    ]
    headings = [say("optimizer"), say("step"), say("seconds"), say("median"), say("lowest"), say("highest")]
    count = len(race.plan.seeds)
    note = say("Validation loss: the median of {count} seeds, and the range of all of them.", count=count)
    return Figure(title, note, views, Table(headings, rows))


def _curve(race: Race, entry: Entry, over_time: bool) -> Series:
    def place(at: Middle | CurvePoint) -> float:
        return at.seconds if over_time else at.step

    def says(at: Middle) -> str:
        return race.say(
            "{label}, step {step}, {seconds} s: {loss} ({low} to {high})",
            label=entry.label,
            step=f"{at.step:,}",
            seconds=value_text(at.seconds),
            loss=value_text(at.median),
            low=value_text(at.lowest),
            high=value_text(at.highest),
        )

    middles = _middles(entry.curves)
    points = [Point(place(at), at.median, says(at)) for at in middles]
    band = [(place(at), at.lowest, at.highest) for at in middles if math.isfinite(at.lowest + at.highest)]
    seeds = [[(place(at), at.loss) for at in curve if at.loss is not None] for curve in entry.curves]
    return Series(entry.label, entry.style, points, band=band if len(seeds) > 1 else (), seeds=seeds)


def _middles(curves: Sequence[Sequence[CurvePoint]]) -> list[Middle]:
    found: dict[int, list[tuple[float, float]]] = {}
    for curve in curves:
        for point in curve:
            loss = math.inf if point.loss is None else point.loss
            found.setdefault(point.step, []).append((point.seconds, loss))
    rows: list[Middle] = []
    for step, values in sorted(found.items()):
        # A curve that ends before the others has diverged.
        losses = sorted(loss for _, loss in values) + [math.inf] * (len(curves) - len(values))
        seconds = statistics.median(time for time, _ in values)
        rows.append(Middle(step, seconds, statistics.median(losses), losses[0], losses[-1]))
    return rows


def _hyperparameter(race: Race, name: str) -> Figure | None:
    """Final loss of every trial against one tuned hyper-parameter."""
    say, plan = race.say, race.plan
    ranges = [entry.contestant.ranges[name] for entry in race.tuned if name in entry.contestant.ranges]
    one_minus = any(where.scale == "one_minus" for where in ranges)
    drawn: list[Series] = []
    rows: list[list[str]] = []
    for entry in race.tuned:
        trials = [trial for trial in race.tuning(entry) if name in trial.setting]
        trials.sort(key=lambda trial: trial.setting[name], reverse=one_minus)
        chosen = race.chosen(entry)
        # Where other hyper-parameters differ as well, neighbours have nothing in common.
        points = _trial_points(race, entry, trials, name, one_minus)
        drawn.append(Series(entry.label, entry.style, points, line=len(plan.tuned) == 1))
        rows += [
            [entry.label, setting_text(x.setting[name]), race.result(x), race.role(x, x is chosen)]
            for x in trials
        ]
    if not rows:
        return None
    title = say("Learning rate") if name == "lr" else name
    x = Axis(f"1 - {name}" if one_minus else name, log=True)
    says, lost = say("{title}: final loss of every trial", title=title), say("diverged")
    views = _both_scales(lambda log: line_chart(drawn, x, Axis(plan.loss_label, log), says, lost, named=False))
    note = say(
        "One point for each trial. Filled: chosen; in a ring: the default; faint: stopped early; cross: "
        "diverged."
    )
    return Figure(title, note, views, Table([say("optimizer"), name, say("final loss"), ""], rows))


def _trial_points(race: Race, entry: Entry, trials: Sequence[Trial], name: str, one_minus: bool) -> list[Point]:
    places = [1 - trial.setting[name] if one_minus else trial.setting[name] for trial in trials]
    # 0 has no place on a logarithmic axis; it stands left of all others.
    least = min((x for x in places if x > 0), default=1.0) / 3
    chosen = race.chosen(entry)
    points: list[Point] = []
    for x, trial in zip(places, trials, strict=True):
        lost = trial.diverged or trial.loss is None
        role = race.role(trial, trial is chosen)
        says = f"{entry.label}, {settings_text(trial.setting)}: {race.result(trial)}"
        kinds = ["full"] if trial is chosen else ["faint"] if trial.stopped_at is not None and not lost else []
        kinds += ["ring"] if trial.default else []
        y = NONE if lost or trial.loss is None else trial.loss
        points.append(Point(max(x, least), y, f"{says}, {role}" if role else says, " ".join(kinds)))
    return points


def _finals(race: Race) -> Figure | None:
    """The final loss on every fresh seed, and the interval of its mean."""
    say, label = race.say, race.plan.loss_label
    entries = [entry for entry in race.entries if entry.trials]
    if not entries:
        return None
    rows = [Row(entry.label, entry.style, _interval(race, entry)) for entry in entries]
    title = say("Final loss")
    views = _both_scales(lambda log: interval_chart(rows, Axis(label, log), f"{title}: {label}"))
    note = say(
        "Filled: the mean, with its 95 % interval; below it, every seed. Where intervals overlap, the losses "
        "may still differ: the verdict compares them."
    )
    cells = [[entry.label, str(x.seed), race.result(x)] for entry in entries for x in entry.trials]
    return Figure(title, note, views, Table([say("optimizer"), say("seed"), title], cells))


def _interval(race: Race, entry: Entry) -> Interval:
    say, standing = race.say, entry.standing
    middle = NONE if standing is None or standing.loss is None else standing.loss
    low, high = (standing.interval if standing else None) or (NONE, NONE)
    says = say(
        "{label}: {loss}, 95 % interval {low} to {high}",
        label=entry.label,
        loss=value_text(middle),
        low=value_text(low),
        high=value_text(high),
    )
    notes = [
        say("{label}, seed {seed}: {loss}", label=entry.label, seed=trial.seed, loss=race.result(trial))
        for trial in entry.trials
    ]
    losses = [NONE if trial.loss is None else trial.loss for trial in entry.trials]
    return Interval(middle, low, high, says, losses, notes)


def _best_of(race: Race) -> Figure | None:
    """What tuning buys: the best loss that k trials find, in the median of all ways to draw them."""
    say, label = race.say, race.plan.loss_label
    drawn: list[Series] = []
    rows: list[list[str]] = []
    for entry in race.tuned:
        best = medians_of_best([_whole_loss(trial) for trial in race.tuning(entry)])
        points = [
            Point(k, loss, say("{label}, {k} trials: {loss}", label=entry.label, k=k, loss=value_text(loss)))
            for k, loss in enumerate(best, 1)
            if math.isfinite(loss)
        ]
        drawn += [Series(entry.label, entry.style, points)] if points else []
        rows += [[entry.label, str(k), value_text(loss)] for k, loss in enumerate(best, 1)]
    if not drawn:
        return None
    says, x = say("Best loss after a number of trials"), Axis(say("trials"), whole=True)
    views = _both_scales(lambda log: line_chart(drawn, x, Axis(label, log), says))
    note = say(
        "The best of k trials, if they are drawn at random from those of the race: half of all draws find at "
        "least this."
    )
    headings = [say("optimizer"), say("trials"), say("best loss")]
    return Figure(say("What tuning buys"), note, views, Table(headings, rows))


def _whole_loss(trial: Trial) -> float:
    """The loss after all steps; infinite if the trial diverged or was stopped: it ranks behind all others."""
    whole = trial.loss is not None and not trial.diverged and trial.stopped_at is None
    return trial.loss if whole and trial.loss is not None else math.inf


def medians_of_best(losses: Sequence[float]) -> list[float]:
    """For k = 1, 2, …: what the best of k of the losses is at most, in half of all draws."""
    ordered, count = sorted(losses), len(losses)
    best: list[float] = []
    for k in range(1, count + 1):
        # The best is at rank r or above, unless all k are among the count - r others.
        rank = next(r for r in range(1, count + 1) if math.comb(count - r, k) * 2 <= math.comb(count, k))
        best.append(ordered[rank - 1])
    return best


def _costs(race: Race) -> list[Figure]:
    """Time of a step, and bytes of state, beside each other and in the order of the losses."""
    say = race.say
    times: list[tuple[str, list[Bar]]] = []
    sizes: list[tuple[str, list[Bar]]] = []
    for entry in race.tuned:
        trials, standing, label = race.trials[entry.contestant.name], entry.standing, entry.label
        if not trials:
            continue
        ms = standing.ms_per_step if standing else statistics.median(trial.ms_per_step for trial in trials)
        size = trials[0].state_bytes_per_element
        for rows, value, text in (
            (times, ms, f"{value_text(ms)} ms"),
            (sizes, size, say("{bytes} bytes", bytes=value_text(size))),
        ):
            rows.append((label, [Bar(value, text, f"{label}: {text}", entry.style)]))
    if not times:
        return []
    time_note = say("With forward and backward pass; evaluations left out.")
    size_note = say("What the optimizer keeps for each element of a parameter.")
    return [
        _cost(say("Time of a step"), say("ms per step"), time_note, times, say("optimizer")),
        _cost(say("State"), say("bytes per element"), size_note, sizes, say("optimizer")),
    ]


def _cost(title: str, label: str, note: str, rows: Sequence[tuple[str, Sequence[Bar]]], heading: str) -> Figure:
    table = Table([heading, label], [[name, bars[0].text] for name, bars in rows])
    return Figure(title, note, [View(bar_chart(rows, Axis(label), title))], table)
