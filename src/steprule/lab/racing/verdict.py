"""What a race shows, in words and numbers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from steprule.lab.optimizer_classes import optimizer_class, usual_settings
from steprule.lab.racing.folder import Contestant, Plan, Standing, Trial, Verdict
from steprule.lab.racing.search import best_of, edges, within
from steprule.lab.racing.statistics import Comparison, compare
from steprule.lab.tasks import loss_text, task_options

__all__ = ["best_commands", "verdict_of"]

VALIDATION_ITEMS = "items of validation"
FEW_ITEMS = 500
NEAR = 0.25
FEW_SEEDS = 5
AT_DEFAULTS = "at its defaults"
OFTEN_TUNED = ("lr", "betas", "momentum", "weight_decay")


def verdict_of(plan: Plan, trials: Sequence[Trial]) -> Verdict:
    """The verdict on a race that is complete, the lowest loss first."""
    standings = [_standing(plan, one, trials, default=False) for one in plan.contestants]
    if plan.kind == "tune":
        standings += [_standing(plan, one, trials, default=True) for one in plan.contestants]
    sound = [one for one in standings if one.loss is not None]
    comparison = compare([[x for x in one.losses if x is not None] for one in sound]) if sound else None
    if comparison is not None:
        sound = [
            replace(
                one,
                loss=found.mean,
                interval=found.interval,
                against_lowest=found.against,
                against_interval=found.against_interval,
                tied=found.tied,
                lowest=i == comparison.lowest,
            )
            for i, (one, found) in enumerate(zip(sound, comparison.compared, strict=True))
        ]
    # A mean of logarithms orders them as the comparison does.
    sound.sort(key=lambda one: (one.against_lowest or 0, one.label))
    standings = sound + [one for one in standings if one.loss is None]
    by = "ratio" if comparison is None else comparison.by
    tell = _told_by_tune if plan.kind == "tune" else _told_by_race
    sentences = tell(plan, trials, standings, comparison)
    return Verdict(
        sentences=[*sentences, *_told_by_trouble(plan, standings)],
        notes=_notes(plan, trials, by),
        compared_by=by,
        smallest_difference=None if comparison is None else comparison.smallest,
        seeds_needed=None if comparison is None else comparison.seeds_needed,
        standings=standings,
    )


def _standing(plan: Plan, one: Contestant, trials: Sequence[Trial], default: bool) -> Standing:
    own = [trial for trial in trials if trial.optimizer == one.name]
    tuning = [trial for trial in own if trial.stage == "tune"]
    finals = [trial for trial in own if trial.stage == "seeds" and trial.default == default]
    chosen = dict(one.default) if default else finals[0].setting
    whole = [trial for trial in tuning if trial.stopped_at is None or trial.diverged]
    losses = [trial.loss for trial in finals]
    return Standing(
        optimizer=one.name,
        label=f"{one.label} {AT_DEFAULTS}" if default else one.label,
        setting=chosen,
        losses=losses,
        scores=[trial.score for trial in finals],
        loss=None if None in losses else 0.0,
        interval=None,
        against_lowest=None,
        against_interval=None,
        tied=False,
        lowest=False,
        default_loss=tuning[0].loss,
        ms_per_step=_median([trial.ms_per_step for trial in own]),
        state_bytes_per_element=max(trial.state_bytes_per_element for trial in own),
        trials=len(tuning),
        diverged=sum(trial.diverged for trial in own),
        at_edge={} if default else edges(one.ranges, chosen, [trial.setting for trial in whole]),
    )


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


# Sentences


def _told_by_race(
    plan: Plan, trials: Sequence[Trial], standings: Sequence[Standing], comparison: Comparison | None
) -> list[str]:
    sound = [one for one in standings if one.loss is not None]
    if comparison is None:
        return ["No result: every optimizer diverged in at least one of its final trainings."]
    if len(sound) == 1:
        return [f"Only {sound[0].label} ended all its final trainings: loss {loss_text(sound[0].loss or 0)}."]
    lowest, tied = sound[0], [one for one in sound[1:] if one.tied]
    if comparison.smallest is None:
        return ["No verdict: a single seed does not show how much the seeds themselves change."]
    if len(tied) == len(sound) - 1:
        return _no_winner(plan, sound, comparison)
    sentences = [f"{lowest.label} ended lowest."]
    if tied:
        them = _listed([f"{one.label} ({_against(one, comparison)})" for one in tied])
        sentences = [f"{lowest.label} ended lowest; {them} cannot be distinguished from it."]
    for one in sound[1:]:
        if not one.tied:
            sentences.append(f"{one.label} ended {_higher(one, comparison)}.")
    if tied and comparison.seeds_needed is not None:
        sentences.append(_more_seeds(tied[-1], lowest, comparison.seeds_needed))
    return sentences


def _no_winner(plan: Plan, sound: Sequence[Standing], comparison: Comparison) -> list[str]:
    number, smallest = _counted(len(sound)), comparison.smallest or 0
    limit = f"below {smallest:.3g} ×" if comparison.by == "ratio" else f"below {loss_text(smallest)}"
    sentences = [
        f"No winner. The {number} ended within what seeds alone explain: with {len(plan.seeds)} seeds on this "
        f"task, a difference {limit} cannot be seen."
    ]
    if comparison.seeds_needed is not None:
        sentences.append(_more_seeds(sound[-1], sound[0], comparison.seeds_needed))
    elif (sound[-1].against_lowest or 0) > (1 if comparison.by == "ratio" else 0):
        sentences.append("Even 999 seeds would hardly show a difference as small as the one between them.")
    return sentences


def _more_seeds(one: Standing, lowest: Standing, needed: int) -> str:
    return (
        f"About {needed} seeds would show the gap between {lowest.label} and {one.label}, if it is real; a "
        "larger validation set may do more."
    )


def _told_by_tune(
    plan: Plan, trials: Sequence[Trial], standings: Sequence[Standing], comparison: Comparison | None
) -> list[str]:
    one = plan.contestants[0]
    tuned = next(x for x in standings if not x.label.endswith(AT_DEFAULTS))
    usual = next(x for x in standings if x.label.endswith(AT_DEFAULTS))
    values = _setting_text(tuned.setting)
    if tuned.loss is None:
        return [f"No result: with {values}, {one.label} diverged on another seed."]
    seeds = f"{len(plan.seeds)} fresh seeds"
    sentences = [f"{one.label} with {values} ended at {_loss_text(tuned)} on {seeds}."]
    if usual.loss is None:
        sentences.append(f"With its default {_setting_text(usual.setting)} it diverged.")
    else:
        text = f"With its default {_setting_text(usual.setting)} it ended at {_loss_text(usual)}"
        apart = not (tuned.tied and usual.tied)
        sentences.append(f"{text}{'' if apart else '; the seeds alone could explain that'}.")
    own = [trial for trial in trials if trial.stage == "tune"]
    if best_of(own).loss is not None:
        for name in one.ranges:
            low, high = within(own, name, NEAR)
            if low < high:
                sentences.append(
                    f"{name} from {low:g} to {high:g} was within 25 % of the lowest loss (of one seed, at what "
                    "was tried)."
                )
    return sentences


def _told_by_trouble(plan: Plan, standings: Sequence[Standing]) -> list[str]:
    sentences: list[str] = []
    for one in standings:
        lost = sum(loss is None for loss in one.losses)
        if lost:
            sentences.append(f"{one.label} diverged in {lost} of its {len(one.losses)} final trainings.")
        for name, side in one.at_edge.items():
            value = one.setting[name]
            extreme = "largest" if side == "high" else "smallest"
            low, high = (value / 20, value * 15) if side == "high" else (value / 15, value * 20)
            whose = f"{one.optimizer}.{name}" if plan.kind == "race" else name
            sentences.append(
                f"The {name} of {one.label} is the {extreme} one tried ({value:g}): its result is only a "
                f"bound. Rerun with --search {whose}={float(f'{low:.1g}'):g}..{float(f'{high:.1g}'):g}."
            )
    return sentences


def _against(one: Standing, comparison: Comparison) -> str:
    if one.against_interval is None:
        return "its interval is not known"
    low, high = one.against_interval
    if comparison.by == "ratio":
        return f"{low:.2f} to {high:.2f} × its loss"
    return f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _higher(one: Standing, comparison: Comparison) -> str:
    value, (low, high) = one.against_lowest or 0, one.against_interval or (math.nan, math.nan)
    if comparison.by == "ratio":
        return f"{value:.2f} × as high (95 % interval {low:.2f} to {high:.2f})"
    return f"{value:.3g} higher (95 % interval {low:.3g} to {high:.3g})"


def _loss_text(one: Standing) -> str:
    text = f"loss {loss_text(one.loss or 0)}"
    if one.interval is None:
        return text
    return f"{text} (95 % interval {loss_text(one.interval[0])} to {loss_text(one.interval[1])})"


def _setting_text(setting: Mapping[str, float]) -> str:
    return _listed([f"{name} {value:g}" for name, value in setting.items()]) or "nothing tuned"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _counted(number: int) -> str:
    words = ("two", "three", "four", "five", "six", "seven", "eight")
    return words[number - 2] if 2 <= number <= len(words) + 1 else str(number)


# Conditions


def _notes(plan: Plan, trials: Sequence[Trial], by: str) -> list[str]:
    count = max(one.number for one in plan.trials if one.stage == "tune") + 1
    others = sorted(
        {
            name
            for one in plan.contestants
            for name in usual_settings(one.optimizer)
            if name in OFTEN_TUNED and name not in one.ranges
        }
    )
    steps = {one.steps for one in plan.contestants}
    length = f"{min(steps):,}" if len(steps) == 1 else f"{min(steps):,} to {max(steps):,}"
    notes = [
        f"Task {plan.task_label}, {length} steps of {plan.batch_size} items each, schedule "
        f"{'/'.join(sorted({one.schedule for one in plan.contestants}))}; the same "
        f"{'time' if plan.budget == 'time' else 'number of gradients'} for all.",
        f"Tuned: {', '.join(plan.tuned) or 'nothing'}, with {count} trainings on seed {plan.tuning_seed}, of "
        f"which the worse half of the first ones stopped at {100 * plan.stop_at:g} % of the steps. Not tuned: "
        f"{', '.join(others) or 'nothing'}.",
        f"Losses are those of the validation data on {len(plan.seeds)} fresh seeds, "
        f"{plan.seeds[0]} to {plan.seeds[-1]}; the intervals are Games and "
        f"Howell's{' on their logarithms' if by == 'ratio' else ''}, for all pairs together.",
    ]
    with_rest = [one.label for one in plan.contestants if _steps_with_another(one)]
    if with_rest:
        notes.append(
            f"{_listed(with_rest)} {'steps' if len(with_rest) == 1 else 'step'} hidden matrices only; AdamW at "
            "its defaults steps the rest, and was not tuned."
        )
    items = int(plan.facts.get(VALIDATION_ITEMS, FEW_ITEMS))
    if items < FEW_ITEMS:
        notes.append(
            f"The validation data have only {items} items: with so few, seeds and chance change the loss a "
            f"lot. {FEW_ITEMS} or more would show smaller differences."
        )
    if len(plan.seeds) < FEW_SEEDS:
        notes.append(
            f"A first look: {FEW_SEEDS} seeds or more (--minutes 10) show smaller differences. With fewer, "
            "up to one race in ten of equal optimizers names a winner."
        )
    diverged = sum(trial.diverged for trial in trials)
    if diverged:
        notes.append(f"{diverged} of {len(trials)} trainings diverged; they count as lost.")
    return notes


def _steps_with_another(one: Contestant) -> bool:
    """Whether a rule leaves what is not a hidden matrix to AdamW."""
    make: Any = optimizer_class(one.optimizer)
    return bool(getattr(make, "on_matrices", False)) and not make.steps_vectors()


def best_commands(plan: Plan, verdict: Verdict) -> list[str]:
    """The `steprule train` line of each optimizer with its chosen setting."""
    chosen = {
        one.optimizer: one.setting for one in reversed(verdict.standings) if not one.label.endswith(AT_DEFAULTS)
    }
    lines: list[str] = []
    for one in plan.contestants:
        settings = {**one.fixed, **chosen[one.name]}
        words = ["steprule", "train", *task_options(plan.task), "--optimizer", one.optimizer]
        if "lr" in settings:
            words += ["--lr", f"{settings.pop('lr'):g}"]
        for name, value in settings.items():
            words += ["--set", f"{name}={_typed(value)}"]
        words += [
            "--schedule",
            one.schedule,
            "--epochs",
            str(plan.epochs),
            "--batch-size",
            str(plan.batch_size),
        ]
        lines.append(shlex.join(words))
    return lines


def _typed(value: Any) -> str:
    """A value as --set takes it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, cast("Sequence[Any]", value)))
    return f"{value:g}" if isinstance(value, float) else str(value)
