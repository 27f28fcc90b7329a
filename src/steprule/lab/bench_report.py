"""What is printed about a measurement: the plan, the progress and the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["number", "print_estimate", "print_header", "print_tables", "progress"]

LINE_SECONDS = 3.0
STEPS = ("steprule", "steprule foreach", "steprule reference", "torch for-loop", "torch foreach", "torch fused")
STATES = ("bf16", "int8")
WITHOUT = "steprule without"
COLD = ("steprule", "torch for-loop", "torch foreach", "torch fused")
ITERATIONS = ("steprule", "torch default", "torch fused")

ROOMY = 100

Result = Mapping[str, Any]
Cell = str | Text


def number(value: float) -> str:
    """Three digits, as many as a measurement is worth."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def print_header(console: Console, result: Result, file: Path) -> None:
    """Print what will be measured, on what machine, and where the results are kept."""
    grid = Table.grid(padding=(0, 2))
    kind = f"{result['processor']}, {result['cores']} cores, {result['threads']} threads"
    for name, text in {
        "parameters": f"{result['model']}, {result['tensors']} tensors, {result['numbers']:,} elements, "
        f"{result['dtype']}",
        "machine": kind if result["device"] == "cpu" else f"{result['device']}; {kind}",
        "versions": f"steprule {result['steprule']}, torch {result['torch']}, "
        f"llvmlite {result['llvmlite'] or 'not installed'}",
        "load": f"{result['load']}: other work is running and will make the times longer"
        if _busy(result)
        else "",
        "file": str(file),
    }.items():
        if text:
            grid.add_row(Text(name, style="dim"), Text(text))
    console.print(grid)


def print_estimate(console: Console, seconds: float) -> None:
    """Print how long it will take."""
    if seconds < 90:
        about = f"{max(10, 10 * round(seconds / 10))} seconds"
    else:
        minutes = round(seconds / 60)
        about = f"{minutes} minutes" if minutes < 90 else f"{seconds / 3600:.1f} hours"
    console.print(
        Text.assemble(("time        ", "dim"), f"about {about}; Ctrl-C keeps the rules that are done")
    )


def _busy(result: Result) -> bool:
    """Whether other processes use a large part of the machine."""
    return (result["load"] or 0) > result["cores"] / 2


@contextmanager
def progress(console: Console, total: int) -> Generator[Callable[[str], None]]:
    """A bar on a terminal, otherwise a line every few seconds. Call the yielded function after each part."""
    if console.is_terminal:
        columns = (BarColumn(bar_width=None), TextColumn("{task.description}"))
        left = (TimeRemainingColumn(compact=True), TextColumn("left"))
        with Progress(*columns, *left, console=console, expand=True, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)
        return
    done, printed = 0, time.perf_counter()

    def advance(text: str) -> None:
        nonlocal done, printed
        done += 1
        if time.perf_counter() - printed >= LINE_SECONDS:
            printed = time.perf_counter()
            console.print(f"{100 * done // total:3d} %  {text}")

    yield advance


def print_tables(console: Console, result: Result) -> None:
    """Print steps, their memory, whole iterations and first steps, a line per rule."""
    rules: list[Result] = result["rules"]
    _print(
        console,
        "A step in ms, ± half the distance between the quartiles",
        [*STEPS, "floor", "× floor", "torch\u00a0÷ steprule"],
        {_name(x): _steps(x) for x in rules},
    )
    _print(
        console,
        "The same with state in fewer bits, compared with its own floor",
        [*(name for kind in STATES for name in (f"{kind} state", "× floor", "torch\u00a0÷ this"))],
        {_name(x): _states(x) for x in rules if any(f"steprule {kind} state" in x["step"] for kind in STATES)},
    )
    _print(
        console,
        "With modifiers, compared with the rule alone, and with torch's fused rule and what users add to it",
        ["steprule", "without", "× without", "torch and more", "torch\u00a0÷ steprule"],
        {_name(x): _modified(x) for x in rules if WITHOUT in x["step"]},
    )
    _print(
        console,
        "A step after other work, which has taken its memory out of the caches",
        [*COLD, "µs per tensor", "torch\u00a0÷ steprule"],
        {_name(x): _cold(x, result["tensors"]) for x in rules if "cold_ms" in x["step"]["steprule"]},
    )
    _print(
        console,
        "Temporary memory of a step",
        ["runner", *STEPS],
        {_name(x): [x["runner"], *_over(STEPS, x["step"], _memory)] for x in rules},
    )
    _print(
        console,
        "Training iteration of a small network, and first step of a new process, in ms",
        [*(f"iteration {name}" for name in ITERATIONS), "first step cold", "first step cached"],
        {_name(x): _others(x) for x in rules},
    )
    console.print()
    for line in _notes(result):
        console.print(Text(line, style="dim"))


