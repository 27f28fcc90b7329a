"""`steprule bench`: how long a step takes, compared with torch's and with what the memory allows."""

from __future__ import annotations

import datetime
import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import steprule
from steprule.catalogue import written_out
from steprule.engine.rule import RuleOptimizer
from steprule.lab import bench_machine, bench_report
from steprule.lab.bench_chart import draw_chart
from steprule.lab.bench_estimate import candidates, estimate, slots_of
from steprule.lab.bench_measure import (
    OURS,
    STATES,
    Mover,
    Rule,
    Timing,
    bytes_moved,
    cold_samples,
    entrants,
    iterations,
    peak_bytes,
    ratio,
    rehearse,
    runner_of,
    samples_of,
)
from steprule.lab.bench_models import BenchModel, load_model
from steprule.lab.bench_modified import Modified
from steprule.lab.devices import find_device
from steprule.lab.errors import LabError, Stopped, did_you_mean
from steprule.lab.optimizer_classes import find_rule, optimizer_modifiers, optimizer_name
from steprule.lab.report import open_console

__all__ = ["Asked", "bench"]

FOLDER = Path("runs")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")
# Half the distance between the quartiles, as a share of the median; below this on a quiet machine.
UNSTEADY = 0.1

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """The options of `steprule bench`."""

    model: str
    optimizers: str
    dtype: str
    device: str
    repeats: int


@dataclass(frozen=True)
class Plan:
    """What is going to be measured."""

    model: BenchModel
    rules: list[Rule]
    dtype: torch.dtype
    device: torch.device
    repeats: int

    @property
    def parts(self) -> int:
        """How many parts the measurement has, for a progress bar."""
        return len(self.rules) * (2 * self.repeats + 3)


def bench(asked: Asked, out: Path | None) -> None:
    """Measure; print tables, and write the results to a JSON file with a chart next to it.

    If it is stopped, the rules that are done are shown and kept. Raises `LabError` before anything is measured
    or written if something that was asked for does not exist here.
    """
    plan = _plan(asked)
    for rule in plan.rules:
        rehearse(rule, plan.model.shapes, plan.dtype, plan.device)
    file = _reserve(out, plan.model.name)
    file.unlink()  # If this process is killed, no empty file must be left.
    console = open_console()
    rules: list[dict[str, Any]] = []
    imports: list[dict[str, float]] = []
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **bench_machine.facts(plan.device),
        "model": plan.model.name,
        "tensors": len(plan.model.shapes),
        "numbers": plan.model.numbers,
        "dtype": asked.dtype,
        "repeats": plan.repeats,
    }
    ended: KeyboardInterrupt | LabError | None = None
    try:
        bench_report.print_header(console, result, file)
        params = _make_params(plan)
        with console.status("trying everything once …"):
            seconds = estimate(plan.rules, params, plan.repeats)
        bench_report.print_estimate(console, seconds)
        with bench_report.progress(console, plan.parts) as advance:
            for rule in plan.rules:
                measured = _measure(plan, rule, params, imports, advance)
                rules.append(measured)
    except (KeyboardInterrupt, LabError) as error:
        ended = error
    if rules:
        result |= {"import": _medians(imports), "rules": rules}
        bench_report.print_tables(console, result)
        file = _reserve(out, plan.model.name)
        _keep(console, result, file)
    if ended is not None:
        raise _ending(ended, len(rules), len(plan.rules), file) from None


def _keep(console: Console, result: dict[str, Any], file: Path) -> None:
    try:
        file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw_chart(file.with_suffix(".svg"), result)
    except OSError as error:
        raise LabError(f"cannot write {error.filename or file}: {error.strerror}.") from error
    console.print(f"\nin {file} and {file.with_suffix('.svg')}", soft_wrap=True)


def _ending(error: KeyboardInterrupt | LabError, done: int, of: int, file: Path) -> LabError:
    """The message about a measurement that was stopped or failed."""
    kept = f"{done} of {of} rules are done and kept in {file}." if done else "nothing was kept."
    if isinstance(error, LabError):
        return LabError(f"{error} {kept.capitalize()}")
    return Stopped(f"stopped; {kept}")


# What was asked for


def _plan(asked: Asked) -> Plan:
    if asked.dtype not in DTYPES:
        raise LabError(f"no dtype '{asked.dtype}'. {did_you_mean(asked.dtype, DTYPES)}")
    device = find_device(asked.device)
    if device.type not in DEVICES:
        raise LabError(f"--device {asked.device} cannot be measured. Measure with --device cpu or cuda.")
    rules = _rules(asked.optimizers)
    plan = Plan(load_model(asked.model), rules, DTYPES[asked.dtype], device, asked.repeats)
    _check_memory(plan)
    return plan


def _rules(names: str) -> list[Rule]:
    """The rules with these names, with modifiers or without; `all` are those on single elements, without."""
    if names.strip().lower() == "all":
        return [
            rule
            for rule in steprule.catalogue().values()
            if issubclass(rule, RuleOptimizer) and not rule.on_matrices and rule.gradients != "rows only"
        ]
    found: dict[str, Rule] = {}
    for name in names.split(","):
        first, *more = (part.strip() for part in name.split("+"))
        first, more, _ = written_out(first, more)
        rule = find_rule(first)
        full = "+".join([first, *more])
        modifiers = optimizer_modifiers(optimizer_name(full)) if more else []
        if climbing := [x.name for x in modifiers if hasattr(x, "climb")]:
            raise LabError(
                f"--optimizers {full}: only steps are measured, and {climbing[0]} takes the gradient twice for "
                "each of them. Leave it out; it about doubles the time of a training iteration."
            )
        subject: Rule = Modified(rule, modifiers) if more else rule
        found.setdefault(subject.__name__, subject)
    return list(found.values())


