"""The page of one training, or of several beside each other."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from steprule.lab.errors import LabError
from steprule.lab.racing.statistics import compare
from steprule.lab.reporting.axes import value_text
from steprule.lab.reporting.log_figures import figure_of_ends, figure_of_groups, figure_of_parts
from steprule.lab.reporting.log_groups import (
    Group,
    Quantities,
    groups_of,
    lowest_of,
    own_settings,
    train_command,
)
from steprule.lab.reporting.logs import Log, falls
from steprule.lab.reporting.page import Figure, Page, Table
from steprule.lab.reporting.races import above
from steprule.lab.reporting.words import Words
from steprule.lab.run_folder import RunConfig

__all__ = ["logs_page"]

MOST_FIGURES, MOST_COLUMNS, MOST_SENTENCE = 40, 6, 4
SAMPLE, PICTURE = "sample.txt", "picture.png"
MOST_BYTES, MOST_LETTERS = 3_000_000, 4000
FEWEST_SEEDS = 3


def logs_page(logs: Sequence[Log], command: str, say: Words) -> Page:
    """The page of these trainings. Raises `LabError` if they are of different tasks.

    command: what makes the page, to be repeated.
    """
    tasks = {log.config.task_label for log in logs if log.config is not None}
    if len(tasks) > 1:
        raise LabError(
            f"these runs are of different tasks ({', '.join(sorted(tasks))}), whose losses cannot be compared. "
            "Make a report of each."
        )
    groups = groups_of(logs)
    found = Quantities(groups, say)
    if len(groups) == 1:
        return _page_of_one(groups[0], found, command, say)
    return _page_of_several(groups, found, command, say)


# One training


def _page_of_one(group: Group, found: Quantities, command: str, say: Words) -> Page:
    log, config = group.logs[0], group.config
    styles = _styles_of_parts(found)
    figures = [figure_of_parts(group, name, found, styles, say) for name in found.names]
    drawn = [figure for figure in figures if figure is not None]
    repeat = [train_command(log.config) for log in group.logs if log.config is not None]
    return Page(
        title=log.name if config is None else f"{config.task_label}: {group.label}",
        subtitle=_settings(config, group, say),
        verdict=_verdict_of_one(group, found, say),
        main=_lasts(group, found, say),
        notes=_left_out(drawn, say),
        legend=[(say(part), style) for part, style in styles.items()],
        figures=drawn[:MOST_FIGURES],
        commands=["\n".join(repeat)] if repeat else [command],
        facts=_facts(config),
        texts=_texts(log.path, say),
        pictures=_pictures(log.path, say),
    )


def _styles_of_parts(found: Quantities) -> dict[str, int]:
    """The parts of the data, with the number of each one's colour, which is the same on all pages."""
    there = {part for part, _ in found.keys if part}
    usual = ("train", "validation", "test")
    every = [*usual, *sorted(there - {*usual})]
    return {part: number for number, part in enumerate(every) if part in there}


def _verdict_of_one(group: Group, found: Quantities, say: Words) -> list[str]:
    key, steps, time = found.main, f"{group.steps:,.0f}", group.seconds
    took = say(" in {seconds} s", seconds=value_text(time)) if math.isfinite(time) else ""
    shown = [key, *(other for other in found.keys if other[0] == "test")][:MOST_SENTENCE]
    values = ", ".join(f"{found.full(x)} {value_text(group.middle(x))}" for x in shown)
    sentences = [say("After {steps} steps{took}: {values}.", steps=steps, took=took, values=values)]
    ends, curve = group.last(key), group.logs[0].curves[key]
    if len(ends) > 1:
        low, high = value_text(min(ends)), value_text(max(ends))
        text = say(
            "Medians of {count} seeds; {name} went from {low} to {high}.",
            count=len(ends),
            name=found.full(key),
            low=low,
            high=high,
        )
        return [*sentences, text]
    lowest = lowest_of(curve)
    if falls(key[1]) and 0 < lowest.value < ends[0]:
        text = say(
            "The {name} was lowest at step {step}, with {value}; the last one is {times} × as high.",
            name=found.full(key),
            step=f"{lowest.step:,.0f}",
            value=value_text(lowest.value),
            times=value_text(ends[0] / lowest.value),
        )
        sentences.append(text)
    planned = _planned_steps(group.config)
    if planned is not None and group.steps < planned:
        sentences.append(say("It stopped at step {step} of {planned}.", step=steps, planned=f"{planned:,}"))
    return sentences