def _notes(result: Result) -> Iterable[str]:
    rules: list[Result] = result["rules"]
    speeds = [x["bandwidth"] for x in rules]
    yield (
        "floor: the bytes that a step must read and write, at the read-write bandwidth measured alongside "
        f"({number(min(speeds))} to {number(max(speeds))} GB/s)"
    )
    if any(x["unsteady"] for x in rules):
        yield (
            "* the machine was busy: samples of the same step differ by 10 % and more. Measure again when "
            "it is quiet."
        )
    if _busy(result):
        yield f"the load was {result['load']} on {result['cores']} cores at the start: other work was running"
    yield "torch ÷ steprule: the time of torch's fastest, divided by that of steprule's default"
    for name, own in result["import"].items():
        over = " after import torch" if name == "steprule" else ""
        yield f"import {name}: {number(own)} ms{over}"


def _name(rule: Result) -> str:
    return f"{rule['rule']} *" if rule["unsteady"] else rule["rule"]


def _steps(rule: Result) -> list[Cell]:
    steps: Result = rule["step"]
    theirs = [step["times_steprule"] for name, step in steps.items() if name.startswith("torch")]
    cells = _over(STEPS, steps, lambda x: _spread(x["ms"]))
    floor, beyond = _spread(rule["floor"]), number(steps["steprule"]["times_floor"])
    return [*cells, floor, beyond, number(min(theirs)) if theirs else "–"]


def _states(rule: Result) -> list[Cell]:
    steps: Result = rule["step"]
    theirs = [step["times_steprule"] for name, step in steps.items() if name.startswith("torch")]
    cells: list[Cell] = []
    for kind in STATES:
        own = steps.get(f"steprule {kind} state")
        faster = number(min(theirs) / own["times_steprule"]) if own and theirs else "–"
        cells += [_spread(own["ms"]), number(own["times_floor"]), faster] if own else ["–"] * 3
    return cells


def _modified(rule: Result) -> list[Cell]:
    steps: Result = rule["step"]
    theirs = steps.get("torch fused")
    own, without = steps["steprule"], steps[WITHOUT]
    by_hand = [_spread(theirs["ms"]), number(theirs["times_steprule"])] if theirs else ["–", "–"]
    return [_spread(own["ms"]), _spread(without["ms"]), number(1 / without["times_steprule"]), *by_hand]


def _cold(rule: Result, tensors: int) -> list[Cell]:
    steps: Result = {name: step for name, step in rule["step"].items() if "cold_ms" in step}
    own = steps["steprule"]["cold_ms"]["median"]
    theirs = [step["cold_ms"]["median"] for name, step in steps.items() if name.startswith("torch")]
    cells = _over(COLD, steps, lambda x: _spread(x["cold_ms"]))
    return [*cells, number(1000 * own / tensors), number(min(theirs) / own) if theirs else "–"]


def _others(rule: Result) -> list[Cell]:
    first = [number(rule["first_step"][name]) for name in ("cold", "warm")]
    return [*_over(ITERATIONS, rule["iteration"], lambda x: _spread(x["ms"])), *first]


def _over(names: Iterable[str], found: Result, cell: Callable[[Any], Cell]) -> list[Cell]:
    return [cell(found[name]) if name in found else "–" for name in names]


def _spread(timing: Result) -> Text:
    half = (timing["high"] - timing["low"]) / 2
    return Text.assemble(number(timing["median"]), (f"\n±{100 * half / timing['median']:.0f}%", "dim"))


def _memory(step: Result) -> str:
    size = step["transient_bytes"]
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"


def _print(console: Console, title: str, headings: list[str], rows: Mapping[str, list[Cell]]) -> None:
    """Print a table, in as many parts as needed for each to fit the console; nothing without rows."""
    if not rows:
        return
    console.print(f"\n{title}")
    endless = console.options.update(max_width=10_000)
    first = 0
    while first < len(headings):
        parts = [_table(console, headings, rows, first, after) for after in range(first + 1, len(headings) + 1)]
        fitting = [x for x in parts if console.measure(x, options=endless).maximum <= console.width] or parts[
            :1
        ]
        console.print()
        console.print(fitting[-1])
        first += len(fitting)


def _table(
    console: Console, headings: list[str], rows: Mapping[str, list[Cell]], first: int, after: int
) -> Table:
    between = 2 if console.width >= ROOMY else 1
    table = Table(box=None, padding=(0, between, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for heading in headings[first:after]:
        # One word per line is narrow; numbers must not be cut.
        table.add_column(heading.replace(" ", "\n"), justify="right", overflow="fold")
    for name, cells in rows.items():
        table.add_row(Text(name, style="bold"), *cells[first:after])
    return table
