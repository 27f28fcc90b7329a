"""A race with canned numbers, for tests of what is made from one; nothing is trained."""

from __future__ import annotations

import math
from pathlib import Path

from steprule.lab.racing.folder import (
    Contestant,
    CurvePoint,
    Plan,
    PlannedTrial,
    RaceFolder,
    Range,
    Standing,
    Trial,
    Verdict,
)

STEPS, STOP_AT = 550, 0.3
EVALUATED_AT = tuple(range(55, STEPS + 1, 55))
SEEDS = (1, 2, 3, 4, 5)
# Name, label, default lr, range, best lr, lowest loss, ms per step, bytes of state per element.
CANNED = (
    ("adamw", "AdamW", 1e-3, (1e-4, 1e-1), 6e-3, 0.150, 3.6, 8.0),
    ("lion", "Lion", 1e-4, (1e-5, 1e-2), 8e-4, 0.190, 3.4, 4.0),
    ("torch-sgd", "torch.optim.SGD", 1e-3, (3e-3, 3.0), 2.2, 0.270, 3.2, 0.0),
    ("signum", "Signum", 1e-3, (1e-4, 1e-1), 1e-3, 0.152, 3.3, 4.0),
)


def _loss(best: float, lowest: float, lr: float, seed: int) -> float | None:
    """A bowl in log lr, with a little noise by seed; far above the best lr it diverges."""
    away = math.log10(lr / best)
    if away > 1.2:
        return None
    return lowest * math.exp(min(away**2, 2.5) + 0.04 * math.sin(7 * seed + 100 * lowest))


