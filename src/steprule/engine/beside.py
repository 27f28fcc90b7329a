"""A thread that takes steps beside what the caller does meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Beside:
    """Steps in one thread, in the order in which they are begun. After one that fails, none is taken."""

    def __init__(self) -> None:
        self._begun: dict[Future[None], None] = {}
        self._failed = False
        self._process = 0

    def begin(self, step: Callable[[], None]) -> None:
        """Have the thread take a step after those that it has."""
        # A forked process has no threads.
        if self._process != os.getpid():
            self._process, self._thread = os.getpid(), ThreadPoolExecutor(1, "steprule")
            self._begun, self._failed = {}, False
        self._begun[self._thread.submit(self._take, step)] = None

    def settle(self) -> bool:
        """Wait for all steps, and return whether there were any. One that has failed is left to `complain`."""
        begun = list(self._begun)
        for step in begun:
            if step.exception() is None:
                self._begun.pop(step, None)
        return bool(begun)

    def complain(self) -> None:
        """Raise what a step has raised, if one has. Those after it were not taken."""
        failed, self._failed = list(self._begun), False
        self._begun.clear()
        for step in failed:
            step.result()

    def _take(self, step: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            step()
        except BaseException:
            self._failed = True
            raise
