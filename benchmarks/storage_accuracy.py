"""Does training work as well in fewer bits? Final losses over several seeds, compared with fp32.

    python benchmarks/storage_accuracy.py [--tasks digits,photo,text] [--rules AdamW,Lion]
                                          [--kept "fp32,state int8"] [--seeds 5] [--out FILE.json]

For each task, rule and storage: the mean final loss on held-out data, and its distance from fp32's in units of
fp32's standard deviation over seeds (z) and in percent. Rules that have other weights to evaluate with are
evaluated with these. State formats train fp32 parameters; `kahan`, `stochastic`, `master` and `none` train bf16
parameters with bf16 gradients, so compare the other three with `master`. Where a rule refuses 8 bits for some
slots, `state int8` keeps these in bf16 and the others in 8 bits. `sums bf16`, `bases bf16` and `pairs bf16`
(both) round what SOAP, Shampoo and Kron have for each pair of rows or columns.

Left out are rules whose slots stay in fp32, since they start as a copy of the parameter (ScheduleFreeSGD, DoG,
LDoG, DoWG; of the modifiers Average, Lookahead, ScheduleFree and ToStart), and ASGD, whose average no step
reads.
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
from steprule import parameter
from steprule.engine.composition import composed
from steprule.lab.bench_machine import facts
from steprule.lab.step import curvature_is_due, estimate_curvature
from steprule.lab.tasks import load_task

# What steps all but hidden matrices.
ADAMW = (steprule.AdamW, {"lr": 2e-3})
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
    "AdEMAMix": (steprule.AdEMAMix, {"lr": 3e-3, "alpha": 8.0}),
    "ADOPT": (steprule.ADOPT, {"lr": 2e-3}),
    "Adan": (steprule.Adan, {"lr": 2e-3}),
    "AdamAtan2": (steprule.AdamAtan2, {"lr": 2e-3}),
    "LAMB": (steprule.LAMB, {"lr": 1e-2}),
    "LARS": (steprule.LARS, {"lr": 10.0}),
    "StableAdamW": (steprule.StableAdamW, {"lr": 2e-3}),
    "MARS": (steprule.MARS, {"lr": 2e-3}),
    "Prodigy": (steprule.Prodigy, {}),
    "DAdaptAdam": (steprule.DAdaptAdam, {}),
    "ScheduleFreeAdamW": (steprule.ScheduleFreeAdamW, {"lr": 5e-3}),
    "ScheduleFreeRAdam": (steprule.ScheduleFreeRAdam, {"lr": 5e-3}),
    "CAME": (steprule.CAME, {"lr": 5e-4}),
    "Adafactor": (steprule.Adafactor, {"lr": 1e-2}),
    "NAdamW": (steprule.NAdamW, {"lr": 2e-3}),
    "Signum": (steprule.Signum, {"lr": 2e-3}),
    "LaProp": (steprule.LaProp, {"lr": 2e-3}),
    "Yogi": (steprule.Yogi, {"lr": 2e-3}),
    "MADGRAD": (steprule.MADGRAD, {"lr": 1e-3}),
    "NovoGrad": (steprule.NovoGrad, {"lr": 3e-2}),
    "AdamP": (steprule.AdamP, {"lr": 2e-3}),
    "SGDP": (steprule.SGDP, {"lr": 3e-2, "momentum": 0.9}),
    "Rprop": (steprule.Rprop, {"lr": 1e-4}),
    "AdaHessian": (steprule.AdaHessian, {"lr": 1e-1}),
    "SophiaH": (steprule.SophiaH, {"lr": 2e-4}),
    "Muon": (steprule.Muon, {"lr": 6e-2, "rest": ADAMW}),
    "AdaMuon": (steprule.AdaMuon, {"lr": 2e-3, "rest": ADAMW}),
    "NorMuon": (steprule.NorMuon, {"lr": 2e-2, "rest": ADAMW}),
    "Scion": (steprule.Scion, {"lr": 2e-3, "rest": ADAMW}),
    "SOAP": (steprule.SOAP, {"lr": 3e-3}),
    "Shampoo": (steprule.Shampoo, {"lr": 2e-3}),
    "Kron": (steprule.Kron, {"lr": 1e-3}),
    "AdamW+EMA": (steprule.AdamW, {"lr": 2e-3, "modifiers": [steprule.EMA(0.99)]}),
    "AdamW+GrokFast": (steprule.AdamW, {"lr": 2e-3, "modifiers": [steprule.GrokFast()]}),
    "AdamW+MARSCorrection": (steprule.AdamW, {"lr": 2e-3, "modifiers": [steprule.MARSCorrection()]}),
    "AdamW+OuterNesterov": (steprule.AdamW, {"lr": 2e-3, "modifiers": [steprule.OuterNesterov()]}),
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
    dtype, _ = KEPT[kept]
    model = task.model.to(dtype)
    steps = STEPS[task_name]
    optimizer = _made(rule, kept, model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = task.train
    x = torch.as_tensor(x)
    for step in range(steps):
        index = torch.randint(len(x), (BATCH[task_name],))
        optimizer.zero_grad()
        if rule in ("AdaHessian", "SophiaH") and curvature_is_due(optimizer, step):
            estimate_curvature(task, model, optimizer, (x[index], y[index]))
        task.loss(_run(model, x[index], dtype), y[index]).backward()
        if rule == "Sophia" and step % 10 == 0:
            optimizer.update_hessian(BATCH[task_name])
        optimizer.step()
        for state in optimizer.state.values():
            for key in state.keys() & ROUNDED.get(kept, ()):
                state[key].copy_(state[key].bfloat16())
        schedule.step()
    optimizer.eval()
    model = model.float().eval()
    with torch.no_grad():
        x, y = (part[:1024] for part in task.validation)
        return float(task.loss(_run(model, x, torch.float32), y))


def _made(rule: str, kept: str, model: torch.nn.Module) -> Any:
    make, options = RULES[rule]
    _, more = KEPT[kept]
    if "rest" in options:
        other, of_rest = options["rest"]
        options = {**options, "rest": (other, {**of_rest, **more})}
    if more.get("state_dtype") == "int8":
        more = {**more, "state_dtype": _in_8_bits(make, options)}
    return make(model if make.on_matrices else model.parameters(), **options, **more)


def _in_8_bits(make: Any, options: dict[str, Any]) -> str | dict[str, str]:
    """8 bits for all slots, or in bf16 those for which they are refused."""
    modifiers = tuple(type(x) for x in options.get("modifiers", ()))
    slots = composed(make, make.update, modifiers).slots.values()
    if not any(slot.not_in_8_bits for slot in slots):
        return "int8"
    kept = [slot for slot in slots if slot.per == "element" and slot.starts is not parameter]
    return {slot.key: "bf16" if slot.not_in_8_bits else "int8" for slot in kept}


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
                percent = 100 * (mean / statistics.mean(base) - 1)
                told = f"loss {mean:.5f}   z {shift:+.2f}   {percent:+.2f} %"
                print(f"{task:<8}{rule:<22}{kept:<17}{told}", flush=True)
    if arguments.out:
        where = {**facts(torch.device("cpu")), "date": time.strftime("%Y-%m-%d")}
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.out.write_text(f'{{"facts": {json.dumps(where)},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
