"""Muon and rules like it beside torch's Muon and beside the matrix products that they need, in one process.

    python benchmarks/matrix_rules.py [--sets equal,block] [--rules Muon] [--repeats 9] [--out FILE.json]

For each set of matrices: the median time of a step of each rule, with state as the parameters and in 8 bits, of
torch's Muon, and of the products of five Newton-Schulz steps on all equal matrices at once. They take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steprule
from steprule.lab.bench_machine import facts

Shapes = list[tuple[int, int]]
SETS: dict[str, Shapes] = {
    "equal": [(256, 256)] * 48,
    "small": [(64, 64)] * 100,
    "tall": [(1024, 64)] * 16,
    # The matrices of one and of twelve blocks of GPT-2 small.
    "block": [(2304, 768), (768, 768), (3072, 768), (768, 3072)],
    "transformer": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
}


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Parameters of these shapes with gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def products(shapes: Shapes) -> Callable[[], None]:
    """Five Newton-Schulz steps on all matrices of one shape at once: nothing but products."""
    stacks: list[Tensor] = []
    for (rows, columns), count in Counter(shapes).items():
        stacks.append(torch.randn(count, *sorted((rows, columns))).bfloat16())

    def run() -> None:
        for x in stacks:
            for _ in range(5):
                gram = x @ x.mT
                polynomial = torch.baddbmm(gram, gram, gram, beta=0.1, alpha=0.1)
                torch.baddbmm(x, polynomial, x, beta=0.1)

    return run


def measured(shapes: Shapes, rules: list[str], repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds of everything, in turns."""
    runs: dict[str, Callable[[], Any]] = {
        "products": products(shapes),
        "torch Muon": torch.optim.Muon(parameters(shapes)).step,
    }
    for rule in rules:
        runs[rule] = getattr(steprule, rule)(parameters(shapes)).step
        runs[f"{rule} int8"] = getattr(steprule, rule)(parameters(shapes), state_dtype="int8").step
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first step makes state and kernels
                times[name].append(1e3 * (time.perf_counter() - start))
    return [{"what": name, "ms": round(statistics.median(found), 2)} for name, found in times.items()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--rules", default="Muon")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out")
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in given.sets.split(","):
        found = measured(SETS[name], given.rules.split(","), given.repeats)
        known = {x["what"]: x["ms"] for x in found}
        for x in found:
            ratio, share = known["torch Muon"] / x["ms"], known["products"] / x["ms"]
            beside = f"{ratio:.2f} x torch's Muon, {share:.0%} of it products"
            print(f"{name:12} {x['what']:12} {x['ms']:9.2f} ms  {beside}")
            results.append({"set": name, **x})
    if given.out:
        Path(given.out).parent.mkdir(parents=True, exist_ok=True)
        Path(given.out).write_text(
            json.dumps({"machine": facts(torch.device("cpu")), "results": results}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