def _planned_steps(config: RunConfig | None) -> int | None:
    try:
        items = int(config.facts["items of train"]) if config is not None else None
    except (KeyError, ValueError):
        return None
    return None if items is None or config is None else config.epochs * math.ceil(items / config.batch_size)


def _settings(config: RunConfig | None, group: Group, say: Words) -> str:
    if config is None:
        return ""
    values = ", ".join(f"{name} {value}" for name, value in own_settings(config).items())
    return say(
        "{values}; {epochs} epochs, batch size {batch}, schedule {schedule}, seed {seeds}",
        values=values,
        epochs=config.epochs,
        batch=config.batch_size,
        schedule=config.schedule,
        seeds=say.listed([str(log.config.seed) for log in group.logs if log.config is not None]),
    )


def _lasts(group: Group, found: Quantities, say: Words) -> Table:
    """The last, lowest and highest number of every quantity."""
    rows: list[list[str]] = []
    for key in found.keys:
        numbers = [number for curve in group.curves(key) for number in curve if math.isfinite(number.value)]
        ends = [
            cell
            for end in ((min, max) if numbers else ())
            for x in [end(numbers, key=lambda number: number.value)]
            for cell in (value_text(x.value, 4), f"{x.step:,.0f}")
        ]
        rows.append([found.full(key), value_text(group.middle(key), 4), *(ends or ["–"] * 4)])
    headings = [say("quantity"), say("last"), say("lowest"), say("at step"), say("highest"), say("at step")]
    return Table(headings, rows)


# Several trainings


def _page_of_several(groups: Sequence[Group], found: Quantities, command: str, say: Words) -> Page:
    order = sorted(groups, key=lambda group: group.middle(found.main)) if falls(found.main[1]) else [*groups]
    styles = {group.label: number for number, group in enumerate(groups)}
    seeds = any(len(group.logs) > 1 for group in groups)
    first, *others = [figure_of_groups(order, key, found, styles, say) for key in found.keys]
    ends = figure_of_ends(order, found.main, found, styles, say) if seeds else None
    drawn = [figure for figure in (first, ends, *others) if figure is not None]
    config = groups[0].config
    count = say("{count} trainings", count=sum(len(group.logs) for group in groups))
    repeat = [train_command(log.config) for group in order for log in group.logs if log.config is not None]
    together = say(
        "{groups} kinds of training; those that differ in the seed only count as one.", groups=len(groups)
    )
    return Page(
        title=count if config is None else f"{config.task_label}: {count}",
        subtitle=together if seeds else "",
        verdict=_verdict_of_several(order, found, say),
        main=_comparison(order, found, styles, seeds, say),
        notes=_left_out(drawn, say),
        legend=[(group.label, styles[group.label]) for group in order],
        figures=drawn[:MOST_FIGURES],
        commands=[*(["\n".join(repeat)] if repeat else []), command],
        facts=_facts(config),
    )


def _verdict_of_several(order: Sequence[Group], found: Quantities, say: Words) -> list[str]:
    key = found.main
    there = [group for group in order if group.last(key)]
    if not falls(key[1]) or len(there) < 2:
        return [say("{count} trainings beside each other; the table has their last numbers.", count=len(order))]
    hint = say("`steprule race` compares optimizers with the same budget, tuned, on several seeds.")
    ends = [group.last(key) for group in there]
    if min(map(len, ends)) < FEWEST_SEEDS or not all(math.isfinite(end) for some in ends for end in some):
        few = say("With fewer than {count} seeds of each, chance may explain this order.", count=FEWEST_SEEDS)
        return [_order(there, found, say), f"{few} {hint}" if min(map(len, ends)) < FEWEST_SEEDS else hint]
    return [*_told_apart(there, ends, found, say), hint]


