"""The README's Python, run as it stands there."""

import re
import runpy
from pathlib import Path

import torch

import steprule

PAGE = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def run(heading: str, folder: Path) -> dict:
    """The names that the first Python block under a heading leaves behind."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    script = folder / "script.py"
    script.write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], encoding="utf-8")
    return runpy.run_path(str(script))


def test_swapped_import_trains(tmp_path, capsys):
    names = run("Swap one import", tmp_path)
    assert type(names["optimizer"]) is steprule.AdamW
    assert names["loss"].item() < 0.1
    assert "AdamW" in capsys.readouterr().out


def test_own_rule_steps_as_its_formula_says(tmp_path):
    names = run("Write your own rule", tmp_path)
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


def test_named_rules_exist():
    section = PAGE.split("\n## Rules\n")[1].split("\n## ")[0]
    named = re.findall(r"^\| .+ \| ([\w, ]+) \|$", section, re.MULTILINE)
    assert {name for row in named for name in row.split(", ")} <= set(steprule.catalogue())
    assert len(named) == 2
