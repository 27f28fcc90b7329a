"""Gradients from uphill: a modifier with `climb` has them taken at another point than that of the weights."""

from __future__ import annotations

from functools import cache
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch

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
    for group in optimizer.param_groups:
        for modifier in optimizer.composition(group).at("climb"):
            own = {name: group[f"{modifier.name}.{name}"] for name in modifier.fields}
            own |= {name: group[name] for name in SWITCHES if group.get(name) is not None}
            by_modifier.setdefault(modifier, []).append({"params": group["params"], **own})
    with torch.no_grad():
        for groups in by_modifier.values():
            moving = [p for group in groups for p in group["params"] if p.grad is not None]
            optimizer.uphill += [(p, p.detach().clone(memory_format=torch.preserve_format)) for p in moving]
    try:
        for modifier, groups in by_modifier.items():
            _climber(optimizer, modifier, groups).step()
    except BaseException:
        descend(optimizer)
        raise


# For each optimizer, what climbs for its modifiers: kept, so that it finds its plans again.
_climbers: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _climber(optimizer: Any, modifier: Any, groups: list[dict[str, Any]]) -> Any:
    """The optimizer whose step is the climb of these groups."""
    kept = _climbers.setdefault(optimizer, {})
    known = kept.get(modifier)
    if known is None or not _fits(known.param_groups, groups):
        known = kept[modifier] = rule_of(modifier)(groups, {})
    for own, group in zip(known.param_groups, groups, strict=True):
        own.update({name: value for name, value in group.items() if name != "params"})
    return known


def _fits(own: list[dict[str, Any]], groups: list[dict[str, Any]]) -> bool:
    """Whether these groups have the same parameters and say the same things."""
    if len(own) != len(groups):
        return False
    for kept, group in zip(own, groups, strict=True):
        params, given = kept["params"], group["params"]
        if not kept.keys() >= group.keys() or len(params) != len(given) or not all(map(is_, params, given)):
            return False
    return True


def descend(optimizer: Any) -> None:
    """Put the weights back, bit for bit."""
    with torch.no_grad():
        for param, weights in optimizer.uphill:
            param.copy_(weights)
    optimizer.uphill = []
