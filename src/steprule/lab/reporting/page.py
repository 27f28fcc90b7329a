"""The page: one HTML file that needs nothing else, readable without JavaScript."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path

from steprule.lab.reporting.svg import COLOURS, STYLES, Drawing, chart_css, element, swatch
from steprule.lab.reporting.words import Words

__all__ = ["MADE_BY", "Figure", "Page", "Table", "View", "page_text"]

MADE_BY = "steprule report"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first column names the row.

    styles: for each row the number of its series, where it has one.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    styles: Sequence[int | None] = ()


@dataclass(frozen=True)
class View:
    """One form of a chart; the controls of a page choose between those of one figure.

    over: "steps", "seconds" or "" if there is no choice. scale: "log", "linear" or "".
    """

    drawing: Drawing
    over: str = ""
    scale: str = ""

    @property
    def classes(self) -> str:
        """The classes by which the style sheet shows or hides it."""
        return " ".join(f"v-{x}" for x in (self.over, self.scale) if x)


@dataclass(frozen=True)
class Figure:
    """A chart with its title, a note on how to read it, and its numbers. wide: over the whole page."""

    title: str
    note: str
    views: Sequence[View]
    table: Table | None = None
    wide: bool = False


@dataclass
class Page:
    """What a page says, in the order in which it says it.

    verdict: sentences; the first one is the answer. notes: sentences beneath the main table. legend: name and
    style of what the charts show. bars: whether charts have bars instead of lines. commands: what was run, to
    be copied. facts: names and values. texts: title and content of files that are shown as they are; pictures:
    title and content as a data: address.
    """

    title: str
    subtitle: str
    verdict: Sequence[str]
    main: Table | None = None
    notes: Sequence[str] = ()
    legend: Sequence[tuple[str, int]] = ()
    bars: bool = False
    figures: Sequence[Figure] = ()
    tables: Sequence[tuple[str, Table]] = ()
    commands: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    texts: Sequence[tuple[str, str]] = ()
    pictures: Sequence[tuple[str, str]] = field(default=())


def page_text(page: Page, say: Words) -> str:
    """The whole HTML file."""
    body = [
        element("header", [element("h1", escape(page.title)), _paragraph(page.subtitle, "quiet")]),
        _verdict(page, say),
        _controls(page, say),
        element("div", [_figure(figure, say) for figure in page.figures], class_="figures"),
        *(_shown_file(title, content) for title, content in page.texts),
        *(_picture(title, address) for title, address in page.pictures),
        *(_details(title, table, say) for title, table in page.tables),
        _end(page, say),
    ]
    return _document(page.title, [part for part in body if part], len(page.legend), page, say)


def _document(title: str, body: Sequence[str], series: int, page: Page, say: Words) -> str:
    hidden = "".join(
        f"body:has(#n{n}:not(:checked)) .chart .n{n}{{display:none}}\n"
        for n in sorted({style for _, style in page.legend})
    )
    rule = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    head = (
        f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta name="generator" content="{MADE_BY}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{rule}">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>\n{_style()}{hidden}</style>\n"
    )
    words = {"save": say("Save as CSV"), "copy": say("Copy"), "copied": say("Copied")}
    said = "".join(f' data-{name}="{escape(text)}"' for name, text in words.items())
    main = element("main", "\n".join(body))
    return (
        f'<!doctype html>\n<html lang="{say.language}">\n<head>\n{head}</head>\n<body{said}>\n{main}\n'
        f"<script>\n{_read('page.js')}</script>\n</body>\n</html>\n"
    )


@cache
def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    light = "".join(f"--c{index}:{colours[0]};" for index, colours in enumerate(COLOURS))
    dark = "".join(f"--c{index}:{colours[1]};" for index, colours in enumerate(COLOURS))
    series = "".join(f".s{index}{{--c:var(--c{index})}}\n" for index in range(STYLES))
    page = _read("page.css").replace("/*light*/", light).replace("/*dark*/", dark)
    return page + chart_css() + series


def _paragraph(text: str, kind: str | None = None) -> str:
    return element("p", escape(text), class_=kind) if text else ""


def _verdict(page: Page, say: Words) -> str:
    first, *rest = page.verdict or [""]
    parts = [_paragraph(first, "answer"), *(_paragraph(text) for text in rest)]
    box = element("div", parts, class_="verdict") if first else ""
    table = _table(page.main, "cards") if page.main else ""
    return element(
        "section", [box, table, *(_paragraph(note, "quiet") for note in page.notes)], aria_label=say("Verdict")
    )


def _controls(page: Page, say: Words) -> str:
    """Checkboxes that the style sheet reads: they work without JavaScript."""
    views = [view for figure in page.figures for view in figure.views]
    names = [
        _checkbox(f"n{style}", f"{swatch(style, page.bars)}{escape(name)}", checked=True)
        for name, style in page.legend
        if len(page.legend) > 1
    ]
    choices: list[str] = []
    if any(view.over == "seconds" for view in views):
        choices.append(_checkbox("seconds", escape(say("seconds instead of steps"))))
    if any(view.scale == "linear" for view in views):
        choices.append(_checkbox("linear", escape(say("linear instead of logarithmic"))))
    if any('class="seed"' in view.drawing.content for view in views):
        choices.append(_checkbox("seeds", escape(say("every seed"))))
    parts = [
        element("fieldset", [element("legend", escape(legend)), *boxes])
        for legend, boxes in ((say("Shown"), names), (say("Charts"), choices))
        if boxes
    ]
    if not parts:
        return ""
    return element("form", parts, class_="controls", autocomplete="off", aria_label=say("What the charts show"))


def _checkbox(name: str, content: str, checked: bool = False) -> str:
    box = f'<input type="checkbox" id="{name}"{" checked" if checked else ""}>'
    return element("label", f"{box}{content}")


def _figure(figure: Figure, say: Words) -> str:
    note = element("small", escape(figure.note)) if figure.note else ""
    caption = element("figcaption", [element("h2", escape(_capital(figure.title))), note])
    charts = element("div", [view.drawing.inline(view.classes) for view in figure.views], class_="charts")
    numbers = _details(say("Numbers"), figure.table, say, figure.title) if figure.table else ""
    return element("figure", [caption, charts, numbers], class_="wide-figure" if figure.wide else None)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _details(title: str, table: Table, say: Words, name: str = "") -> str:
    rows = len(table.rows)
    count = say("{title} ({rows} rows)" if rows != 1 else "{title} (1 row)", title=title, rows=rows)
    inside = [element("summary", escape(count)), _table(table)]
    return element("details", inside, data_name=name or title)


def _table(table: Table, kind: str | None = None) -> str:
    head = [element("th", escape(text), scope="col") for text in table.headings]
    rows: list[str] = []
    styles = [*table.styles, *[None] * len(table.rows)]
    for cells, style in zip(table.rows, styles, strict=False):
        first, *others = cells
        key = "" if style is None else swatch(style)
        texts = [element("th", key + escape(first), scope="row")]
        texts += [
            element("td", escape(text), data_label=heading)
            for heading, text in zip(table.headings[1:], others, strict=True)
        ]
        rows.append(element("tr", texts))
    whole = [element("thead", element("tr", head)), element("tbody", rows)]
    return element("div", element("table", whole, class_=kind), class_="scroll", tabindex="0")


def _shown_file(title: str, content: str) -> str:
    return element("section", [element("h2", escape(title)), element("pre", escape(content), tabindex="0")])


def _picture(title: str, address: str) -> str:
    image = f'<img alt="{escape(title)}" src="{escape(address)}">'
    return element("section", [element("h2", escape(title)), image])


def _end(page: Page, say: Words) -> str:
    parts: list[str] = []
    if page.commands:
        parts.append(element("h2", escape(say("How to repeat it"))))
        parts += [element("pre", escape(command), class_="command", tabindex="0") for command in page.commands]
    if page.facts:
        pairs = [element("dt", escape(name)) + element("dd", escape(value)) for name, value in page.facts]
        parts += [element("h2", escape(say("Where it was measured"))), element("dl", pairs)]
    return element("footer", parts) if parts else ""
