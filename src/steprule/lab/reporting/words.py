"""The words of a page, in English or in another language."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from steprule.lab.errors import LabError

__all__ = ["LANGUAGES", "Words", "words_of"]

LANGUAGES = ("en", "zh")


class Words:
    """Gives sentences in a language. Call it with the English one, and with the values of its {fields}.

    language: "en", or a language that has a file of translations here.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        self.untranslated: set[str] = set()
        self._known = {} if language == "en" else _translations(language)

    def __call__(self, english: str, /, **values: Any) -> str:
        """The sentence, with the values in it."""
        text = self._known.get(english)
        if text is None:
            text = english
            if self.language != "en":
                self.untranslated.add(english)
        return text.format(**values) if values else text

    def listed(self, items: list[str]) -> str:
        """Several names as a list: a, b and c."""
        if len(items) < 2:
            return "".join(items)
        if self.language == "zh":
            return "、".join(items[:-1]) + "和" + items[-1]
        return ", ".join(items[:-1]) + " and " + items[-1]


@cache
def _translations(language: str) -> dict[str, str]:
    return json.loads((Path(__file__).parent / f"{language}.json").read_text(encoding="utf-8"))


def words_of(language: str) -> Words:
    """The words of a language. Raises `LabError` if there are none."""
    if language not in LANGUAGES:
        raise LabError(f"--lang {language}: there are pages in {' and '.join(LANGUAGES)}.")
    return Words(language)
