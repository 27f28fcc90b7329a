"""What the fused runners keep for each optimizer between steps."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary


class Plans:
    """The plans of one optimizer, one per group. Two threads that step it at once take turns.

    A plan is looked up by its group's id. It checks everything, so it does no harm if another group has the id.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.plans: dict[int, Any] = {}
        # What the options of each group decide, by the group's id.
        self.settled: dict[int, Any] = {}
        # Those of steps in which modifiers rest, by what these are.
        self.resting: dict[Any, Plans] = {}
        # What stands for groups whose parameters are stepped in pieces, by the groups' ids.
        self.pieces: dict[int, Any] = {}
        # What is here of sharded parameters.
        self.here: Any = None
        # Those of estimates, by the further numbers that these give to groups, with the groups that have them.
        self.estimates: dict[Any, tuple[Plans, list[dict[str, Any]]]] = {}

    def of(self, group: dict[str, Any]) -> Any:
        """The group's plan, or None."""
        return self.plans.get(id(group))

    def keep(self, new: Any, group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Keep a plan in place of its group's last one; drop those whose groups are gone."""
        self.plans = _with(self.plans, new, group, groups)

    def keep_pieces(self, new: Any, group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """The same for what stands in for a group."""
        self.pieces = _with(self.pieces, new, group, groups)

    def settle(self, new: Any, group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """The same for what a group's options decide."""
        self.settled = _with(self.settled, new, group, groups)


def _with(
    kept: dict[int, Any], new: Any, group: dict[str, Any], groups: Sequence[dict[str, Any]]
) -> dict[int, Any]:
    kept[id(group)] = new
    if len(kept) <= len(groups):
        return kept
    present = set(map(id, groups))
    return {key: value for key, value in kept.items() if key in present}


_plans: WeakKeyDictionary[Any, Plans] = WeakKeyDictionary()

if hasattr(os, "register_at_fork"):
    # A lock may have been held when the process forked, and the pool that plans are made for is gone.
    os.register_at_fork(after_in_child=_plans.clear)


def of(optimizer: Any) -> Plans:
    """The optimizer's plans."""
    found = _plans.get(optimizer)
    return _plans.setdefault(optimizer, Plans()) if found is None else found


def give(optimizer: Any, known: Plans) -> None:
    """Have an optimizer find these plans."""
    _plans[optimizer] = known


def forget(optimizer: Any) -> None:
    """Drop the optimizer's plans; its next step makes new ones."""
    _plans.pop(optimizer, None)