def _order(there: Sequence[Group], found: Quantities, say: Words) -> str:
    """Who ended lowest and who came next, as far as medians show it."""
    first, second = there[:2]
    lowest, following = first.middle(found.main), second.middle(found.main)
    return say(
        "{label} ended with the lowest {name}, {value}; then comes {other} with {times} × as much.",
        label=first.label,
        name=found.full(found.main),
        value=value_text(lowest),
        other=second.label,
        times=value_text(following / lowest if lowest > 0 and math.isfinite(following) else math.nan),
    )


def _told_apart(
    there: Sequence[Group], ends: Sequence[Sequence[float]], found: Quantities, say: Words
) -> list[str]:
    """Who ended lowest, and who can be distinguished from it, by Games and Howell's test."""
    comparison = compare(ends)
    lowest = there[comparison.lowest]
    pairs = [*zip(there, comparison.compared, strict=True)]
    tied = [group.label for group, one in pairs if one.tied and group is not lowest]
    sentences = [
        say(
            "{label} ended with the lowest {name}, {value} in the mean.",
            label=lowest.label,
            name=found.full(found.main),
            value=value_text(comparison.compared[comparison.lowest].mean),
        )
    ]
    if tied:
        sentences.append(say("{labels} cannot be distinguished from it.", labels=say.listed(tied)))
    apart = [(group.label, one) for group, one in pairs if not one.tied]
    sentences += [above(label, one.against, one.against_interval, comparison.by, say) for label, one in apart]
    return sentences


def _comparison(
    order: Sequence[Group], found: Quantities, styles: Mapping[str, int], seeds: bool, say: Words
) -> Table:
    main = found.main
    more = [key for key in found.keys if key != main and key[0] in ("validation", "test", "")]
    shown = [main, *more][:MOST_COLUMNS]
    rows: list[list[str]] = []
    for group in order:
        ends, time = group.last(main), group.seconds
        cells = [group.label, *([str(len(group.logs))] if seeds else [])]
        cells += [value_text(group.middle(key), 4) if group.last(key) else "–" for key in shown]
        if seeds:
            cells.append(f"{value_text(min(ends))} – {value_text(max(ends))}" if len(ends) > 1 else "–")
        pace = 1000 * time / group.steps if group.steps else math.nan
        rows.append([*cells, f"{group.steps:,.0f}", value_text(time), value_text(pace)])
    headings = [
        say("training"),
        *([say("seeds")] if seeds else []),
        *(found.full(key) for key in shown),
        *([say("lowest to highest")] if seeds else []),
        say("steps"),
        say("seconds"),
        say("ms per step, all included"),
    ]
    return Table(headings, rows, [styles[group.label] for group in order])


# Both


def _left_out(drawn: Sequence[Figure], say: Words) -> list[str]:
    more = len(drawn) - MOST_FIGURES
    return [say("{count} further quantities have no chart.", count=more)] if more > 0 else []


def _facts(config: RunConfig | None) -> list[tuple[str, str]]:
    return [*config.facts.items()] if config is not None else []


def _texts(folder: Path, say: Words) -> list[tuple[str, str]]:
    file = folder / SAMPLE
    if not file.is_file():
        return []
    return [(say("A sample"), file.read_text(encoding="utf-8", errors="replace")[:MOST_LETTERS])]


def _pictures(folder: Path, say: Words) -> list[tuple[str, str]]:
    file = folder / PICTURE
    if not file.is_file() or file.stat().st_size > MOST_BYTES:
        return []
    address = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return [(say("Left the original, right what was learnt"), address)]
