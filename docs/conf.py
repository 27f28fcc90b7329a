"""How the documentation is built: sphinx-build -W -n --keep-going docs docs/_build/html."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import steprule  # noqa: E402

project = "steprule"
author = "The steprule authors"
release = version = steprule.__version__
extensions = ["myst_parser"]
exclude_patterns = ["_build", "node_modules", "making"]
root_doc = "index"
language = "en"

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

html_theme = "furo"
html_title = "steprule"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
