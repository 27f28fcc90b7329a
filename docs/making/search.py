"""A Sphinx extension: searching Chinese pages, with no dictionary of words."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

_RUN = re.compile(r"[\u3400-\u9fff]+")


class SearchChinese(SearchEnglish):
    """English words as they are, and of Chinese whole runs of letters and every two neighbours.

    The page's own script looks for a word of more than two letters within the runs, and for two letters as they
    are. The name stays English, since the script takes the stemmer's name from it.
    """

    lang = "zh"

    def split(self, input: str) -> list[str]:
        """The words of a text."""
        runs = _RUN.findall(input)
        pairs = [first + second for run in runs for first, second in pairwise(run)]
        return [*super().split(_RUN.sub(" ", input)), *runs, *pairs]

    def word_filter(self, word: str) -> bool:
        """Whether a word is kept; a single Chinese letter is too common to look for."""
        return len(word) > 1 if _RUN.match(word) else super().word_filter(word)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_search_language(SearchChinese)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
