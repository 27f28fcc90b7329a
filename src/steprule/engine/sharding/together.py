"""What fails in all processes if it fails in one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from steprule import process_errors
from steprule.engine.sharding import exchange


@contextmanager
def all_or_none(who: str, meshes: Sequence[Any]) -> Generator[None]:
    """In the `with` block, which all processes of these meshes enter, a process fails if another one does.

    Raises: RuntimeError where the block itself has not failed.
    """
    try:
        yield
    except Exception:
        exchange.agreed(meshes, own=False)
        raise
    if not exchange.agreed(meshes, own=True):
        raise process_errors.failed_elsewhere(who, "to load this checkpoint")
