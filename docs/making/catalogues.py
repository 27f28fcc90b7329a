"""The catalogues of translations: brings them up to date with the English pages, or checks that they are.

    python docs/making/catalogues.py           # after the English text has changed; then translate what is new
    python docs/making/catalogues.py --check   # fails for what is not translated, or is a guess

A sentence that has changed keeps its old translation as a guess ("fuzzy") until somebody has looked at it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po
from translatable import has_words

DOCS = Path(__file__).parents[1]
TEMPLATES = DOCS / "_build" / "gettext"
LANGUAGE = "zh_CN"
CATALOGUES = DOCS / "locale" / LANGUAGE / "LC_MESSAGES"
# What is translated, by folder of pages: at least ENOUGH of it must be, and no guess may be left.
WHOLE = ("index", "lab", "rules", "start", "tutorials")
# These may lag behind; what is not translated stays English.
PARTLY = ("choose", "coming_from", "formats", "ideas", "modifiers")
ENOUGH = 0.95


def main() -> None:
    """Update the catalogues, or check them."""
    parser = argparse.ArgumentParser(description="Update the catalogues of translations.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail for what is missing")
    check: bool = parser.parse_args().check
    subprocess.run(["sphinx-build", "-E", "-q", "-b", "gettext", str(DOCS), str(TEMPLATES)], check=True)
    wrong = [problem for domain in WHOLE for problem in _brought_up_to_date(domain, check)]
    for domain in () if check else PARTLY:
        _brought_up_to_date(domain, check)
    if wrong:
        sys.exit("\n".join(wrong))


def _brought_up_to_date(domain: str, check: bool) -> list[str]:
    """What is wrong with a catalogue as it should be now, which is written unless it is only checked."""
    wanted = _template(domain)
    file = CATALOGUES / f"{domain}.po"
    found = _read(file) if file.is_file() else Catalog(locale=LANGUAGE)
    found.update(wanted)
    found.obsolete.clear()
    if not check:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as target:
            write_po(target, found, width=112, omit_header=True, sort_output=False, ignore_obsolete=True)
    messages = [message for message in found if message.id]
    guesses = [message.id for message in messages if message.fuzzy]
    missing = [message.id for message in messages if not message.string]
    problems = [f"{file.name}: look at this translation: {message}" for message in guesses]
    if len(missing) > (1 - ENOUGH) * len(messages):
        problems += [f"{file.name}: {len(missing)} of {len(messages)} are not translated: {missing[0]}"]
    return problems


def _template(domain: str) -> Catalog:
    """The sentences of the English pages that have words in them."""
    wanted = Catalog(locale=LANGUAGE)
    for message in _read(TEMPLATES / f"{domain}.pot"):
        if message.id and has_words(str(message.id)):
            wanted.add(message.id)
    return wanted


def _read(file: Path) -> Catalog:
    with file.open("rb") as source:
        return read_po(source, locale=LANGUAGE)


if __name__ == "__main__":
    main()
