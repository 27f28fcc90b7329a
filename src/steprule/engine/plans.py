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

    def of(self, group: dict[str, Any]) -> Any:
        """The group's plan, or None."""
        return self.plans.get(id(group))

    def keep(self, new: Any, group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Keep a plan in place of its group's last one; drop those whose groups are gone."""
        self.plans[id(group)] = new
        if len(self.plans) > len(groups):
            present = set(map(id, groups))
            self.plans = {key: plan for key, plan in self.plans.items() if key in present}


_plans: WeakKeyDictionary[Any, Plans] = WeakKeyDictionary()

if hasattr(os, "register_at_fork"):
    # A lock may have been held when the process forked, and the pool that plans are made for is gone.
    os.register_at_fork(after_in_child=_plans.clear)


def of(optimizer: Any) -> Plans:
    """The optimizer's plans."""
    found = _plans.get(optimizer)
    return _plans.setdefault(optimizer, Plans()) if found is None else found


def forget(optimizer: Any) -> None:
    """Drop the optimizer's plans; its next step makes new ones."""
    _plans.pop(optimizer, None)
