"""Errors in a user's input, each in one line.

Every wrong input raises `LabError`; the command line prints its text on one line and exits with code 2.
"""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "Diverged",
    "LabError",
    "Stopped",
    "at",
    "cannot_be_copied",
    "did_you_mean",
    "every_label_ignored",
    "failing",
    "told",
]


class LabError(Exception):
    """A wrong input, a folder that cannot be used, or a run that cannot continue."""

    exit_code = 2


class Diverged(LabError):
    """The loss or a parameter became NaN or infinite."""


class Stopped(LabError):
    """The user pressed Ctrl-C."""

    exit_code = 130


def every_label_ignored(loss: float, label: int, items: str, split: str) -> LabError:
    """A batch whose labels are all negative, so that a loss has nothing to take the mean of."""
    return LabError(
        f"the loss is {loss} on {items} of {split}: every label of these is below 0 (such as {label}), which "
        "losses ignore, so there is nothing to take the mean of. Give them labels, or leave them out."
    )


def cannot_be_copied(error: BaseException) -> LabError:
    """A model that holds a file, a lock or the like."""
    return LabError(
        f"the model cannot be copied, and the run is first tried on a copy: {told(error)}. Keep what cannot be "
        "copied outside of the model, or give its class a __deepcopy__."
    )


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """The nearest right name as a sentence to add to a message, or every name if none is near.

    Case does not count: `adm` is as near to `Adam` as `Adm` is.
    """
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.5)
    if near:
        return f"Did you mean '{by_lower[near[0]]}'?"
    return f"Known: {', '.join(by_lower.values()) or 'none'}."


@contextmanager
def failing(what: str) -> Generator[None]:
    """Turn any error of a user's own code, even `SystemExit`, into one line that says what failed."""
    try:
        yield
    except (LabError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise LabError(f"{what} failed: {told(error)}.") from error


@contextmanager
def at(where: Callable[[], str]) -> Generator[None]:
    """Begin the text of a `LabError` that is raised in the block with where it happened."""
    try:
        yield
    except LabError as error:
        raise LabError(f"{where()}: {error}") from error


def told(error: BaseException) -> str:
    """Kind and text of an error that a user's own code raised, and the line of that code that it came from."""
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    not_theirs = (*installed, str(Path(__file__).parents[1]), "<")
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(not_theirs)
    ]
    place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    try:
        text = str(error).rstrip(".")
    except Exception:  # a user's own error class
        text = ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"
