"""What a race says: from canned numbers, and whether its intervals hold in simulated races."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy
import pytest
from races import canned_plan, canned_trials
from scipy import stats

from steprule.lab.racing.folder import Plan, Trial
from steprule.lab.racing.statistics import compare
from steprule.lab.racing.verdict import best_commands, verdict_of


def race() -> tuple[Plan, list[Trial]]:
    plan = canned_plan()
    # There is no file mine.py.
    known = [replace(x, optimizer="Lion" if x.name == "signum" else x.optimizer) for x in plan.contestants]
    return replace(plan, contestants=known), canned_trials()


def with_finals(trials: list[Trial], **losses: list[float | None]) -> list[Trial]:
    """The trials with other final losses, by optimizer."""
    changed: list[Trial] = []
    for trial in trials:
        given = losses.get(trial.optimizer.replace("-", "_"))
        if given is not None and trial.stage == "seeds":
            loss = given[trial.seed - 1]
            trial = replace(trial, loss=loss, diverged=loss is None, stopped_at=9 if loss is None else None)
        changed.append(trial)
    return changed


def sentences(plan: Plan, trials: list[Trial]) -> str:
    return " ".join(verdict_of(plan, trials).sentences)


AROUND = (0.99, 1.0, 1.01, 1.02, 0.98)


def some(middle: float) -> list[float | None]:
    return [middle * factor for factor in AROUND]


def test_a_tie_a_loser_and_an_edge() -> None:
    plan, trials = race()
    trials = with_finals(trials, adamw=some(0.1), signum=some(0.101), lion=some(0.13), torch_sgd=some(0.147))
    verdict = verdict_of(plan, trials)
    assert [one.optimizer for one in verdict.standings] == ["adamw", "signum", "lion", "torch-sgd"]
    assert verdict.sentences[0].startswith(
        "AdamW ended lowest; Signum (0.98 to 1.04 × its loss) cannot be distinguished"
    )
    assert verdict.sentences[1] == "Lion ended 1.30 × as high (95 % interval 1.26 to 1.34)."
    assert verdict.sentences[2] == "torch.optim.SGD ended 1.47 × as high (95 % interval 1.42 to 1.52)."
    assert [one.tied for one in verdict.standings] == [True, True, False, False]
    assert verdict.standings[0].lowest
    assert verdict.standings[3].at_edge == {"lr": "high"}
    assert (
        "The lr of torch.optim.SGD is the largest one tried (2.2): its result is only a bound."
        in verdict.sentences[-1]
    )
    assert "--search torch-sgd.lr=0.1..30" in verdict.sentences[-1]
    text = " ".join([*verdict.sentences, *verdict.notes])
    assert "best" not in text
    assert "significant" not in text
    assert "Not tuned: betas, momentum, weight_decay." in text
    assert "trainings diverged; they count as lost" in text


def test_no_winner_says_what_could_be_seen_and_what_it_would_take() -> None:
    plan, trials = race()
    spread = [0.02, 0.03, 0.025, 0.015, 0.04]
    trials = with_finals(
        trials,
        adamw=[*spread],
        lion=[x * 1.3 for x in spread],
        torch_sgd=[x * 1.2 for x in spread],
        signum=[x * 1.1 for x in spread],
    )
    verdict = verdict_of(plan, trials)
    assert verdict.smallest_difference == pytest.approx(
        math.exp(4.529 * numpy.log(spread).std(ddof=1) / 5**0.5), rel=1e-3
    )
    assert verdict.sentences[0] == (
        "No winner. The four ended within what seeds alone explain: with 5 seeds on this task, a difference "
        f"below {verdict.smallest_difference:.3g} × cannot be seen."
    )
    assert verdict.seeds_needed is not None
    assert verdict.seeds_needed > 30
    assert verdict.sentences[1].startswith(
        f"About {verdict.seeds_needed} seeds would show the gap between AdamW and Lion"
    )
    assert all(one.tied for one in verdict.standings)


def test_an_optimizer_that_diverged_on_a_fresh_seed_has_no_loss_and_comes_last() -> None:
    plan, trials = race()
    verdict = verdict_of(plan, with_finals(trials, adamw=[0.1, None, 0.1, 0.1, 0.1]))
    assert verdict.standings[-1].optimizer == "adamw"
    assert verdict.standings[-1].loss is None
    assert "AdamW diverged in 1 of its 5 final trainings." in verdict.sentences
    assert verdict.sentences[0].startswith("Signum ended lowest")
    nothing: list[float | None] = [None] * 5
    all_lost = with_finals(trials, adamw=nothing, lion=nothing, torch_sgd=nothing, signum=nothing)
    assert sentences(plan, all_lost).startswith("No result: every optimizer diverged")
    one_left = with_finals(trials, adamw=nothing, lion=nothing, torch_sgd=nothing)
    assert sentences(plan, one_left).startswith("Only Signum ended all its final trainings")


def test_losses_below_zero_are_compared_as_differences() -> None:
    plan, trials = race()
    trials = with_finals(trials, adamw=[-5.0, -5.1, -4.9, -5.0, -5.0], lion=[-2.0, -2.1, -1.9, -2.0, -2.0])
    verdict = verdict_of(plan, trials)
    assert verdict.compared_by == "difference"
    assert verdict.standings[1].against_lowest == pytest.approx(3.0)
    assert verdict.sentences[0] == "AdamW ended lowest."
    assert verdict.sentences[1] == "Lion ended 3 higher (95 % interval 2.86 to 3.14)."


def test_a_small_validation_set_and_few_seeds_are_said() -> None:
    plan, trials = race()
    few = replace(plan, seeds=(1, 2, 3), facts={**plan.facts, "items of validation": "150"})
    text = " ".join(verdict_of(few, [t for t in trials if t.seed <= 3]).notes)
    assert "The validation data have only 150 items" in text
    assert "A first look" in text
    assert "validation data have only" not in " ".join(verdict_of(plan, trials).notes)


def test_a_tuning_compares_with_the_default_and_names_the_range() -> None:
    plan, trials = race()
    plan = replace(plan, kind="tune", contestants=[plan.contestants[1]])
    own = [trial for trial in trials if trial.optimizer == "lion"]
    finals = [
        replace(t, number=t.number + 5, default=True, setting={"lr": 1e-4}, loss=0.4) for t in own if t.seed
    ]
    verdict = verdict_of(plan, [*own, *finals])
    assert [one.label for one in verdict.standings] == ["Lion", "Lion at its defaults"]
    assert verdict.sentences[0].startswith("Lion with lr 0.0008 ended at loss 0.19")
    assert verdict.sentences[1].startswith("With its default lr 0.0001 it ended at loss 0.400")
    assert "explain" not in verdict.sentences[1]
    assert "was within 25 % of the lowest loss" in verdict.sentences[2]
    (line,) = best_commands(plan, verdict)
    assert line == (
        "steprule train --task mnist --optimizer Lion --lr 0.0008 --schedule cosine --epochs 10 --batch-size 64"
    )
    tied = [replace(trial, loss=0.19 * (1 + 0.01 * trial.seed)) for trial in finals]
    assert "the seeds alone could explain that" in verdict_of(plan, [*own, *tied]).sentences[1]


def test_the_commands_have_what_was_fixed() -> None:
    plan, trials = race()
    lines = best_commands(plan, verdict_of(plan, trials))
    assert lines[2].endswith(
        "--optimizer torch:SGD --lr 2.2 --set momentum=0.9 --schedule cosine --epochs 10 --batch-size 64"
    )


# Simulated races


def test_the_interval_of_two_is_welchs() -> None:
    one, other = [0.9, 1.0, 1.2, 1.1, 1.3], [2.0, 3.1, 2.2, 2.9, 2.4]
    found = compare([one, other], as_ratios=False).compared[1].against_interval
    welch: Any = stats.ttest_ind(other, one, equal_var=False).confidence_interval()
    assert found == pytest.approx((welch.low, welch.high), rel=0.01)


def test_the_interval_of_four_with_equal_spreads_has_the_tables_value() -> None:
    """4.529 is the studentized range's 5 % point for 4 means and 8 degrees of freedom, as in any table."""
    values = [-0.2, -0.1, 0.0, 0.1, 0.2]
    found = compare([[x + shift for x in values] for shift in (0.0, 0.1, 0.5, 0.9)], as_ratios=False)
    half = 4.529 * numpy.std(values, ddof=1) / 5**0.5
    assert found.smallest == pytest.approx(half, rel=1e-3)
    assert found.compared[2].against_interval == pytest.approx((0.5 - half, 0.5 + half), rel=1e-3)
    assert [one.tied for one in found.compared] == [True, True, False, False]


