"""Muon and SOAP beside the matrix products that they need and beside those of other libraries, in one process.

    pip install heavyball pytorch-optimizer
    python benchmarks/matrix_peers.py [--rules Muon,SOAP] [--sets equal,block] [--every 10] [--periods 5]
                                      [--out FILE.json]

For each set of matrices everything takes one step per round, in a new random order for every round. Each step
gets new random gradients, which are not timed. SOAP follows its factors in every tenth round (`--every`), all
SOAPs in the same one.

    ms              the median of the other rounds
    products        how many times as long as the products of its rule a step takes: the median of the ratios
                    within each of the other rounds
    with_refreshes  the mean of ten rounds, one of them with a refresh; the median over such periods

    products of Muon      five Newton-Schulz steps in bf16, all equal matrices at once
    products of SOAP      six, all equal matrices at once: the gradient into the basis (2), the update out of it
                          (2), and the two that the factors take in, which the same operations average
    8 products of SOAP    those and two that turn the momentum, which a library avoids that keeps it turned, as
                          steprule and heavyball do; pytorch-optimizer does not

All start from equal parameters in fp32, with the same step size, betas, decay, ε and longest side. They differ:

    heavyball SOAP          runs without torch.compile, by default with it; merge_dims=False; divides by the
                            larger of √V and ε; a refresh adds a little of the old basis. Its default refreshes
                            in every second step, here in every tenth
    pytorch-optimizer SOAP  steps one matrix after another
    pytorch-optimizer Muon  stacks equal matrices (its default); products in bf16, as torch's and ours
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from matrix_rules import SETS, Shapes, parameters
from matrix_rules import products as products_of_muon
from torch import nn

import steprule
from steprule.lab.bench_machine import facts

PEERS = {"heavyball": "heavyball", "pytorch-optimizer": "pytorch_optimizer"}
MUON = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95}
SOAP = {"lr": 3e-3, "betas": (0.95, 0.95), "eps": 1e-8, "weight_decay": 0.01}
LONGEST = 10000
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def products_of_soap(shapes: Shapes, *, momentum: bool) -> Callable[[], None]:
    """The products of a step between refreshes, of all matrices of one shape at once: nothing else."""
    stacks: list[tuple[torch.Tensor, ...]] = []
    for (rows, columns), count in Counter(shapes).items():
        sizes = [(rows, columns), (rows, rows), (columns, columns), (rows, rows), (columns, columns)]
        stacks.append(tuple(torch.randn(count, *size) for size in sizes))

    def run() -> None:
        for g, p, q, left, right in stacks:
            into = p.mT @ g @ q
            if momentum:
                p.mT @ g @ q
            p @ into @ q.mT
            left.baddbmm_(g, g.mT, beta=0.95, alpha=0.05)
            right.baddbmm_(g.mT, g, beta=0.95, alpha=0.05)

    return run


def installed() -> dict[str, Any]:
    """The other libraries that are here, and a line about each that is not."""
    found: dict[str, Any] = {}
    for package, module in PEERS.items():
        try:
            found[package] = import_module(module)
        except ImportError as error:
            print(f"{package} is skipped ({error}); to measure it: pip install {package}")
    if "heavyball" in found:
        found["heavyball"].utils.compile_mode = None
    return found


def optimizers(rules: list[str], every: int, peers: dict[str, Any]) -> list[tuple[str, str, Make]]:
    """What it is called, which rule it is, and what makes it."""
    return [x for x in all_optimizers(every, peers) if x[1] in rules]


def all_optimizers(every: int, peers: dict[str, Any]) -> Iterator[tuple[str, str, Make]]:
    """The same of both rules."""
    yield "torch Muon", "Muon", lambda params: torch.optim.Muon(params, **MUON)
    yield "Muon", "Muon", lambda params: steprule.Muon(params, **MUON)
    yield "SOAP", "SOAP", lambda params: steprule.SOAP(params, **SOAP, every=every, max_side=LONGEST)
    if "pytorch-optimizer" in peers:
        other = peers["pytorch-optimizer"]
        options = {"precondition_frequency": every, "max_precondition_dim": LONGEST}
        groups = {**MUON, "use_muon": True}
        yield "pytorch-optimizer Muon", "Muon", lambda params: other.Muon([{"params": params, **groups}])
        yield "pytorch-optimizer SOAP", "SOAP", lambda params: other.SOAP(params, **SOAP, **options)
    if "heavyball" in peers:

        def heavyball(params: list[nn.Parameter]) -> torch.optim.Optimizer:
            options = {"shampoo_beta": 0.95, "max_precond_dim": LONGEST, "merge_dims": False}
            optimizer = peers["heavyball"].SOAP(params, **SOAP, **options)
            # 1 / every would refresh in other steps than the others do.
            optimizer.precond_schedule = lambda step: float(refreshes(step, every))
            return optimizer

        yield "heavyball SOAP", "SOAP", heavyball


def refreshes(step: int, every: int) -> bool:
    """The first step only makes the factors, and does not count."""
    return step > 1 and (step - 1) % every == 0


def turns(
    shapes: Shapes, rules: list[str], every: int, periods: int, peers: dict[str, Any]
) -> dict[str, list[float]]:
    """Milliseconds by round, whose last one of each `every` is a refresh."""
    runs: dict[str, Callable[[], Any]] = {}
    if "Muon" in rules:
        runs["products of Muon"] = products_of_muon(shapes)
    if "SOAP" in rules:
        runs["products of SOAP"] = products_of_soap(shapes, momentum=False)
        runs["8 products of SOAP"] = products_of_soap(shapes, momentum=True)
    params: dict[str, list[nn.Parameter]] = {}
    for name, _, make in optimizers(rules, every, peers):
        params[name] = parameters(shapes)
        runs[name] = make(params[name]).step
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)
    first = every + 1  # the steps that make state and kernels, those of a refresh too
    for step in range(1, first + periods * every + 1):
        order.shuffle(names)
        for name in names:
            for param in params.get(name, ()):
                param.grad = torch.randn_like(param)
            start = time.perf_counter()
            runs[name]()
            if step > first:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measured(
    shapes: Shapes, rules: list[str], every: int, periods: int, peers: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for everything."""
    times = turns(shapes, rules, every, periods, peers)
    rule_of = {name: rule for name, rule, _ in optimizers(rules, every, peers)}
    between = [i for i in range(every * periods) if i % every != every - 1]
    rows: list[dict[str, Any]] = []
    for name, found in times.items():
        row: dict[str, Any] = {"what": name, "ms": round(statistics.median(found[i] for i in between), 2)}
        if name in rule_of:
            floor = times[f"products of {rule_of[name]}"]
            row["products"] = round(statistics.median(found[i] / floor[i] for i in between), 2)
        if rule_of.get(name) == "SOAP":
            means = [statistics.mean(found[i : i + every]) for i in range(0, len(found), every)]
            row["with_refreshes"] = round(statistics.median(means), 2)
        rows.append(row)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default="Muon,SOAP")
    parser.add_argument("--sets", default="equal,small,tall,block")
    parser.add_argument("--every", type=int, default=10, help="steps between refreshes, at least 2")
    parser.add_argument("--periods", type=int, default=5, help="how often to measure as many rounds")
    parser.add_argument("--out")
    given = parser.parse_args()
    if given.every < 2 or given.periods < 1:
        parser.error("--every must be at least 2 and --periods at least 1")
    rules = given.rules.split(",")
    if unknown := set(rules) - {"Muon", "SOAP"}:
        parser.error(f"--rules: given {', '.join(sorted(unknown))}, must be Muon, SOAP or both")
    peers = installed()
    results: list[dict[str, Any]] = []
    for name in given.sets.split(","):
        for row in measured(SETS[name], rules, given.every, given.periods, peers):
            beside = f"{row['products']:.2f} x its products" if "products" in row else ""
            amortised = f", {row['with_refreshes']:.2f} ms with refreshes" if "with_refreshes" in row else ""
            print(f"{name:12} {row['what']:24} {row['ms']:9.2f} ms  {beside}{amortised}", flush=True)
            results.append({"set": name, **row})
    if given.out:
        versions = {package: metadata.version(package) for package in peers}
        machine = {**facts(torch.device("cpu")), "date": time.strftime("%Y-%m-%d", time.gmtime())}
        content = {"machine": machine, "peers": versions, "every": given.every, "results": results}
        Path(given.out).parent.mkdir(parents=True, exist_ok=True)
        Path(given.out).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
