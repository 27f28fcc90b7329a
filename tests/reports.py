"""Measurements for the tests of reports: a race, runs and logs made by formulas, the same every time."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from steprule.lab.run_folder import RunConfig

OPTIMIZERS = {
    # label: default lr, best lr, loss there, ms per step, bytes of state per element
    "AdamW": (1e-3, 8e-3, 0.031, 3.61, 8.0),
    "Lion": (1e-4, 1.5e-3, 0.041, 3.42, 4.0),
    "Muon": (2e-2, 2.2e-2, 0.029, 5.95, 4.3),
    "SGD": (1e-3, 0.2, 0.046, 3.30, 0.0),
}
STEPS, SEEDS, TRIALS = 550, (1, 2, 3, 4, 5), 16


def make_race(path: Path, task: str = "mnist", complete: bool = True) -> Path:
    """A race of four optimizers, with diverged and stopped trials."""
    path.mkdir(parents=True, exist_ok=True)
    folder, noise = RaceFolder(path), random.Random(0)
    folder.write_plan(_plan(task))
    trials: list[Trial] = []
    for label, facts in OPTIMIZERS.items():
        trials += _tuning(label, facts, noise)
        for number, seed in enumerate(SEEDS, TRIALS):
            loss = facts[2] * math.exp(noise.gauss(0, 0.06))
            trials.append(_trial(label, facts, number, "seeds", seed, {"lr": facts[1]}, loss))
            folder.write_curve(label.lower(), number, _curve(loss, facts, noise))
    if not complete:
        folder.write_trials(trials[:40])
        return path
    folder.write_trials(trials)
    folder.write_verdict(_verdict(trials))
    folder.write_best(
        [f"steprule train --task {task} --optimizer {x.lower()} --lr {f[1]}" for x, f in OPTIMIZERS.items()]
    )
    return path


def _plan(task: str) -> Plan:
    contestants = [
        Contestant(
            label.lower(),
            label,
            label,
            {},
            {"lr": default},
            {"lr": Range(best / 40, best * 25)},
            "cosine",
            STEPS,
            1.0,
            [*range(55, STEPS + 1, 55)],
        )
        for label, (default, best, *_) in OPTIMIZERS.items()
    ]
    planned = [
        PlannedTrial(one.name, number, "tune", 0, number == 0, STEPS, dict(one.default) if not number else None)
        for one in contestants
        for number in range(TRIALS)
    ]
    planned += [
        PlannedTrial(one.name, number, "seeds", seed, False, STEPS)
        for one in contestants
        for number, seed in enumerate(SEEDS, TRIALS)
    ]
    return Plan(
        kind="race",
        command=f"steprule race --task {task} --optimizers adamw,lion,muon,sgd --minutes 10",
        task=task,
        task_label=task,
        loss_label="cross-entropy (nats)",
        score=("accuracy", "%"),
        batch_size=64,
        steps_per_epoch=55,
        parameters=54_000,
        budget="steps",
        tuned=["lr"],
        tuning_seed=0,
        seeds=list(SEEDS),
        stop_at=0.3,
        facts={"torch": "2.13.0", "steprule": "0.1.0", "processor": "a processor", "cores": "2"},
        contestants=contestants,
        trials=planned,
    )


def _trial(
    label: str,
    facts: Any,
    number: int,
    stage: Any,
    seed: int,
    setting: Any,
    loss: float | None,
    stopped: int | None = None,
) -> Trial:
    return Trial(
        optimizer=label.lower(),
        number=number,
        stage=stage,
        seed=seed,
        setting=setting,
        default=stage == "tune" and number == 0,
        loss=loss,
        score=None if loss is None else round(99.5 - 40 * loss, 2),
        steps=STEPS,
        stopped_at=stopped,
        diverged=loss is None,
        ms_per_step=facts[3],
        seconds=facts[3] * (stopped or STEPS) / 1000,
        state_bytes_per_element=facts[4],
    )


def _tuning(label: str, facts: Any, noise: random.Random) -> list[Trial]:
    default, best, least, *_ = facts
    trials = [_trial(label, facts, 0, "tune", 0, {"lr": default}, _loss_at(default, best, least, noise))]
    for number in range(1, TRIALS):
        lr = best if number == TRIALS - 1 else best / 40 * 1000 ** ((number * 0.618) % 1)
        loss = None if lr > 15 * best else _loss_at(lr, best, least, noise)
        late = loss is not None and loss > 0.25
        trials.append(
            _trial(
                label, facts, number, "tune", 0, {"lr": lr}, loss, 160 if late else 93 if loss is None else None
            )
        )
    return trials


def _loss_at(lr: float, best: float, least: float, noise: random.Random) -> float:
    far = math.log10(lr / best)
    return min(2.3, least * math.exp(2.2 * far * far + noise.gauss(0, 0.05)))


def _curve(loss: float, facts: Any, noise: random.Random) -> list[CurvePoint]:
    points: list[CurvePoint] = []
    for step in range(55, STEPS + 1, 55):
        left = 1 - step / STEPS
        value = loss * math.exp(2.6 * left**2 + noise.gauss(0, 0.12) * left)
        points.append(CurvePoint(step, facts[3] * step / 1000, value, round(99.5 - 40 * value, 2)))
    return points


def _verdict(trials: list[Trial]) -> Verdict:
    finals = {
        label: [trial.loss for trial in trials if trial.optimizer == label.lower() and trial.stage == "seeds"]
        for label in OPTIMIZERS
    }
    means = {
        label: math.exp(sum(math.log(x or 1) for x in losses) / len(losses)) for label, losses in finals.items()
    }
    lowest = min(means.values())
    standings = [
        Standing(
            optimizer=label.lower(),
            label=label,
            setting={"lr": OPTIMIZERS[label][1]},
            losses=finals[label],
            scores=[98.1, 98.3, 98.0, 98.4, 98.2],
            loss=mean,
            interval=(mean * 0.92, mean * 1.09),
            against_lowest=mean / lowest,
            against_interval=None if mean == lowest else (mean / lowest * 0.9, mean / lowest * 1.1),
            tied=mean / lowest < 1.1,
            lowest=mean == lowest,
            default_loss=next(x.loss for x in trials if x.optimizer == label.lower() and x.default),
            ms_per_step=OPTIMIZERS[label][3],
            state_bytes_per_element=OPTIMIZERS[label][4],
            trials=TRIALS + len(SEEDS),
            diverged=sum(x.diverged for x in trials if x.optimizer == label.lower()),
            at_edge={},
        )
        for label, mean in sorted(means.items(), key=lambda x: x[1])
    ]
    return Verdict(
        sentences=[
            "Muon ended lowest; AdamW (0.96 to 1.18 × its loss) cannot be told apart from it.",
            "Lion ended 1.42 × as high (95 % interval 1.28 to 1.57), SGD 1.55 × (1.40 to 1.72).",
        ],
        notes=["Tuned: lr; not tuned: betas, weight decay."],
        compared_by="ratio",
        smallest_difference=1.12,
        seeds_needed=14,
        standings=standings,
    )


def make_run(
    path: Path,
    optimizer: str = "AdamW",
    seed: int = 0,
    lr: float = 1e-3,
    task: str = "digits",
    end: float = 0.04,
) -> Path:
    """A run of `steprule train`: 20 epochs of 40 steps."""
    path.mkdir(parents=True, exist_ok=True)
    settings = {"lr": lr, "betas": (0.9, 0.999), "weight_decay": 0.01}
    facts = {"items of train": "1257", "torch": "2.13.0"}
    config = RunConfig(task, optimizer, settings, "cosine", 20, 32, seed, 1, facts=facts)
    (path / "config.json").write_text(json.dumps(asdict(config)))
    noise, lines = random.Random(seed), list[dict[str, Any]]()
    for step in range(1, 801):
        loss = end + 2.2 * math.exp(-step / 90) * noise.uniform(0.7, 1.4) + 0.02 * noise.random()
        epoch = math.ceil(step / 40)
        common = {"step": step, "epoch": epoch, "accuracy": round(100 - 20 * loss, 2)}
        rate = lr * min(1, step / 40) * (1 + math.cos(math.pi * step / 800)) / 2
        lines.append({"split": "train", **common, "loss": loss, "lr": rate, "seconds": round(0.005 * step, 3)})
        if step % 40 == 0:
            lines.append({"split": "validation", **common, "loss": 1.1 * loss + 0.01})
    lines.append({"split": "test", "step": 800, "epoch": 20, "accuracy": 97.5, "loss": 0.06})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
