"""How long a step takes on a GPU, beside torch's own optimizers, on the parameters of GPT-2 small.

    python benchmarks/gpu_steps.py [--out FILE.json]

For each optimizer: milliseconds between two events around a step, the median of 15 steps in a row, and what its
kernels alone take, by torch's profiler. Where the second is much shorter, the host is slower than the device;
in training it runs ahead. Hyper-parameters are the defaults.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity

import steprule
from steprule.lab.bench_machine import facts
from steprule.lab.bench_models import load_model

SHAPES = load_model("gpt2").shapes
MATRICES = [(768, 768)] * 24 + [(3072, 768)] * 12 + [(768, 3072)] * 12
# What torch's rule of the same name is compared in.
LISTS, FUSED = {"foreach": True}, {"fused": True}
FUSED_THERE = ("SGD", "Adam", "AdamW")
IN_LISTS = ("Adagrad", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "ASGD", "Rprop", "Adafactor")
TORCH: dict[str, list[dict[str, bool]]] = {
    **{name: [FUSED, LISTS] for name in FUSED_THERE},
    **{name: [LISTS] for name in IN_LISTS},
    "Muon": [{}],
}
MOMENTUM = {"SGD": {"lr": 0.1, "momentum": 0.9}}
# The name of each, its dtype, and options besides.
OURS: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    *((rule, torch.float32, MOMENTUM.get(rule, {})) for rule in (*TORCH, "Lion", "MADGRAD", "AdamAtan2")),
    *((name, torch.float32, {}) for name in ("LAMB", "Prodigy", "adamw+ema", "adamw+cautious")),
    ("adamw+global_norm_clip", torch.float32, {}),
    ("AdamW", torch.float32, {"state_dtype": "int8"}),
    ("AdamW", torch.bfloat16, {}),
    ("AdamW", torch.bfloat16, {"low_precision": "stochastic"}),
]


def parameters(shapes: Any, dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters on the GPU, with gradients."""
    found = [nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in shapes]
    for param in found:
        param.grad = torch.randn_like(param)
    return found


def step_ms(step: Any, steps: int = 15) -> float:
    """The median time of a step, of several in a row."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    pairs: list[Any] = []
    for _ in range(steps):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        step()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def kernels_ms(step: Any, steps: int = 5) -> float:
    """How long the device works in a step."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sum(x.device_time for x in profile.events() if x.device_type == device) / steps / 1000


def copy_gb_per_second() -> float:
    """What a copy of 1 GiB reads and writes."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.itemsize / step_ms(lambda: target.copy_(source)) / 1e6


def main() -> None:
    """Measure, print, and write a file."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, help="a JSON file for the results")
    out: Path | None = arguments.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("gpu_steps.py: torch finds no CUDA device here.")
    warnings.simplefilter("ignore", UserWarning)  # of updates that round away
    device = torch.device("cuda")
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **facts(device),
        "copy_gb_per_second": round(copy_gb_per_second()),
        "steps": [],
    }
    for name, dtype, options in OURS:
        params = parameters(MATRICES if name == "Muon" else SHAPES, dtype)
        steps = {"steprule": steprule.create(name.lower(), params, **options).step}
        alike = options in ({}, MOMENTUM.get(name))
        for more in TORCH.get(name, []) if alike else []:
            theirs: Any = getattr(torch.optim, name)(params, **options, **more)
            steps[" ".join(["torch", *more])] = theirs.step
        times = {who: round(step_ms(step), 3) for who, step in steps.items()}
        alone = {who: round(kernels_ms(step), 3) for who, step in steps.items()}
        row = {"name": name, "dtype": str(dtype).removeprefix("torch."), "options": options}
        result["steps"].append({**row, "step_ms": times, "kernels_ms": alone})
        print(f"{name} {row['dtype']} {options or ''}: {times}; kernels alone: {alone}", flush=True)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
