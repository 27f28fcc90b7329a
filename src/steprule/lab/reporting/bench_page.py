"""The chart and the page of measurements by `steprule bench`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from steprule.lab.errors import LabError
from steprule.lab.reporting.axes import Axis, value_text
from steprule.lab.reporting.page import Figure, Page, Table, View
from steprule.lab.reporting.rows import Bar, bar_chart
from steprule.lab.reporting.svg import Drawing
from steprule.lab.reporting.words import Words

__all__ = ["LEGEND", "SHOWN", "bench_chart", "bench_page", "read_bench", "where_measured"]

Result = Mapping[str, Any]

OURS = "steprule"
# What the chart shows, with the number of its colour.
SHOWN = {OURS: 0, "torch fused": 1, "torch foreach": 2, "torch for-loop": 3}
LEGEND = {
    OURS: "steprule, default",
    "torch fused": "torch, fused",
    "torch foreach": "torch, foreach",
    "torch for-loop": "torch, for-loop",
}
NEEDED = ("model", "numbers", "tensors", "dtype", "processor", "threads", "torch", "repeats", "rules")
# A difference below this share is not called one.
EQUAL = 1.02


def read_bench(file: Path) -> dict[str, Any]:
    """What `steprule bench` kept in a file. Raises `LabError` if it is something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise LabError(f"{file} is not JSON: {error}.") from error
    missing = [key for key in NEEDED if not isinstance(values, dict) or key not in values]
    if missing:
        raise LabError(
            f"{file} is not a measurement by `steprule bench`: it has no {', '.join(missing)}. A log in JSON "
            "has one object a line and is called .jsonl."
        )
    result = cast("dict[str, Any]", values)
    if not result["rules"]:
        raise LabError(f"{file} has no rules that were measured.")
    return result


def bench_chart(result: Result, say: Words, width: float = 640.0) -> Drawing:
    """How long a step of every rule takes, as multiples of the floor."""
    rows: list[tuple[str, list[Bar]]] = []
    for rule in result["rules"]:
        name = f"{rule['rule']} *" if rule.get("unsteady") else str(rule["rule"])
        bars = [
            _bar(name, way, rule["step"][way], style, say)
            for way, style in SHOWN.items()
            if way in rule["step"]
        ]
        rows.append((name, bars))
    label = say("time of a step ÷ the floor, which is the time that moving its bytes takes")
    return bar_chart(rows, Axis(label, log=True), _title(result, say), limit=(1.0, say("floor")), width=width)


def _bar(rule: str, way: str, step: Result, style: int, say: Words) -> Bar:
    times, ms = float(step["times_floor"]), float(step["ms"]["median"])
    text = f"{value_text(ms)} ms, {value_text(times)} ×"
    return Bar(times, text, f"{rule}, {say(LEGEND[way])}: {text}", style, strong=way == OURS)


def _title(result: Result, say: Words) -> str:
    return say(
        "One step of {model}: {numbers} elements in {tensors} tensors, {dtype}",
        model=result["model"],
        numbers=f"{result['numbers']:,}",
        tensors=result["tensors"],
        dtype=result["dtype"],
    )


def bench_page(results: Sequence[tuple[Path, Result]], command: str, say: Words) -> Page:
    """The page of one or several measurements, one chart each."""
    first = results[0][1]
    there = {way for _, result in results for rule in result["rules"] for way in rule["step"]}
    figures = [_figure(result, say) for _, result in results]
    models = say.listed(list(dict.fromkeys(str(result["model"]) for _, result in results)))
    return Page(
        title=say("Time of an optimizer's step: {models}", models=models),
        subtitle=where_measured(first),
        verdict=[_verdict(result, len(results) > 1, say) for _, result in results],
        main=_table([result for _, result in results], say),
        notes=_notes([result for _, result in results], say),
        legend=[(say(LEGEND[way]), style) for way, style in SHOWN.items() if way in there],
        bars=True,
        figures=figures,
        tables=[
            (say("All ways to step: {model}", model=result["model"]), _all(result, say))
            for _, result in results
        ],
        commands=[*(_bench_command(file, result) for file, result in results), command],
        facts=_facts(first),
    )


def where_measured(result: Result) -> str:
    """Machine, threads, version of torch and date."""
    device = result.get("device", "cpu")
    where = result["processor"] if device == "cpu" else device
    return f"{where}, {result['threads']} threads, torch {result['torch']}, {str(result.get('date', ''))[:10]}"


