"""Does training work as well in fewer bits? Final losses over several seeds, compared with fp32.

    python benchmarks/storage_accuracy.py [--tasks digits,photo,text] [--rules AdamW,Lion]
                                          [--kept "fp32,state int8"] [--seeds 5] [--out FILE.json]

For each task, rule and storage: the mean final loss on held-out data, and its distance from fp32's in units of
fp32's standard deviation over seeds (z). State formats train fp32 parameters; `kahan`, `stochastic`, `master`
and `none` train bf16 parameters with bf16 gradients, so compare the other three with `master`. `sums bf16`,
`bases bf16` and `pairs bf16` (both) round what SOAP, Shampoo and Kron have for each pair of rows or columns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import steprule
from steprule.lab.bench_machine import facts
from steprule.lab.tasks import load_task

# Each with its learning rate.
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD-momentum": (steprule.SGD, {"lr": 3e-2, "momentum": 0.9}),
    "AdamW": (steprule.AdamW, {"lr": 2e-3}),
    "AdaBelief": (steprule.AdaBelief, {"lr": 2e-3}),
    "Lion": (steprule.Lion, {"lr": 2e-4}),
    "AMSGrad": (steprule.AMSGrad, {"lr": 2e-3}),
    "Adamax": (steprule.Adamax, {"lr": 2e-3}),
    "NAdam": (steprule.NAdam, {"lr": 2e-3}),
    "RAdam": (steprule.RAdam, {"lr": 2e-3}),
    "RMSprop": (steprule.RMSprop, {"lr": 1e-3}),
    "RMSprop-momentum": (steprule.RMSprop, {"lr": 1e-3, "momentum": 0.5}),
    "Adagrad": (steprule.Adagrad, {"lr": 2e-2}),
    "Adadelta": (steprule.Adadelta, {"lr": 1.0}),
    "Sophia": (steprule.Sophia, {"lr": 2e-4}),
    "SOAP": (steprule.SOAP, {"lr": 3e-3}),
    "Shampoo": (steprule.Shampoo, {"lr": 2e-3}),
    "Kron": (steprule.Kron, {"lr": 1e-3}),
}
KEPT: dict[str, tuple[torch.dtype, dict[str, str]]] = {
    "fp32": (torch.float32, {}),
    "state bf16": (torch.float32, {"state_dtype": "bf16"}),
    "state int8": (torch.float32, {"state_dtype": "int8"}),
    "bf16 master": (torch.bfloat16, {"low_precision": "master", "state_dtype": "fp32"}),
    "bf16 kahan": (torch.bfloat16, {"low_precision": "kahan", "state_dtype": "fp32"}),
    "bf16 stochastic": (torch.bfloat16, {"low_precision": "stochastic", "state_dtype": "fp32"}),
    "bf16 none": (torch.bfloat16, {"low_precision": "none", "state_dtype": "fp32"}),
}
# Slots that the library keeps in 32 bits, by key: they are rounded to bf16 after each step.
ROUNDED: dict[str, tuple[str, ...]] = {
    "sums bf16": ("left", "right"),
    "bases bf16": ("left_basis", "right_basis", "left_root", "right_root"),
}
ROUNDED["pairs bf16"] = (*ROUNDED["sums bf16"], *ROUNDED["bases bf16"])
KEPT |= dict.fromkeys(ROUNDED, (torch.float32, {}))
STEPS = {"digits": 400, "photo": 300, "text": 200}
BATCH = {"digits": 32, "photo": 512, "text": 16}


def final_loss(task_name: str, rule: str, kept: str, seed: int) -> float:
    """Train for a fixed number of steps under a cosine schedule; the loss on held-out data, in fp32."""
    torch.manual_seed(seed)
    task = load_task(task_name)
    dtype, options = KEPT[kept]
    model = task.model.to(dtype)
    steps = STEPS[task_name]
    make, more = RULES[rule]
    optimizer: Any = make(model.parameters(), **more, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = task.train
    x = torch.as_tensor(x)
    for step in range(steps):
        index = torch.randint(len(x), (BATCH[task_name],))
        optimizer.zero_grad()
        task.loss(_run(model, x[index], dtype), y[index]).backward()
        if rule == "Sophia" and step % 10 == 0:
            optimizer.update_hessian(BATCH[task_name])
        optimizer.step()
        for state in optimizer.state.values():
            for key in state.keys() & ROUNDED.get(kept, ()):
                state[key].copy_(state[key].bfloat16())
        schedule.step()
    model = model.float().eval()
    with torch.no_grad():
        x, y = (part[:1024] for part in task.validation)
        return float(task.loss(_run(model, x, torch.float32), y))


def _run(model: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return model(x.to(dtype) if x.is_floating_point() else x).float()


def main() -> None:
    """Print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="digits,photo")
    parser.add_argument("--rules", default="SGD-momentum,AdamW,AdaBelief,Lion")
    parser.add_argument("--kept", default=",".join(x for x in KEPT if x not in ROUNDED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for task in arguments.tasks.split(","):
        for rule in arguments.rules.split(","):
            base: list[float] = []
            for kept in arguments.kept.split(","):
                losses = [final_loss(task, rule, kept, seed) for seed in range(arguments.seeds)]
                base = base or losses
                spread = statistics.stdev(base) if len(base) > 1 else math.nan
                shift = (statistics.mean(losses) - statistics.mean(base)) / spread
                row = {"task": task, "rule": rule, "kept": kept, "losses": losses, "z": shift}
                rows.append(row)
                mean = statistics.mean(losses)
                print(f"{task:<8}{rule:<18}{kept:<17}loss {mean:.5f}   z {shift:+.2f}", flush=True)
    if arguments.out:
        where = {**facts(torch.device("cpu")), "date": time.strftime("%Y-%m-%d")}
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.out.write_text(f'{{"facts": {json.dumps(where)},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
