"""Processes that tests start; none of them outlives its test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# Only a process that hangs takes this many seconds, even on a busy machine.
PATIENCE = 900


@contextlib.contextmanager
def started(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Python with these arguments. At the end it is killed, with all processes that it started."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What the process prints, once it has ended with this exit code."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err[-5000:]
    return out.strip()


def python(*arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """What Python prints when it runs with these arguments in a process of its own."""
    with started(*arguments, cwd=cwd, env=env) as process:
        return finish(process)
