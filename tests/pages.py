"""The blocks of a page of documentation, and how they are run as a reader would run them."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED = re.compile(r"[Ss]ave (?:this|it) as `([\w.-]+\.\w+)`")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, the line of the page where it begins, and what introduces it.

    not_run: why a reader cannot run it just like that; empty if they can.
    """

    language: str
    text: str
    line: int
    before: str
    not_run: str


def blocks_of(page: str, *languages: str) -> list[Block]:
    """The blocks of a page, of these languages; without any, all."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[Block] = []
    for match in BLOCK.finditer(text):
        above = text[: match.start()].rstrip()
        reason = NOT_RUN.search(above)
        line = text.count("\n", 0, match.start(2)) + 1
        before = above.rsplit("\n\n", 1)[-1]
        found.append(Block(match[1], match[2], line, before, reason[1] if reason else ""))
    return [block for block in found if not languages or block.language in languages]


def carry_out(page: str, folder: Path, blocks: Iterable[Block], names: dict[str, Any] | None = None) -> Any:
    """The names that these blocks of Python define, run one after the other; they can use those given.

    A block that the text asks to save as a file is put into the folder as well.
    """
    names = {"__name__": "__main__"} if names is None else names
    for block in blocks:
        save(block, folder)
        # So that a traceback shows the line of the page.
        lines = "\n" * (block.line - 1) + block.text
        exec(compile(lines, str(ROOT / page), "exec", dont_inherit=True), names)
    return names


def save(block: Block, folder: Path) -> bool:
    """Put a block that the text asks to save into the folder."""
    files = SAVED.findall(block.before)
    for file in files:
        (folder / file).write_text(block.text, encoding="utf-8")
    return bool(files)


def commands_in(block: Block) -> list[list[str]]:
    """The words of every command of a block; a line that ends with a backslash goes on in the next."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line))]
    return [shlex.split(re.sub(r"^\$ ", "", part)) for part in parts if part]


def commands_of(page: str, program: str) -> list[list[str]]:
    """The words after the name of the program, for every line of the page that runs it."""
    words = [found for block in blocks_of(page, "bash", "sh", "console") for found in commands_in(block)]
    return [found[1:] for found in words if found[:1] == [program]]


def run_script(file: Path) -> None:
    """Run a script as `python FILE` does, in this process."""
    runpy.run_path(str(file), run_name="__main__")