def test_one_seed_shows_nothing() -> None:
    found = compare([[0.1], [0.2]])
    assert found.smallest is None
    assert found.seeds_needed is None
    assert [one.interval for one in found.compared] == [None, None]
    assert all(one.tied for one in found.compared)


def test_losses_without_any_spread_are_told_apart() -> None:
    found = compare([[0.1, 0.1], [0.2, 0.2]])
    assert [one.tied for one in found.compared] == [True, False]
    assert found.compared[1].against_interval == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize("spreads", [(0.3, 0.3, 0.3, 0.3), (0.03, 0.03, 0.03, 0.3)])
def test_two_thousand_races_of_equal_optimizers_have_few_winners(spreads: tuple[float, ...]) -> None:
    """Also if seeds move one of them ten times as far, where a pooled spread would name winners in 12 %."""
    draws = numpy.random.default_rng(5)
    races, middle = 2000, math.exp(-2)
    false, covered, pairs = 0, 0, 0
    scale = numpy.array(spreads)[:, None]
    for losses in numpy.exp(-2 + scale * draws.standard_normal((races, 4, 5))).tolist():
        found = compare(losses)
        false += not all(one.tied for one in found.compared)
        covered += sum(one.interval[0] <= middle <= one.interval[1] for one in found.compared if one.interval)
        pairs += len(found.compared)
    assert 0.02 <= false / races <= 0.06
    assert 0.94 <= covered / pairs <= 0.96


