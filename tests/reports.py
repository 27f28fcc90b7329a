"""Runs for the tests of reports, made by formulas, the same every time."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steprule.lab.run_folder import RunConfig


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
