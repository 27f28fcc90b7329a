"""How long a measurement will take, estimated by trying its parts once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import steprule
from steprule.lab import bench_machine, bench_measure
from steprule.lab.bench_measure import Rule
from steprule.lab.bench_modified import Modified

__all__ = ["candidates", "estimate", "slots_of"]


def candidates(rule: Rule) -> int:
    """The largest number of optimizers, each with its own state, that take part for a rule."""
    if isinstance(rule, Modified):
        return 7
    return 7 if hasattr(torch.optim, rule.__name__) else 4


def slots_of(rule: Rule) -> float:
    """How many elements of state a rule and its modifiers keep for each element of a parameter."""
    kinds = [rule.rule, *rule.modifiers] if isinstance(rule, Modified) else [rule]
    return sum(steprule.describe(kind).numbers_per_parameter for kind in kinds)  # type: ignore[arg-type]


def estimate(rules: Sequence[Rule], params: list[nn.Parameter], repeats: int) -> float:
    """How many seconds it will take to measure these rules.

    Every part is tried once with the first rule; the time for the others is scaled by the bytes they move.
    """
    first, device, dtype = rules[0], params[0].device, params[0].dtype
    started = time.perf_counter()
    steps = [optimizer.step for optimizer in bench_measure.entrants(first, params).optimizers.values()]
    trained = bench_measure.iterations(first, dtype, device)
    once = time.perf_counter() - started
    sample = sum(bench_measure.sample_seconds(action, device) for action in [*steps, *trained.values()])
    # The last one is a for-loop, whose profile takes longest to read.
    once += len(steps) * _seconds(lambda: bench_measure.peak_bytes(steps[-1], device)) / 2
    with tempfile.TemporaryDirectory() as folder:
        fresh = _seconds(lambda: bench_machine.fresh_process(first.__name__, dtype, device, Path(folder)))
    # Samples are also taken to find out how many calls they need.
    shares = [_work(rule) / _work(first) for rule in rules]
    return sum((once + (repeats + 1) * sample) * share + 2 * fresh for share in shares)


def _work(rule: Rule) -> float:
    return candidates(rule) * (3 + 2 * slots_of(rule))


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
