"""What the modifier Metrics has measured at the last step, for a log."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from steprule import errors

KEYS = ("gradient_norm", "update_norm", "weight_norm")
LEVELS = ("all", "group", "param")


def read(optimizer: Any, level: str) -> Any:
    """The numbers of all parameters together, of each group, or of each parameter by name."""
    if level not in LEVELS:
        allowed = "one of " + ", ".join(map(repr, LEVELS))
        raise errors.out_of_range(f"{type(optimizer).__name__}.metrics", "level", level, allowed)
    groups = [dict(_of_group(optimizer, group)) for group in optimizer.param_groups]
    if not any(groups) and not any("metrics" in (x.get("modifiers") or ()) for x in optimizer.param_groups):
        raise errors.nothing_measured(type(optimizer).__name__)
    if level == "param":
        return {name: _together([norms]) for group in groups for name, norms in group.items()}
    together = [_together(group.values()) for group in groups]
    return together if level == "group" else _together(x for group in groups for x in group.values())


def _of_group(optimizer: Any, group: dict[str, Any]) -> Iterable[tuple[str, list[float]]]:
    for name, param in zip(optimizer.names_in(group), group["params"], strict=True):
        state = optimizer.state.get(param, {})
        if "metrics.gradient_norm" in state:
            yield name.strip("'"), [float(state[f"metrics.{key}"]) for key in KEYS]


def _together(norms: Iterable[list[float]]) -> dict[str, float]:
    """The norms of several tensors as one, and the length of the update relative to the weights."""
    columns = list(zip(*norms, strict=True)) or [()] * len(KEYS)
    found = {key: math.hypot(*column) for key, column in zip(KEYS, columns, strict=True)}
    weights = found["weight_norm"]
    return {**found, "update_to_weight": found["update_norm"] / weights if weights else math.nan}
