"""How the documentation is built: sphinx-build -W -n --keep-going docs docs/_build/html."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import steprule
from steprule.lab.reporting.svg import COLOURS, chart_css

project = "steprule"
author = "the steprule authors"
project_copyright = author
release = version = steprule.__version__
extensions = ["myst_parser", "making.katex", "making.search", "making.site"]
exclude_patterns = ["_build", "node_modules", "making"]
root_doc = "index"
language = "en"
locale_dirs = ["locale"]
# Translators need the sentences. The lines where these stand change all the time.
gettext_location = False

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

html_math_renderer = "katex"
html_theme = "furo"
html_title = "steprule"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/language.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_css_files = ["site.css", "charts.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
highlight_language = "python"
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"


def _charts(colours: int) -> str:
    """The colours of charts, for light (0) or dark pages (1), as variables."""
    return "".join(f"svg .s{number}{{--c:{pair[colours]}}}" for number, pair in enumerate(COLOURS))


def _nested(selector: str, rules: str) -> str:
    return rules.replace("svg .s", f"{selector} svg .s")


(Path(__file__).parent / "_static" / "charts.css").write_text(
    "body{--ink:var(--color-foreground-primary);--quiet:var(--color-foreground-secondary);"
    "--grid:var(--color-background-border);--paper:var(--color-background-primary)}\n"
    f"{chart_css()}{_charts(0)}\n"
    f"@media (prefers-color-scheme:dark){{{_nested('body:not([data-theme=light])', _charts(1))}}}\n"
    f"{_nested('body[data-theme=dark]', _charts(1))}\n",
    encoding="utf-8",
)
