"""What the generators of the documentation make: formulas, sources, texts of docstrings."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from pages import ROOT

import steprule

sys.path.insert(0, str(ROOT / "docs"))

from making import rule_pages
from making.api_pages import api_pages
from making.format_pages import format_pages
from making.formulas import latex, lines_of
from making.markdown import prose
from making.numbers_page import numbers_page
from making.translatable import has_words

KINDS: dict[str, Any] = {**steprule.catalogue(), **steprule.modifier_catalogue()}


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("g²", "g^{2}"),
        ("β2ₜ", r"\beta _{2t}"),
        ("(g - m)²", "(g-m)^{2}"),
        ("√(s + ε)", r"\sqrt{s+\varepsilon }"),
        ("√max(V̂, ε₁²)", r"\sqrt{\max (\hat{V},\varepsilon _{1}^{2})}"),
        ("β̂1·m", r"\hat{\beta}_{1}\cdot m"),
        ("Gᵀ·G", r"G^{\top }\cdot G"),
        ("max(1, √rows)", r"\max (1,\sqrt{\text{rows}})"),
        ("‖u‖₁", r"\| u\| _{1}"),
        ("(a vector keeps V)", r"(\text{a vector keeps }V)"),
        ("a starts as θ", r"a\text{ starts as }\theta"),
        ("every k steps: θ ← a", r"\text{every }k\text{ steps: }\theta \leftarrow a"),
        ("d_coef·r", r"\texttt{d\_coef}\cdot r"),
        ("r_ε", r"r_{\varepsilon}"),
    ],
)
def test_formulas_become_latex(written: str, wanted: str) -> None:
    assert latex(written) == wanted


@pytest.mark.parametrize("name", KINDS)
def test_every_sign_of_a_formula_is_known(name: str) -> None:
    for _, statements in lines_of(steprule.describe(KINDS[name]).formula):
        for statement in statements:
            assert latex(statement).isascii(), statement


def test_statements_of_a_line_are_apart() -> None:
    assert list(lines_of("a ← b    c ← d\n\n    e")) == [(0, ["a ← b", "c ← d"]), (4, ["e"])]


def test_prose_means_what_it_says() -> None:
    assert prose("a*b, `x_*` and <y> [z]") == r"a\*b, `x_*` and \<y\> \[z\]"
    assert prose("see https://arxiv.org/abs/1.2, or") == "see <https://arxiv.org/abs/1.2>, or"
    assert prose("on its *right*") == "on its *right*"


def test_every_rule_modifier_and_preset_has_a_page() -> None:
    pages = rule_pages.rule_pages()
    assert {*map(str.lower, steprule.catalogue()), "ranger", "index"} == set(pages)
    for name in steprule.catalogue():
        for part in ("## Formula", "## State", "## The rule", "## Source", "**When:**"):
            assert part in pages[name.lower()], (name, part)
    pages = rule_pages.modifier_pages()
    assert {*steprule.modifier_catalogue(), "index"} == set(pages)


def test_a_page_shows_the_rule_and_what_it_uses_of_its_file_and_of_others() -> None:
    page = rule_pages.rule_pages()["adabelief"]
    (source,) = re.findall(r"```python\n(class AdaBelief.*?)```", page, re.DOTALL)
    rule, spread = source.split("def spread(")
    assert '"""' not in rule
    assert '"""s + ε, where s may be' in spread
    (helper,) = re.findall(r"`src/steprule/elementwise/radam.py`\n\n```python\n(.*?)```", page, re.DOTALL)
    assert helper.startswith("def rectification(")
    assert '"""' in helper
    assert "what-it-holds.md#adabeliefs-first-five-steps" in page
    assert "r15 = add(r0, r14)" in page
    assert "tl.sqrt_rn" in page


def test_formats_and_numbers_and_the_reference_are_there() -> None:
    assert "AdamW](../rules/adamw.md) | 2.02 |" in format_pages()["int8"]
    assert "Rprop" in format_pages()["int8"].partition("## Refused")[2]
    assert "### resnet18" in numbers_page()
    pages = api_pages()
    assert "- `closure`:" in pages["optimizers"]
    assert "create(name, params, **options)" in pages["making"]


def test_only_words_are_translated() -> None:
    assert has_words("at least 0")
    assert has_words("**When:** memory is short.")
    assert not any(map(has_words, ("`lr`", "AdamAtan2", "0.1 – 1", "[Muon](muon.md)", "fp32")))
