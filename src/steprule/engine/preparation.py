"""What preparing a step changes in the state: it is undone if the step is not taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


class Preparation:
    """The changes of one step before it begins.

    state: the optimizer's, by parameter.
    """

    def __init__(self, state: MutableMapping[Tensor, Any]):
        self._state = state
        self._known = len(state)
        self._changed: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
        self._at_the_start: list[Callable[[], None]] = []

    def note(self, entries: dict[str, Any], before: Mapping[str, Any]) -> None:
        """Remember the entries that a parameter's state had before, if they have changed."""
        if len(entries) != len(before) or any(before.get(key) is not x for key, x in entries.items()):
            self._changed.append((entries, before))

    def postpone(self, move: Callable[[], None]) -> None:
        """Move a parameter when the step begins, and not if it is not taken."""
        self._at_the_start.append(move)

    @property
    def moves(self) -> bool:
        """Whether parameters are moved before the first sweep."""
        return bool(self._at_the_start)

    def begin(self) -> None:
        """Move what was postponed."""
        moves, self._at_the_start = self._at_the_start, []
        for move in moves:
            move()

    def undo(self) -> None:
        """Put every state back as it was, and drop those that were made for this step."""
        for entries, before in reversed(self._changed):
            entries.clear()
            entries.update(before)
        for param in list(self._state)[self._known :]:
            del self._state[param]
