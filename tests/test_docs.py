"""The documentation in docs/ is right: every block of code runs, from the top of its page to the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab import run
from pages import ROOT, blocks_of, carry_out, commands_in, run_script, save

from steprule.lab import bench, bench_machine, bench_measure, bench_models, train
from steprule.lab.data import Batches, Data, as_batches

# Written at each build, from what other tests test.
GENERATED = ("_build", "api", "formats", "modifiers", "node_modules", "numbers.md", "rules")
PAGES = [
    page
    for page in sorted((ROOT / "docs").glob("**/*.md"))
    if page.relative_to(ROOT / "docs").parts[0] not in GENERATED
]
each_page = pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
# What a reader cannot run just like that is an exception.
MOST_NOT_RUN = 10
# These install or fetch something, or set up the shell.
NOT_OURS = {"pip", "python3", "source", "git", "cd", "npm", "apt-get", "pytest", "sphinx-build"}
QUICK_ITEMS = 40
QUICK_RULES = 2
QUICK_SHAPES = [(8, 8), (8,)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands train on the first items of the data and measure a tiny model."""

    def few(name: str, data: Data) -> Batches:
        batches = as_batches(name, data)
        return replace(batches, length=min(len(batches), QUICK_ITEMS))

    def tiny() -> list[tuple[int, ...]]:
        return list(QUICK_SHAPES)

    monkeypatch.setattr(train, "as_batches", few)
    for name in bench_models.MODELS:
        monkeypatch.setitem(bench_models.MODELS, name, tiny)
    rules_of = bench._rules
    monkeypatch.setattr(bench, "_rules", lambda names: rules_of(names)[:QUICK_RULES])
    monkeypatch.setattr(bench_measure, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(bench_measure, "ELSEWHERE_BYTES", 8)
    monkeypatch.setattr(bench_measure, "mlp", lambda: [(8, 8)] * 2)
    times = {"import_torch": 1000.0, "import_steprule": 50.0, "first_step": 100.0}
    monkeypatch.setattr(bench_machine, "fresh_process", lambda *_: times)


SHORT = {
    "train": ["--epochs", "1"],
    "race": ["--epochs", "1", "--workers", "1", "--trials", "8", "--seeds", "3"],
    "tune": ["--epochs", "1", "--workers", "1", "--trials", "8", "--seeds", "3"],
    "bench": ["--repeats", "2"],
}


def carry_out_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command of a page, made short; commands that only set something up are left out."""
    program, *rest = words
    if program == "python" and rest[0].endswith(".py"):
        if Path(rest[0]).is_file():
            run_script(Path(rest[0]))
        else:
            assert (ROOT / rest[0]).is_file(), words
    elif program == "steprule":
        short = [] if "--resume" in rest else SHORT.get(rest[0], [])
        answer = run(capsys, *rest, *short)
        assert answer.code == 0, (words, answer)
    else:
        assert program in NOT_OURS, words


def carry_out_page(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.not_run:
            continue
        if block.language == "python":
            carry_out(page, folder, [block], names)
        elif block.language in ("bash", "sh", "console"):
            for words in commands_in(block):
                carry_out_command(words, capsys)
        else:
            save(block, folder)
    return names


@pytest.mark.usefixtures("quick")
@each_page
def test_every_block_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    carry_out_page(page, tmp_path, capsys)


def test_few_blocks_are_not_run() -> None:
    left_out = [block for page in PAGES for block in blocks_of(str(page.relative_to(ROOT))) if block.not_run]
    assert len(left_out) <= MOST_NOT_RUN, [block.not_run for block in left_out]
