"""README.zh-CN.md is in step with README.md: its sections say which English text they translate."""

from __future__ import annotations

import hashlib
import re

from pages import ROOT, blocks_of

ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
MARK = re.compile(r"^<!-- en: (\w+) -->\n", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def sections(page: str) -> list[str]:
    return re.split(r"(?=^## )", MARK.sub("", text_of(page)), flags=re.MULTILINE)


def digest(section: str) -> str:
    return hashlib.sha256(section.strip().encode()).hexdigest()[:12]


def test_every_section_is_translated_from_what_the_readme_says_now() -> None:
    titles = [section.partition("\n")[0] for section in sections(ENGLISH)]
    current = [digest(section) for section in sections(ENGLISH)]
    translated = MARK.findall(text_of(CHINESE))
    assert len(translated) == len(sections(CHINESE)) == len(current), (
        "a section is missing, or has no <!-- en: … -->"
    )
    stale = [
        f"'{title}' has changed. Translate it again in {CHINESE}, then write <!-- en: {now} --> above it."
        for title, now, then in zip(titles, current, translated, strict=True)
        if now != then
    ]
    assert not stale, "\n".join(stale)


def test_code_numbers_and_links_are_the_same() -> None:
    assert [block.text for block in blocks_of(CHINESE)] == [block.text for block in blocks_of(ENGLISH)]
    linked = [set(LINK.findall(text_of(page))) - {ENGLISH, CHINESE} for page in (ENGLISH, CHINESE)]
    assert linked[0] == linked[1]
    for english, chinese in zip(sections(ENGLISH), sections(CHINESE), strict=True):
        rows = [sorted(re.findall(r"\d+\.\d+", text)) for text in (english, chinese)]
        assert rows[0] == rows[1], english.partition("\n")[0]
