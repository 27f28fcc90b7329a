"""The text of SVG pictures: elements, their looks, and a picture that stands alone in a file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

__all__ = [
    "COLOURS",
    "DASHES",
    "STYLES",
    "Drawing",
    "beneath",
    "chart_css",
    "element",
    "escaped",
    "heading_of",
    "mark",
    "place_text",
    "series",
    "swatch",
    "text_width",
]

# After Okabe and Ito: distinct with each kind of colour blindness. The second of each pair is for dark pages.
COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#c04f00", "#f0934e"),
    ("#00795c", "#3fc79a"),
    ("#a3417c", "#e39ac4"),
    ("#6b6b00", "#d9d24a"),
    ("#5a4fcf", "#a79ff5"),
    ("#8a5a2b", "#d9a56c"),
    ("#4a5568", "#a0aec0"),
)
STYLES = len(COLOURS)
# Lines and marks differ without colours, too.
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 3", "5 2 1 2 1 2", "4 4", "1 4")
# Around the place that a path moves to before.
MARKS = (
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-3.6-3.6h7.2v7.2h-7.2z",
    "m0-5l4.6 8.4h-9.2z",
    "m0-5l4.6 5-4.6 5-4.6-5z",
    "m0 5l4.6-8.4h-9.2z",
    "m-1.6-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "m0-5l4.7 3.5-1.8 5.5h-5.8l-1.8-5.5z",
    "m-2-4.6h4l2.6 2.6v4l-2.6 2.6h-4l-2.6-2.6v-4z",
)
CROSS = "m-4-4l8 8m0-8l-8 8"

LIGHT = {"ink": "#1a202c", "quiet": "#4a5568", "grid": "#e2e8f0", "paper": "#ffffff"}
# Share of the font's size that a letter takes; generous, since the reader's fonts are not known.
LETTER, CAPITAL, IDEOGRAPH, IDEOGRAPHS_FROM = 0.62, 0.78, 1.05, "\u2e80"
CAPITALS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZmw@%—…")
OF_SERIES = "svg .s "


@dataclass(frozen=True)
class Drawing:
    """A chart: its elements, its size, and a sentence that says what it shows."""

    content: str
    width: float
    height: float
    says: str

    def inline(self, classes: str = "") -> str:
        """The chart as a part of a page, which has the style sheet."""
        return element(
            "svg",
            self.content,
            class_=f"chart {classes}".strip(),
            viewBox=f"0 0 {place_text(self.width)} {place_text(self.height)}",
            role="group",
            aria_label=self.says,
        )

    def alone(self) -> str:
        """The chart as a file of its own, on white."""
        used = [index for index in range(STYLES) if f'class="s s{index} ' in self.content]
        return (
            element(
                "svg",
                [
                    element("title", escape(self.says)),
                    f"<style>\n{_own_css(used)}</style>",
                    element("rect", width=self.width, height=self.height, fill=LIGHT["paper"]),
                    self.content,
                ],
                xmlns="http://www.w3.org/2000/svg",
                viewBox=f"0 0 {place_text(self.width)} {place_text(self.height)}",
                width=self.width,
                height=self.height,
            )
            + "\n"
        )

    def at(self, x: float, y: float) -> str:
        """The chart as a part of a larger one."""
        return element("g", self.content, transform=f"translate({place_text(x)} {place_text(y)})")


@cache
def chart_css() -> str:
    """The style sheet of charts; its colours are variables of the page."""
    return (Path(__file__).parent / "chart.css").read_text(encoding="utf-8")


def _own_css(used: Sequence[int]) -> str:
    """The style sheet with colours in place of variables, which not every program that shows pictures knows."""
    rules: list[str] = []
    for rule in chart_css().splitlines()[1:]:
        if OF_SERIES in rule:
            each = [rule.replace(OF_SERIES, f"svg .s{x} ").replace("var(--c)", COLOURS[x][0]) for x in used]
            rules += each
        else:
            rules.append(rule)
    text = "".join(f"{rule}\n" for rule in rules)
    for name, colour in LIGHT.items():
        text = text.replace(f"var(--{name})", colour)
    return text


def element(name: str, content: str | Sequence[str] = "", /, **attributes: Any) -> str:
    """One element; an attribute that is None is left out, `class_` means class, and _ is written as -.

    content: text of elements, which is not escaped.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-") if key != "viewBox" else key}="{escape(_shown(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = content if isinstance(content, str) else "".join(content)
    return f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>"


def _shown(value: Any) -> str:
    return place_text(value) if isinstance(value, float) else str(value)


def place_text(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def text_width(text: str, size: float = 12) -> float:
    """About how wide a text is, rather too wide than too narrow."""
    return size * sum(
        IDEOGRAPH if letter >= IDEOGRAPHS_FROM else CAPITAL if letter in CAPITALS else LETTER for letter in text
    )


def series(style: int, parts: Sequence[str]) -> str:
    """The elements of one series, in its colour; pages hide them by its number."""
    return element("g", parts, class_=f"s s{style % STYLES} n{style}")


def mark(x: float, y: float, style: int, says: str, kind: str = "") -> str:
    """A point in the shape of its series; `says` is what readers and screen readers are told about it.

    kind: classes of the style sheet: full, cross, faint, bare.
    """
    note = element("title", escape(says)) if says else ""
    if kind == "bare":
        return element("circle", note, class_="p bare", cx=x, cy=y, r=4)
    shape = CROSS if "cross" in kind.split() else MARKS[style % STYLES]
    return element("path", note, class_=f"p {kind}".strip(), d=f"M{place_text(x)} {place_text(y)}{shape}")


def escaped(text: str) -> str:
    """Text as the content of an element."""
    return escape(text, quote=False)


def heading_of(title: str, details: str, width: float) -> tuple[list[str], float]:
    """A title and a line of details, in as many lines as they need; and where they end."""
    parts, top = list[str](), 4.0
    for text, kind, size, line in ((title, "title", 15, 24.0), (details, None, 12, 18.0)):
        letters = max(20, int((width - 20) / text_width("n", size)))
        for part in textwrap.wrap(text, letters, break_on_hyphens=False):
            top += line
            parts.append(element("text", escaped(part), class_=kind, x=4, y=top - 6))
    return parts, top + 6


def beneath(
    entries: Sequence[tuple[str, str]], width: float, top: float, height: float = 24
) -> tuple[list[str], float]:
    """A legend of samples, 30 wide, and their texts, in as many rows as are needed; and where it ends."""
    parts, x, y = list[str](), 4.0, top + height / 2
    for sample, text in entries:
        needed = 38 + text_width(text) + 16
        if x > 4 and x + needed > width:
            x, y = 4.0, y + height
        parts.append(element("g", sample, transform=f"translate({place_text(x)} {place_text(y)})"))
        parts.append(element("text", escaped(text), class_="name", x=x + 38, y=y))
        x += needed
    return parts, y + height / 2


def swatch(style: int, bar: bool = False) -> str:
    """A short line with its mark, or a piece of a bar, as legends show it."""
    if bar:
        inner = series(style, [element("rect", class_="bar", x=9, y=2, width=16, height=12, rx=1.5)])
        return element("svg", inner, class_="swatch", viewBox="0 0 34 16", aria_hidden="true")
    line = element("path", class_="line", d="M1 8h32", stroke_dasharray=DASHES[style % STYLES] or None)
    inner = series(style, [line, mark(17, 8, style, "")])
    return element("svg", inner, class_="swatch", viewBox="0 0 34 16", aria_hidden="true")
