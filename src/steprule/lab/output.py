"""Standard output and standard error that never end a command: what cannot be written is escaped or dropped."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator
from typing import Any, TextIO, cast

__all__ = ["SteadyStream", "steady_output"]


class SteadyStream:
    """A text stream whose `write` does not raise.

    Characters that the stream's encoding lacks are written as escapes. When its reader is gone or the disk is
    full, the rest is dropped: training must not depend on its log.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text as far as possible."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                known = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                self._stream.write(known)
        except (OSError, ValueError) as error:  # ValueError: closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush as far as possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        # A closed pipe is the reader's choice; with any other error, output is lost that someone wanted.
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            self.failure = self.failure or error
        # The interpreter flushes what is left when it exits, and would fail again.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def steady_output() -> Generator[SteadyStream]:
    """Make both streams steady inside the block; gives standard output."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:

        def steady(stream: TextIO | None) -> SteadyStream:
            # A stream that was closed at the start is None, and its number would go to the next file opened.
            return SteadyStream(stream or opened.enter_context(open(os.devnull, "w")))

        out, err = steady(before[0]), steady(before[1])
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before
