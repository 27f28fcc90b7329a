"""Gradients from uphill: a modifier with `climb` has them taken at another point than that of the weights."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from steprule import errors
from steprule.engine.fields import FLAGS
from steprule.engine.rule import RuleOptimizer
from steprule.words import becomes

# Which runner a group asks for goes for the climb, too.
SWITCHES = ("foreach", "fused")


@cache
def rule_of(modifier: Any) -> Any:
    """A rule whose step is the climb."""

    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return becomes(modifier.climb(h, p, g, s, t))

    body = {"fields": modifier.fields, "update": staticmethod(update), "counts_steps": False}
    return type(modifier.__name__, (RuleOptimizer,), {**body, "torch_flags": FLAGS, "_watched_rounding": True})


def climb(optimizer: Any) -> None:
    """Move the parameters to where their modifier climbs; `uphill` has the weights until `descend`."""
    descend(optimizer)
    by_modifier: dict[Any, list[dict[str, Any]]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for modifier in optimizer.composition(group).at("climb"):
            by_modifier.setdefault(modifier, []).append(_of_group(modifier, group, index))
    with torch.no_grad():
        for groups in by_modifier.values():
            moving = [p for group in groups for p in group["params"] if p.grad is not None]
            optimizer.uphill += [(p, p.detach().clone(memory_format=torch.preserve_format)) for p in moving]
    try:
        for modifier, groups in by_modifier.items():
            _step(optimizer, modifier, groups)
    except BaseException:
        descend(optimizer)
        raise


def _of_group(modifier: Any, group: dict[str, Any], index: int) -> dict[str, Any]:
    """What a group says about its climb."""
    own = {
        name: field.check(modifier.__name__, group[f"{modifier.name}.{name}"], index)
        for name, field in modifier.fields.items()
    }
    switches = {name: group[name] for name in SWITCHES if group.get(name) is not None}
    return own | switches | {name: group[name] for name in ("params", "param_names") if name in group}


# For each optimizer, what climbs for its modifiers: kept, so that it finds its plans again.
_climbers: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _step(optimizer: Any, modifier: Any, groups: list[dict[str, Any]]) -> None:
    """Climb in these groups."""
    kept = _climbers.setdefault(optimizer, {})
    known = kept.get(modifier)
    if known is None or len(known.param_groups) != len(groups):
        known = kept[modifier] = rule_of(modifier)(groups, {})
    for own, group in zip(known.param_groups, groups, strict=True):
        own.clear()
        own.update(known.defaults | group)
    known.state.update((p, {}) for group in groups for p in group["params"] if p.grad is not None)
    try:
        known.step()
    finally:
        # Between climbs, it must not keep parameters alive that have left the optimizer.
        known.state.clear()
        for own in known.param_groups:
            own["params"] = []


def descend(optimizer: Any) -> None:
    """Put the weights back, bit for bit.

    Raises: RuntimeError for parameters that have another shape now; they stay as they are.
    """
    uphill, optimizer.uphill = optimizer.uphill, []
    with torch.no_grad():
        for param, weights in uphill:
            if param.shape == weights.shape:
                param.copy_(weights)
    for param, weights in uphill:
        if param.shape != weights.shape:
            name = optimizer.name_of(param)
            raise errors.reshaped_uphill(type(optimizer).__name__, name, weights.shape, param.shape)