def _figure(result: Result, say: Words) -> Figure:
    drawing = bench_chart(result, say)
    note = say("Median of {repeats} samples, measured in turns.", repeats=result["repeats"])
    if any(rule.get("unsteady") for rule in result["rules"]):
        note += " " + say("* The machine was busy: samples of the same step differ by 10 % and more.")
    return Figure(drawing.says, note, [View(drawing)], wide=True)


def _best_of_torch(rule: Result) -> tuple[str, float] | None:
    theirs = {
        way: float(step["times_steprule"]) for way, step in rule["step"].items() if way.startswith("torch")
    }
    best = min(theirs, key=lambda way: theirs[way], default=None)
    return None if best is None else (best, theirs[best])


def _verdict(result: Result, several: bool, say: Words) -> str:
    compared = {str(rule["rule"]): best[1] for rule in result["rules"] if (best := _best_of_torch(rule))}
    floors = [float(rule["step"][OURS]["times_floor"]) for rule in result["rules"] if OURS in rule["step"]]
    before = f"{result['model']}: " if several else ""
    sentences: list[str] = []
    if compared:
        faster = [name for name, times in compared.items() if times > EQUAL]
        slower = [f"{name} ({value_text(times)} ×)" for name, times in compared.items() if times < 1 / EQUAL]
        mean = statistics.geometric_mean(compared.values())
        sentences.append(
            say(
                "steprule's default step is faster than torch's fastest for {count} of {all} rules that torch "
                "has: {mean} × in the geometric mean.",
                count=len(faster),
                all=len(compared),
                mean=value_text(mean),
            )
        )
        if slower:
            sentences.append(say("It is slower for {rules}.", rules=say.listed(slower)))
    if floors:
        low, high = value_text(min(floors)), value_text(max(floors))
        sentences.append(say("A step takes {low} to {high} times the floor.", low=low, high=high))
    return before + " ".join(sentences)


def _notes(results: Sequence[Result], say: Words) -> list[str]:
    notes = [
        say("floor: the bytes that a step must read and write, at the bandwidth measured alongside."),
        say("faster by: the median of the ratios within each turn."),
    ]
    if any((result.get("load") or 0) > result.get("cores", 1) / 2 for result in results):
        notes.append(say("Other work was running on the machine when this began."))
    return notes


def _spread(timing: Result) -> str:
    half = (timing["high"] - timing["low"]) / 2
    return f"{value_text(timing['median'])} ± {value_text(half, 2)}"


def _table(results: Sequence[Result], say: Words) -> Table:
    several = len(results) > 1
    headings = [
        say("rule"),
        *([say("model")] if several else []),
        say("steprule, ms"),
        say("torch, ms"),
        say("faster by"),
    ]
    rows: list[list[str]] = []
    for result in results:
        for rule in result["rules"]:
            best, steps = _best_of_torch(rule), rule["step"]
            own = _spread(steps[OURS]["ms"]) if OURS in steps else "–"
            theirs = ["–", "–"]
            if best:
                how = best[0].removeprefix("torch ")
                theirs = [f"{_spread(steps[best[0]]['ms'])} {how}", f"{value_text(best[1])} ×"]
            beyond = f"{value_text(steps[OURS]['times_floor'])} ×" if OURS in steps else "–"
            model = [str(result["model"])] if several else []
            rows.append([str(rule["rule"]), *model, own, *theirs, _spread(rule["floor"]), beyond])
    return Table([*headings, say("floor, ms"), say("steprule ÷ floor")], rows)


def _all(result: Result, say: Words) -> Table:
    headings = [say("rule"), say("way"), say("ms"), say("× floor"), say("× steprule"), say("temporary bytes")]
    rows = [
        [
            str(rule["rule"]),
            str(way),
            _spread(step["ms"]),
            value_text(step["times_floor"]),
            value_text(step["times_steprule"]),
            f"{step['transient_bytes']:,}" if "transient_bytes" in step else "–",
        ]
        for rule in result["rules"]
        for way, step in rule["step"].items()
    ]
    return Table(headings, rows)


def _bench_command(file: Path, result: Result) -> str:
    rules = ",".join(str(rule["rule"]).lower() for rule in result["rules"])
    parts = [
        "steprule bench",
        f"--model {result['model']}",
        f"--optimizers {rules}",
        f"--dtype {result['dtype']}",
    ]
    return " ".join([*parts, f"--repeats {result['repeats']}", f"--out {file.name}"])


def _facts(result: Result) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in result.items() if isinstance(value, str | int | float)]
