"""The README and its like are right: their Python runs, their commands parse, their links have targets."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import run
from pages import ROOT, Block, blocks_of, carry_out, commands_of

import steprule

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("benchmarks/**/*.md"))]
each_page = pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])


def block_with(words: str) -> Block:
    """The README's block with these words."""
    (found,) = (block for block in blocks_of("README.md", "python") if words in block.text)
    return found


@each_page
def test_every_python_block_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    carry_out(page, tmp_path, blocks_of(page, "python"))


def test_swapped_import_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = carry_out("README.md", tmp_path, [block_with("from steprule import AdamW  #")])
    assert type(names["optimizer"]) is steprule.AdamW
    assert names["loss"].item() < 0.1
    assert "AdamW" in capsys.readouterr().out


def test_own_rule_steps_as_its_formula_says(tmp_path: Path) -> None:
    names = carry_out("README.md", tmp_path, [block_with("class Signum(Elementwise)")])
    assert isinstance(names["optimizer"], torch.optim.Optimizer)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = names["Signum"]([weight], lr=0.5)
    expected, m = weight.detach().clone(), torch.zeros(3)
    for gradient in (torch.tensor([1.0, -3.0, 0.0]), torch.tensor([-9.0, 1.0, 2.0])):
        weight.grad = gradient
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        expected -= 0.5 * m.sign()
    assert torch.equal(weight.detach(), expected)


def test_every_rule_is_named() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Rules\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    named = re.findall(r"^\| .+ \| ([\w, ]+) \|$", section, re.MULTILINE)
    assert {name for row in named for name in row.split(", ")} == set(steprule.catalogue())


def test_every_modifier_is_named() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Modifiers\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    rows = dict(re.findall(r"^\| `(\w+)\(.*\)` \| (.+) \|$", section, re.MULTILINE))
    assert set(rows) == {x.__name__ for x in steprule.modifier_catalogue().values()}


# Commands


def test_the_readme_shows_the_commands() -> None:
    shown = {words[0] for words in commands_of("README.md", "steprule")}
    assert {"train", "list", "show", "bench"} <= shown


@each_page
def test_every_command_is_understood(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands that only print are run, and so is training on a file that the page saves; others are parsed."""
    import typer

    from steprule.lab.commands import app
    from steprule.lab.optimizer_classes import optimizer_name

    monkeypatch.chdir(tmp_path)
    carry_out(page, tmp_path, blocks_of(page, "python"))
    program: Any = typer.main.get_command(app)
    for words in commands_of(page, "steprule"):
        command: Any = program.get_command(None, words[0])
        assert command is not None, words
        context = command.make_context(words[0], words[1:])
        if (rule := context.params.get("optimizer")) is not None:
            optimizer_name(rule)
        saved = any((tmp_path / word.partition(":")[0]).is_file() for word in words)
        if words[0] in ("list", "show") or saved:
            short = ["--epochs", "1"] if words[0] == "train" else []
            answer = run(capsys, *words, *short)
            assert answer.code == 0, (words, answer)


@each_page
def test_what_is_installed_and_run_exists(page: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for words in commands_of(page, "pip"):
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), words
    for program in ("pytest", "python", "pip"):
        for words in commands_of(page, program):
            for word in words:
                if re.fullmatch(r"[\w./-]+\.(py|txt|toml)", word):
                    assert (ROOT / word).is_file(), words


@each_page
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"", text):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith(("http:", "https:", "mailto:")):
            assert not path or ((ROOT / page).parent / path).exists(), path
            assert path or anchor in headings, anchor
