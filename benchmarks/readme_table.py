"""Writes the README's table of step times from stored measurements of one machine and commit.

python benchmarks/readme_table.py benchmarks/results/MACHINE/*.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- step times: written by benchmarks/readme_table.py -->", "<!-- end of step times -->"
README = Path(__file__).parents[1] / "README.md"
SAME = ("machine", "processor", "threads", "device", "dtype", "repeats", "torch", "steprule", "commit")


def main(arguments: list[str] | None = None) -> None:
    """Replace the text between the two markers."""
    parser = argparse.ArgumentParser(description="Write the table of step times into a page.")
    parser.add_argument(
        "files", nargs="+", type=Path, help="what `steprule bench --out` wrote, one file per model"
    )
    parser.add_argument(
        "--page", type=Path, default=README, help="the page that has both markers (default: README.md)"
    )
    asked = parser.parse_args(arguments)
    try:
        results = [json.loads(file.read_text(encoding="utf-8")) for file in asked.files]
        page = asked.page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"readme_table: {error}")
    for key in SAME:
        if len(found := {str(result[key]) for result in results}) > 1:
            sys.exit(f"readme_table: the files differ in {key}: {', '.join(sorted(found))}.")
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        sys.exit(f"readme_table: {asked.page} needs one line '{BEGIN}' and after it one line '{END}'.")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    text = "\n\n".join((BEGIN, table(results), caption(results), END))
    asked.page.write_text(before + text + after, encoding="utf-8")


def table(results: list[dict[str, Any]]) -> str:
    """One line per rule: the largest model with its floor and smaller states, then the other models."""
    first, *others = sorted(results, key=lambda result: -result["numbers"])
    states = ["steprule bf16 state", "steprule int8 state"]
    heading = (
        f"| ms per step, {first['model']} | steprule | torch | faster by | floor | bf16 state | int8 state |"
    )
    lines = [heading, "|---|" + "---:|" * 6]
    for rule in first["rules"]:
        smaller = [ms_of(rule, name) for name in states]
        lines.append(row(rule["rule"], *compared(rule), number(rule["floor"]["median"]), *smaller))
    if others:
        headings = [f"{x['model']}: {column}" for x in others for column in ("steprule", "torch", "faster by")]
        lines += ["", row("ms per step", *headings), "|---|" + "---:|" * len(headings)]
    measured = [{rule["rule"]: rule for rule in result["rules"]} for result in others]
    for name in dict.fromkeys(name for rules in measured for name in rules):
        cells = [cell for rules in measured for cell in (compared(rules[name]) if name in rules else ["–"] * 3)]
        lines.append(row(name, *cells))
    return "\n".join(lines)


def row(*cells: str) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def compared(rule: dict[str, Any]) -> list[str]:
    """steprule's default step, the fastest of torch's, and how many times longer that takes."""
    theirs = torch_of(rule)
    best = min(theirs, key=lambda name: theirs[name]["times_steprule"], default=None)
    if best is None:
        return [ms_of(rule, "steprule"), "–", "–"]
    how = best.removeprefix("torch ")
    times = number(theirs[best]["times_steprule"])
    return [ms_of(rule, "steprule"), f"{ms_of(rule, best)} {how}", f"{times} ×"]


def ms_of(rule: dict[str, Any], name: str) -> str:
    """The median time of one way to step, if it was measured."""
    step = rule["step"].get(name)
    return number(step["ms"]["median"]) if step else "–"


def torch_of(rule: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The steps of a rule that are torch's."""
    return {name: step for name, step in rule["step"].items() if name.startswith("torch ")}


def caption(results: list[dict[str, Any]]) -> str:
    """What the numbers are, and where they were measured."""
    rules = [rule for result in results for rule in result["rules"]]
    faster = [min(step["times_steprule"] for step in torch_of(x).values()) for x in rules if torch_of(x)]
    first = results[0]
    where = f"{first['processor']}, {first['cores']} cores"
    if first["device"] != "cpu":
        where = f"{first['device']}, {where}"
    sentences = [
        f"Medians of {first['repeats']} samples, measured in turns, with parameters in {first['dtype']}.",
        "torch: the fastest of its for-loop, foreach and fused.",
        "faster by: the median of the ratios within each turn, not the ratio of the two medians.",
        "floor: an estimate, from the bytes of an fp32 step and the bandwidth measured alongside, which varies "
        "from moment to moment; a step below its floor means no more than that.",
    ]
    if faster:
        mean = number(statistics.geometric_mean(faster))
        sentences.append(f"Geometric mean of all speed-ups: {mean} ×.")
    sentences.append(
        f"{where}, {first['threads']} threads, torch {first['torch']}, commit {str(first['commit'])[:12]}, "
        f"{first['date'][:10]}."
    )
    return " ".join(sentences)


def number(value: float) -> str:
    """Three digits, as many as a measurement is worth."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


if __name__ == "__main__":
    main()
