"""The entry point of the `steprule` command: checks what is installed, and shows errors."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from steprule.lab.errors import LabError, told
from steprule.lab.output import steady_output

__all__ = ["main"]

_NEEDED = ("typer", "rich", "sklearn")
_TRACEBACK = "STEPRULE_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: with 0 if all went well, with 2 after one line about what did not.

    With STEPRULE_TRACEBACK=1 in the environment, the traceback comes before that line.
    """
    with steady_output() as out:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        out.flush()
        if out.failure is not None:
            _refuse(f"the output could not be written: {out.failure.strerror}.")
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _refuse(f'the command line needs {", ".join(missing)}: pip install ".[lab]" in the folder of steprule')

    import typer

    try:
        from steprule.lab.commands import app

        return app(arguments or ["--help"], prog_name="steprule", standalone_mode=False) or 0
    except typer.TyperException as error:
        _refuse(error.format_message())
    except LabError as error:
        _show_traceback_if_asked(error)
        _refuse(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # before there is anything to keep
        _refuse("stopped.", 130)
    except Exception as error:  # even an unexpected error is shown in one line
        _show_traceback_if_asked(error)
        _refuse(f"{told(error)}. Set {_TRACEBACK}=1 to see where it came from.")


def _show_traceback_if_asked(error: Exception) -> None:
    if os.environ.get(_TRACEBACK):
        traceback.print_exception(error)


def _refuse(message: str, exit_code: int = 2) -> NoReturn:
    # Keep several spaces in a row: they may be part of a name in a command that the user will paste.
    line = " ".join(filter(None, map(str.strip, message.splitlines())))
    print(f"steprule: {line}", file=sys.stderr)
    sys.exit(exit_code)