def _check_memory(plan: Plan) -> None:
    """Refuse what would not fit: a system that runs out of memory kills the process without a message."""
    available = bench_machine.available_bytes(plan.device)
    size = plan.model.numbers * plan.dtype.itemsize
    for rule in plan.rules:
        slots = slots_of(rule)
        # Parameters and gradients; the slots of each way to step; the floor's buffers; temporaries.
        needed = round(size * (2 + candidates(rule) * slots + (2 + slots) + 3))
        if available is not None and needed > available:
            raise LabError(
                f"{rule.__name__} on {plan.model.name} needs about {needed / 2**30:.1f} GiB of memory, "
                f"but only {available / 2**30:.1f} GiB is free. Choose a smaller --model."
            )


def _reserve(out: Path | None, model: str) -> Path:
    """Create the file to write to: `out`, or the next free `runs/bench-MODEL-1.json`, `-2`, …."""
    if out is not None and out.suffix != ".json":
        raise LabError(f"--out {out} must be a .json file; the chart goes next to it.")
    folder = FOLDER if out is None else out.parent
    number = 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = folder / f"bench-{model}-{number}.json" if out is None else out
            try:
                file.open("x").close()
                return file
            except FileExistsError:
                if out is not None:
                    raise
                number += 1
    except FileExistsError:
        what = f"'{out}' already exists" if folder.is_dir() else f"'{folder}' is not a folder"
        raise LabError(f"{what}. Give another --out.") from None
    except OSError as error:
        raise LabError(f"cannot write {out or folder}: {error.strerror}.") from error


# What is measured


def _make_params(plan: Plan) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.empty(x, dtype=plan.dtype, device=plan.device)) for x in plan.model.shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    _fill(params)
    return params


def _measure(
    plan: Plan,
    rule: Rule,
    params: list[nn.Parameter],
    imports: list[dict[str, float]],
    advance: Advance,
) -> dict[str, Any]:
    """All measurements of one rule; its import times are added to `imports`."""
    _fill(params)
    steps = _measure_steps(plan, rule, params, advance)
    measured = {"rule": rule.__name__, **steps, "iteration": _measure_iterations(plan, rule, advance)}
    cold, warm = bench_machine.first_step(rule.__name__, plan.dtype, plan.device)
    measured["first_step"] = {"cold": _rounded(cold["first_step"]), "warm": _rounded(warm["first_step"])}
    imports += [cold, warm]
    advance(f"{rule.__name__}: first step")
    gc.collect()
    return measured


def _medians(imports: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: _rounded(statistics.median(x[f"import_{name}"] for x in imports))
        for name in ("torch", "steprule")
    }


def _fill(params: list[nn.Parameter]) -> None:
    """The same random parameters and gradients for every rule."""
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    with torch.no_grad():
        for param in params:
            tensors: list[Any] = [param, param.grad]
            for tensor in tensors:
                tensor.normal_()


def _measure_steps(plan: Plan, rule: Rule, params: list[nn.Parameter], advance: Advance) -> dict[str, Any]:
    who = rule.__name__
    found = entrants(rule, params)
    own = found.optimizers[OURS]
    move = Mover(own, plan.device)
    actions: dict[str, Callable[[], Any]] = {"floor": move}
    actions |= {name: optimizer.step for name, optimizer in found.optimizers.items()}
    samples = samples_of(actions, plan.repeats, plan.device, partial(advance, f"{who}: steps"))
    floor = move.floor(samples.pop("floor"))
    cold = cold_samples(found.optimizers, plan.repeats) if plan.device.type == "cpu" else {}
    steps: dict[str, dict[str, Any]] = {}
    for name, optimizer in found.optimizers.items():
        # State in fewer bits has a lower floor.
        share = bytes_moved(optimizer) / move.bytes if name in STATES else 1
        steps[name] = {
            "ms": _timing(samples[name]),
            "times_floor": _rounded(ratio(samples[name], floor) / share),
            "times_steprule": _rounded(ratio(samples[name], samples[OURS])),
            "transient_bytes": peak_bytes(optimizer.step, plan.device),
        }
        if name in cold:
            steps[name]["cold_ms"] = _timing(cold[name])
    advance(f"{who}: memory")
    times = [_timing(floor), *(step["ms"] for name, step in steps.items() if name == OURS or "torch" in name)]
    return {
        "runner": runner_of(own),
        "unsteady": any(x["high"] - x["low"] > 2 * UNSTEADY * x["median"] for x in times),
        "bytes": move.bytes,
        "bandwidth": _rounded(move.bytes / 1e6 / statistics.median(floor)),
        "floor": _timing(floor),
        "step": steps,
        "absent": found.absent,
    }


def _measure_iterations(plan: Plan, rule: Rule, advance: Advance) -> dict[str, Any]:
    actions = iterations(rule, plan.dtype, plan.device)
    after_round = partial(advance, f"{rule.__name__}: iterations")
    samples = samples_of(actions, plan.repeats, plan.device, after_round)
    return {
        name: {"ms": _timing(own), "times_steprule": _rounded(ratio(own, samples[OURS]))}
        for name, own in samples.items()
    }


def _timing(samples: list[float]) -> dict[str, float]:
    return {name: _rounded(value) for name, value in asdict(Timing.of(samples)).items()}


def _rounded(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")