def test_the_intervals_against_the_lowest_cover_the_truth_together() -> None:
    draws = numpy.random.default_rng(1)
    truth = numpy.array([-2.0, -1.8, -1.5, -2.1])
    covered, races = 0, 2000
    for losses in numpy.exp(truth[:, None] + 0.2 * draws.standard_normal((races, 4, 5))).tolist():
        found = compare(losses)
        inside = [
            one.against_interval is None
            or one.against_interval[0] <= math.exp(truth[i] - truth[found.lowest]) <= one.against_interval[1]
            for i, one in enumerate(found.compared)
        ]
        covered += all(inside)
    assert covered / races >= 0.94


def test_the_number_of_seeds_would_show_the_gap_four_times_out_of_five() -> None:
    gap, spread = 0.2, 0.2
    scaled = numpy.array([-1.265, -0.632, 0.0, 0.632, 1.265]) * spread  # a standard deviation of 0.2
    found = compare([numpy.exp(-2 + scaled).tolist(), numpy.exp(-2 + gap + scaled).tolist()])
    assert found.seeds_needed is not None
    draws = numpy.random.default_rng(2)
    shown, races = 0, 1000
    truth = numpy.array([[-2.0], [-2.0 + gap]])
    for losses in numpy.exp(truth + spread * draws.standard_normal((races, 2, found.seeds_needed))).tolist():
        shown += not all(one.tied for one in compare(losses).compared)
    assert 0.74 <= shown / races <= 0.88
