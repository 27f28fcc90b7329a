"""The task `code`: a small GPT predicts the next character of Python's standard library."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from pathlib import Path

from steprule.lab.tasks import Task
from steprule.lab.text import character_task

__all__ = ["task"]

CHARACTERS = 600_000


def task() -> Task:
    """64 characters to the 64 that follow, from 600,000 characters of the modules that come with Python."""
    # Sorted by a hash of their names, so that what is held out is not the end of the alphabet.
    files = sorted(
        Path(sysconfig.get_path("stdlib")).glob("*.py"),
        key=lambda file: hashlib.sha256(file.name.encode()).hexdigest(),
    )
    text = ""
    for file in files:
        text += file.read_bytes().decode("ascii", "ignore")
        if len(text) >= CHARACTERS:
            break
    return character_task(
        text[:CHARACTERS],
        name=f"the standard library of Python {platform.python_version()}",
        beginning="def ",
        epochs=2,
    )
