"""The README's table of step times, from stored measurements."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

TABLE = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/readme_table.py"))


def result_of(model: str, numbers: int, **changes: Any) -> dict[str, Any]:
    def step(ms: float, times: float) -> dict[str, Any]:
        return {"ms": {"low": ms, "median": ms, "high": ms}, "times_steprule": times}

    steps = {"steprule": step(38.14, 1), "torch for-loop": step(116, 3), "torch fused": step(57, 1.5)}
    adamw = {"rule": "AdamW", "floor": {"median": 35.0}, "step": steps}
    lion = {"rule": "Lion", "floor": {"median": 0.25}, "step": {"steprule": step(123.4, 1)}}
    facts = {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": "m",
        "processor": "P",
        "cores": 2,
        "threads": 2,
        "device": "cpu",
        "dtype": "fp32",
        "repeats": 15,
        "torch": "2.13.0",
        "steprule": "0.1.0",
        "commit": "c" * 40,
    }
    return {**facts, "model": model, "numbers": numbers, "rules": [adamw, lion], **changes}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "PAGE.md"
    file.write_text(f"before\n\n{TABLE['BEGIN']}\n\nold\n\n{TABLE['END']}\n\nafter\n")
    return file


def write_table(page: Path, *results: dict[str, Any]) -> str:
    files = [page.parent / f"{number}.json" for number in range(len(results))]
    for file, result in zip(files, results, strict=True):
        file.write_text(json.dumps(result))
    TABLE["main"]([*map(str, files), "--page", str(page)])
    return page.read_text()


def test_the_table_is_written_between_the_markers(page: Path) -> None:
    results = result_of("small", 10), result_of("large", 1000)
    text = write_table(page, *results)
    assert text.startswith(f"before\n\n{TABLE['BEGIN']}\n\n| ms per step, large | steprule | torch |")
    assert "| AdamW | 38.1 | 57.0 fused | 1.50 × | 35.0 | – | – |\n" in text
    assert "| Lion | 123 | – | – | 0.250 | – | – |\n" in text
    assert "| ms per step | small: steprule | small: torch | small: faster by |\n" in text
    assert "| AdamW | 38.1 | 57.0 fused | 1.50 × |\n" in text
    assert "speed-ups: 1.50 ×. P, 2 cores, 2 threads, torch 2.13.0, commit cccccccccccc, " in text
    assert "old" not in text
    assert text.endswith(f"{TABLE['END']}\n\nafter\n")
    assert write_table(page, *results) == text


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"commit": "d"}, "differ in commit"), ({"dtype": "bf16"}, "differ in dtype: bf16, fp32")],
)
def test_files_of_different_measurements_make_no_table(page: Path, changes: dict[str, Any], told: str) -> None:
    before = page.read_text()
    with pytest.raises(SystemExit, match=told):
        write_table(page, result_of("a", 1), result_of("b", 2, **changes))
    assert page.read_text() == before


def test_a_page_without_markers_is_left_alone(page: Path) -> None:
    page.write_text("no markers\n")
    with pytest.raises(SystemExit, match="needs one line"):
        write_table(page, result_of("a", 1))
    assert page.read_text() == "no markers\n"