def canned_race(path: Path, task: str = "mnist", complete: bool = True) -> RaceFolder:
    """Write the folder of a race of four optimizers: one clear loser, a tie, an edge, diverged trials.

    task: its name, as it would be shown. complete: False for a race that is still running.
    """
    path.mkdir(parents=True, exist_ok=True)
    folder = RaceFolder(path)
    folder.write_plan(canned_plan(task))
    trials = canned_trials()
    if not complete:
        trials = trials[: len(trials) // 2]
    for trial in trials:
        folder.write_curve(trial.optimizer, trial.number, _curve(trial))
        folder.add_trial(trial)
    if complete:
        folder.write_verdict(_verdict(trials))
        folder.write_best(
            [
                f"steprule train --task {task} --optimizer {label.lower().replace('torch.optim.', 'torch:')} "
                f"--lr {best:g} --schedule cosine --epochs 10"
                for _, label, _, _, best, *_ in CANNED
            ]
        )
    return folder


def canned_trials() -> list[Trial]:
    """Its trials, all ended."""
    return [trial for canned in CANNED for trial in _trials(*canned)]


def _setting(number: int, default: float, low: float, high: float, best: float) -> float:
    if number == 0:
        return default
    if number >= 16:
        return best
    place = (number * 0.618) % 1 if number < 12 else 0.4 + 0.05 * (number - 12)
    return low * (high / low) ** place


def _trials(
    name: str,
    _: str,
    default: float,
    where: tuple[float, float],
    best: float,
    lowest: float,
    ms: float,
    size: float,
) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(16 + len(SEEDS)):
        stage = "tune" if number < 16 else "seeds"
        seed = 0 if number < 16 else SEEDS[number - 16]
        lr = _setting(number, default, *where, best)
        loss = _loss(best, lowest, lr, seed)
        halted = number % 2 == 1 and number < 12
        stopped = 57 if loss is None else round(STOP_AT * STEPS) if halted else None
        taken = STEPS if stopped is None else stopped
        shown = None if loss is None else loss * (3 if halted else 1)
        trials.append(
            Trial(
                optimizer=name,
                number=number,
                stage=stage,
                seed=seed,
                setting={"lr": lr},
                default=number == 0,
                loss=shown,
                score=None if shown is None else 100 * math.exp(-shown / 4),
                steps=taken,
                stopped_at=stopped,
                diverged=loss is None,
                ms_per_step=ms,
                seconds=ms * taken / 1000,
                state_bytes_per_element=size,
            )
        )
    return trials


def _curve(trial: Trial) -> list[CurvePoint]:
    points: list[CurvePoint] = []
    for step in (at for at in EVALUATED_AT if at <= trial.steps):
        loss = None if trial.loss is None else trial.loss + 2.3 * math.exp(-step / 80)
        score = None if loss is None else 100 * math.exp(-loss / 4)
        points.append(CurvePoint(step, step * trial.ms_per_step / 1000, loss, score))
    return points


def canned_plan(task: str = "mnist") -> Plan:
    """Its plan."""
    contestants = [
        Contestant(
            name=name,
            label=label,
            optimizer=label.replace("torch.optim.", "torch:"),
            fixed={"momentum": 0.9} if label.endswith("SGD") else {},
            default={"lr": default},
            ranges={"lr": Range(*where)},
            schedule="cosine",
            steps=STEPS,
            gradients_per_step=1.0,
            evaluated_at=EVALUATED_AT,
        )
        for name, label, default, where, *_ in CANNED
    ]
    planned: list[PlannedTrial] = []
    for name, _, default, where, best, *_ in CANNED:
        for number in range(16 + len(SEEDS)):
            planned.append(
                PlannedTrial(
                    optimizer=name,
                    number=number,
                    stage="tune" if number < 16 else "seeds",
                    seed=0 if number < 16 else SEEDS[number - 16],
                    default=number == 0,
                    steps=STEPS,
                    setting={"lr": _setting(number, default, *where, best)} if number < 12 else None,
                    near=(0.25 * (number - 12) + 0.1,) if 12 <= number < 16 else None,
                )
            )
    return Plan(
        kind="race",
        command=f"steprule race --task {task} --optimizers adamw,lion,torch:SGD,mine.py:Signum --minutes 10",
        task=task,
        task_label=task,
        loss_label="cross-entropy (nats)",
        score=("accuracy", "%"),
        device="cpu",
        epochs=10,
        batch_size=64,
        steps_per_epoch=55,
        parameters=54_000,
        budget="steps",
        tuned=("lr",),
        tuning_seed=0,
        seeds=SEEDS,
        stop_at=STOP_AT,
        facts={"items of train": "3500", "items of validation": "1000", "torch": "2.13.0", "device": "cpu"},
        contestants=contestants,
        trials=planned,
    )


def _verdict(trials: list[Trial]) -> Verdict:
    standings: list[Standing] = []
    ratios = {"adamw": (1.0, None), "signum": (1.03, (0.94, 1.12)), "lion": (1.31, (1.2, 1.43))}
    ratios["torch-sgd"] = (1.82, (1.67, 1.99))
    for name, label, _, _, best, lowest, ms, size in sorted(CANNED, key=lambda canned: canned[5]):
        own = [trial for trial in trials if trial.optimizer == name]
        finals = [trial for trial in own if trial.stage == "seeds"]
        losses = [trial.loss for trial in finals if trial.loss is not None]
        middle = math.exp(sum(map(math.log, losses)) / len(losses))
        ratio, interval = ratios[name]
        standings.append(
            Standing(
                optimizer=name,
                label=label,
                setting={"lr": best},
                losses=losses,
                scores=[trial.score for trial in finals],
                loss=middle,
                interval=(middle * 0.96, middle * 1.04),
                against_lowest=ratio,
                against_interval=interval,
                tied=ratio < 1.1,
                lowest=ratio == 1,
                default_loss=own[0].loss,
                ms_per_step=ms,
                state_bytes_per_element=size,
                trials=16,
                diverged=sum(trial.diverged for trial in own),
                at_edge={"lr": "high"} if name == "torch-sgd" else {},
            )
        )
        assert abs(middle / lowest - 1) < 0.1
    return Verdict(
        sentences=[
            "AdamW ended lowest; Signum (0.94 to 1.12 × its loss) cannot be distinguished from it.",
            "Lion ended 1.31 × as high (95 % interval 1.20 to 1.43).",
            "torch.optim.SGD ended 1.82 × as high (95 % interval 1.67 to 1.99).",
            "The best lr of torch.optim.SGD is at the upper edge of what was tried (2.2): its result is "
            "only a bound. Rerun with --search torch-sgd.lr=0.1..30.",
        ],
        notes=["Tuned: lr. Not tuned: betas, weight_decay. 16 trials on seed 0, then 5 fresh seeds."],
        compared_by="ratio",
        smallest_difference=1.09,
        seeds_needed=48,
        standings=standings,
    )
