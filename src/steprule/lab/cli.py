"""The entry point of the `steprule` command: what is installed, and how errors are shown."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]

_NEEDED = ("typer", "rich", "sklearn", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 when all went well, 2 after one line about a wrong input."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _refuse(f'the command line needs {", ".join(missing)}: pip install "steprule[lab]"')

    import typer

    from steprule.lab.commands import app
    from steprule.lab.errors import LabError

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(given or ["--help"], prog_name="steprule", standalone_mode=False)
    except typer.TyperException as error:
        _refuse(error.format_message())
    except LabError as error:
        _refuse(str(error), error.exit_code)
    sys.exit(status or 0)


def _refuse(message: str, exit_code: int = 2) -> NoReturn:
    print(f"steprule: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)
