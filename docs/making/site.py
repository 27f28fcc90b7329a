"""A Sphinx extension: writes the generated pages before the build reads them, and folds long listings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from making.api_pages import api_pages
from making.format_pages import format_pages
from making.numbers_page import numbers_page
from making.rule_pages import modifier_pages, rule_pages
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parents[1]


class folded(nodes.Element):
    """A part of a page that opens when its title is chosen."""


class folded_title(nodes.TextElement):
    """That title."""


class Folded(SphinxDirective):
    """The directive for it."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The title and what is inside."""
        title = folded_title(self.arguments[0], self.arguments[0])
        self.set_source_info(title)
        box = folded("", title)
        self.state.nested_parse(self.content, self.content_offset, box)
        return [box]


def write_pages() -> None:
    """Write every generated page that has changed, and remove those that are no longer made."""
    folders = {
        "api": api_pages(),
        "formats": format_pages(),
        "modifiers": modifier_pages(),
        "rules": rule_pages(),
    }
    _write(DOCS / "numbers.md", numbers_page())
    for name, pages in folders.items():
        folder = DOCS / name
        folder.mkdir(exist_ok=True)
        for page, text in pages.items():
            _write(folder / f"{page}.md", text)
        for file in folder.glob("*.md"):
            if file.stem not in pages:
                file.unlink()


def _write(file: Path, text: str) -> None:
    # Sphinx reads again only what is newer.
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _link_languages(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """The same page in the other language: the Chinese pages lie in zh/ within the English ones."""
    up = "../" * page.count("/")
    if app.config.language == "zh_CN":
        context["other_language"] = {"code": "en", "name": "English", "link": f"{up}../{page}.html"}
    else:
        context["other_language"] = {"code": "zh", "name": "中文", "link": f"{up}zh/{page}.html"}


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    write_pages()
    app.add_node(
        folded,
        html=(
            lambda writer, _: writer.body.append("<details>"),
            lambda writer, _: writer.body.append("</details>"),
        ),
    )
    app.add_node(
        folded_title,
        html=(
            lambda writer, _: writer.body.append("<summary>"),
            lambda writer, _: writer.body.append("</summary>"),
        ),
    )
    app.add_directive("folded", Folded)
    app.connect("html-page-context", _link_languages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
