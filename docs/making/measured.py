"""The measurements in benchmarks/results, read for pages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from steprule.lab.racing.folder import RaceFolder
from steprule.lab.reporting.race_figures import race_figures
from steprule.lab.reporting.races import Race, read_race
from steprule.lab.reporting.svg import swatch
from steprule.lab.reporting.words import words_of

__all__ = [
    "RESULTS",
    "SETS",
    "Bench",
    "benches",
    "facts_of",
    "learning_rate_chart",
    "losses_in_fewer_bits",
    "matrix_peers",
    "matrix_times",
    "ms",
    "races",
    "steps_on_gpus",
]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


# The sets of matrices of benchmarks/matrix_rules.py.
SETS = {
    "equal": "48 matrices of 256 × 256",
    "small": "100 matrices of 64 × 64",
    "tall": "16 matrices of 1024 × 64",
    "block": "the four matrices of a block of GPT-2 small",
    "transformer": "the 48 matrices of GPT-2 small",
}


@dataclass(frozen=True)
class Bench:
    """A file of `steprule bench`, and its rules by name."""

    path: Path
    facts: dict[str, Any]
    rules: dict[str, dict[str, Any]]


@cache
def benches() -> list[Bench]:
    """Every file of `steprule bench`; the models in the order of their sizes."""
    found: list[Bench] = []
    for path in sorted(RESULTS.glob("**/*.json")):
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"model", "rules", "commit"} <= content.keys():
            found.append(Bench(path, content, {rule["rule"]: rule for rule in content["rules"]}))
    return sorted(found, key=lambda bench: -bench.facts["numbers"])


@cache
def matrix_times() -> list[tuple[Path, dict[str, Any], dict[tuple[str, str], float]]]:
    """Every file of benchmarks/matrix_rules.py: its facts, and milliseconds by set and by what was measured."""
    found: list[tuple[Path, dict[str, Any], dict[tuple[str, str], float]]] = []
    for path in sorted(RESULTS.glob("**/matrix-rules.json")):
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        times = {(x["set"], x["what"]): x["ms"] for x in content["results"]}
        found.append((path, content["machine"], times))
    return found


@cache
def matrix_peers() -> list[tuple[Path, dict[str, Any]]]:
    """Every file of benchmarks/matrix_peers.py."""
    paths = sorted(RESULTS.glob("**/matrix-peers.json"))
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


@cache
def steps_on_gpus() -> list[tuple[Path, dict[str, Any]]]:
    """Every file of benchmarks/gpu_steps.py."""
    paths = sorted(RESULTS.glob("**/steps.json"))
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


@cache
def iterations_on_hosts() -> list[tuple[Path, dict[str, Any]]]:
    """Every file of benchmarks/host_steps.py."""
    paths = sorted(RESULTS.glob("**/host-steps.json"))
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


@cache
def losses_in_fewer_bits() -> list[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """Every file of benchmarks/storage_accuracy.py: its facts and rows."""
    found: list[tuple[Path, dict[str, Any], list[dict[str, Any]]]] = []
    for path in sorted(RESULTS.glob("**/storage/*.json")):
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        found.append((path, content["facts"], content["rows"]))
    return found


@cache
def races() -> list[tuple[Path, Race]]:
    """Every race."""
    paths = sorted(path.parent for path in RESULTS.glob("**/verdict.json"))
    return [(path, read_race(RaceFolder(path), words_of("en"))) for path in paths]


def learning_rate_chart(race: Race) -> str:
    """Final loss against learning rate, of every trial of a race, as a picture within a page; or nothing."""
    title = race.say("Learning rate")
    found = [x.views[0].drawing.inline() for x in race_figures(race) if x.title == title]
    legend = "".join(f"<span>{swatch(entry.style)}{escape(entry.label)}</span>" for entry in race.tuned)
    return f'<div class="legend">{legend}</div>{found[0]}' if found else ""


def facts_of(facts: dict[str, Any]) -> str:
    """Where and when something was measured."""
    on_cpu = facts.get("device", "cpu") == "cpu"
    parts = [
        *([facts["processor"], f"{facts['cores']} cores", f"{facts['threads']} threads"] if on_cpu else []),
        *([] if on_cpu else [facts["device"]]),
        f"torch {facts['torch']}",
        f"commit {facts['commit'][:12]}",
        facts.get("date", "")[:10],
    ]
    return ", ".join(filter(None, parts))


def ms(value: float | None) -> str:
    """Milliseconds with three digits; a dash if there is no measurement."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"
