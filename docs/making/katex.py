"""A Sphinx extension: formulas are drawn by KaTeX while the pages are built, so that they need no script.

Its output holds MathML, which screen readers take.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from docutils import nodes
from making.formulas import latex, lines_of
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

_LOG = logging.getLogger(__name__)
_DOCS = Path(__file__).parents[1]
_KATEX = _DOCS / "node_modules" / "katex" / "dist"


class _Katex:
    """KaTeX in a process of its own, which answers line by line."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def html(self, tex: str, display: bool, where: nodes.Element) -> str:
        """The formula as HTML; one that KaTeX refuses is a warning, and stays as it is."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"tex": tex, "display": display}) + "\n")
        process.stdin.flush()
        answer: dict[str, str] = json.loads(process.stdout.readline())
        if "error" in answer:
            _LOG.warning("KaTeX: %s: %s", answer["error"], tex, location=where)
        return answer.get("html", tex)

    def _started(self) -> subprocess.Popen[str]:
        script = str(Path(__file__).with_name("katex.mjs"))
        return subprocess.Popen(
            ["node", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


class Formula(SphinxDirective):
    """A formula in Unicode, as docstrings have it: drawn, and beneath it the text that it came from."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """One box with a row for each line, in which every statement can move to a row of its own."""
        text = "\n".join(self.content)
        box = nodes.container(classes=["formula"])
        for indent, statements in lines_of(text):
            row = nodes.container(classes=["formula-line", *["formula-inner"] * (indent > 0)])
            for statement in statements:
                tex = latex(statement)
                part = nodes.math(tex, tex, classes=["formula-part"], nowrap=True)
                self.set_source_info(part)
                paragraph = nodes.container("", part, classes=["formula-cell"])
                row += paragraph
            box += row
        return [box, nodes.literal_block(text, text, language="none", classes=["formula-text"])]


def _visit_math(writer: Any, node: nodes.Element) -> None:
    katex: _Katex = writer.builder.app.katex
    # Statements of a formula are as tall as displayed ones.
    display = "formula-part" in node["classes"]
    writer.body.append(katex.html(node.astext(), display, node))
    raise nodes.SkipNode


def _visit_displayed(writer: Any, node: nodes.Element) -> None:
    katex: _Katex = writer.builder.app.katex
    writer.body.append(f'<div class="math-block">{katex.html(node.astext(), True, node)}</div>')
    raise nodes.SkipNode


def _check(app: Sphinx) -> None:
    if not _KATEX.is_dir() or shutil.which("node") is None:
        raise ExtensionError("KaTeX is missing, which draws the formulas. Run: npm install --prefix docs")


def _finish(app: Sphinx, error: Exception | None) -> None:
    app.katex.close()  # type: ignore[attr-defined]
    if error is None and app.builder.format == "html":
        static = Path(app.outdir) / "_static" / "katex"
        (static / "fonts").mkdir(parents=True, exist_ok=True)
        shutil.copy(_KATEX / "katex.min.css", static)
        for font in (_KATEX / "fonts").glob("*.woff2"):
            shutil.copy(font, static / "fonts")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.katex = _Katex()  # type: ignore[attr-defined]
    app.add_html_math_renderer("katex", (_visit_math, None), (_visit_displayed, None))
    app.add_directive("formula", Formula)
    app.connect("builder-inited", _check)
    app.connect("build-finished", _finish)
    app.add_css_file("katex/katex.min.css")
    return {"parallel_read_safe": True, "parallel_write_safe": False}
