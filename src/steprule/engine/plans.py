"""What the fused runners remember of each optimizer between steps.

A plan holds the tensors of its state, so that it knows them again. Whoever puts others in their place says so
here, lest the old ones stay in memory until the next step finds out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary


class Plans:
    """The plans of one optimizer, one per group. Two threads that step it at once take turns."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.plans: list[Any] = []

    def of(self, group: dict[str, Any]) -> Any:
        """The group's plan, or None."""
        return next((plan for plan in self.plans if plan.group is group), None)

    def keep(self, new: Any, groups: Sequence[dict[str, Any]]) -> None:
        """Keep a plan in place of its group's last one, and of those whose groups are gone."""
        self.plans = [
            plan
            for plan in self.plans
            if plan.group is not new.group and any(plan.group is group for group in groups)
        ]
        self.plans.append(new)


_plans: WeakKeyDictionary[Any, Plans] = WeakKeyDictionary()

if hasattr(os, "register_at_fork"):
    # A lock may have been held when the process forked, and the pool that plans are made for is gone.
    os.register_at_fork(after_in_child=_plans.clear)


def of(optimizer: Any) -> Plans:
    """The optimizer's plans."""
    found = _plans.get(optimizer)
    return _plans.setdefault(optimizer, Plans()) if found is None else found


def forget(optimizer: Any) -> None:
    """Let go of all tensors of the optimizer; its next step makes new plans."""
    _plans.pop(optimizer, None)
