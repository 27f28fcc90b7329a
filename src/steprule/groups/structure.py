"""What a model's modules say of its structure: blocks one after the other, experts, the output layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steprule import group_errors

LISTS = (nn.ModuleList, nn.Sequential)
# In a group_matcher of timm: this belongs to the layer before.
WITH_THE_LAYER_BEFORE = 99999


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the longest list of equal ones, and all others of their type that are in lists.

    Types that hold few of the weights do not count, nor do experts, which work side by side. Other types that
    hold as many count, too, unless they are parts of these or these of them: encoders and decoders, not stages.
    """
    parallel = {id(experts) for _, experts in _with_experts(model)}
    lists = [x for x in model.modules() if isinstance(x, LISTS) and id(x) not in parallel]
    longest: dict[type, int] = {}
    members: dict[type, list[nn.Module]] = {}
    for each in lists:
        for kind, run in groupby(each.children(), type):
            found = [x for x in run if _is_block(x)]
            longest[kind] = max(longest.get(kind, 0), len(found))
            members.setdefault(kind, []).extend(found)
    weights = {kind: sum(map(_weights, members[kind])) for kind in members if longest[kind] > 1}
    large = [kind for kind in weights if 2 * weights[kind] >= max(weights.values())]
    chosen: dict[int, nn.Module] = {}
    for kind in sorted(large, key=lambda x: (x not in LISTS, longest[x], weights[x]), reverse=True):
        if not _overlap(members[kind], list(chosen.values())):
            chosen |= {id(x): x for x in members[kind]}
    return [x for x in model.modules() if id(x) in chosen]


def _overlap(some: list[nn.Module], others: list[nn.Module]) -> bool:
    """Whether one of these is in one of the others, or the other way round."""
    inside = [{id(part) for x in each for part in x.modules()} for each in (some, others)]
    return any(id(x) in inside[1] for x in some) or any(id(x) in inside[0] for x in others)


def _is_block(module: nn.Module) -> bool:
    """Whether it holds parameters, and is more than one layer of torch."""
    leaf = _of_torch(module) and not any(True for _ in module.children())
    return not leaf and any(True for _ in module.parameters())


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _weights(module: nn.Module) -> int:
    return sum(0 if is_lazy(x) else x.numel() for x in module.parameters())


def _with_experts(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules that have a router and experts, with what holds the experts.

    A router has one output for each expert; a list of layers beside an output layer can look the same, but is
    at the root of the model.
    """
    while len(own := list(model.children())) == 1 and not list(model.parameters(recurse=False)):  # a wrapper
        model = own[0]
    for module in model.modules():
        for experts in module.children() if module is not model else ():
            count = _experts_in(experts)
            if count and any(True for _ in _routers_beside(module, experts, count)):
                yield module, experts


def _experts_in(module: nn.Module) -> int:
    """How many experts these are, if they are: modules of one type, or the first dimension of raw tensors."""
    if isinstance(module, nn.ModuleList):
        kinds = set(map(type, module))
        return len(module) if len(kinds) == 1 and len(module) > 1 else 0
    if _of_torch(module) or any(True for child in module.children() for _ in child.parameters()):
        return 0
    shapes = [x.shape for x in module.parameters(recurse=False) if not is_lazy(x) and x.ndim > 1]
    counts = {shape[0] for shape in shapes}
    return counts.pop() if len(counts) == 1 and any(len(shape) == 3 for shape in shapes) else 0


def _routers_beside(module: nn.Module, experts: nn.Module, count: int) -> Iterator[Tensor]:
    """The weights with one row for each expert."""
    for child in module.children():
        for part in (child, *child.children()) if child is not experts else ():
            for param in part.parameters(recurse=False):
                if not is_lazy(param) and param.ndim == 2 and len(param) == count:
                    yield param


def routers_and_experts(model: nn.Module) -> tuple[dict[int, int], dict[int, int]]:
    """The weights of routers, and of experts in one tensor, by id, with the number of experts."""
    routers: dict[int, int] = {}
    in_one: dict[int, int] = {}
    for module, experts in _with_experts(model):
        count = _experts_in(experts)
        routers |= {id(param): count for param in _routers_beside(module, experts, count)}
        in_one |= {id(param): count for param in experts.parameters(recurse=False) if param.ndim == 3}
    return routers, in_one


def output_layer(model: nn.Module) -> nn.Module | None:
    """The last Linear of the model, unless it is in a block or in an attention, or is all there is."""
    within = {id(x) for block in blocks(model) for x in block.modules()}
    within |= {id(x) for y in model.modules() if isinstance(y, nn.MultiheadAttention) for x in y.modules()}
    linear = [x for x in model.modules() if isinstance(x, nn.Linear)]
    if not linear or id(linear[-1]) in within:
        return None
    others = (x for x in model.modules() if x is not linear[-1])
    matrices = (is_lazy(x) or x.ndim > 1 for other in others for x in other.parameters(recurse=False))
    return linear[-1] if any(matrices) else None


def depths(model: nn.Module, first: set[int]) -> dict[int, int]:
    """The layer of each parameter by its id: 0 before the first block, the last one after the last block.

    first: the ids of those in layer 0 wherever they stand outside of the blocks. A model that says what its
    layers are, with timm's `group_matcher`, is believed.

    Raises: ValueError for a model without blocks.
    """
    for prefix, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        matcher: Any = getattr(module, "group_matcher", None)
        if callable(matcher) and all(name.startswith(prefix) for name, _ in model.named_parameters()):
            return _matched(
                matcher(coarse=False), {id(param): name for name, param in module.named_parameters()}
            )
    found = blocks(model)
    if not found:
        raise group_errors.no_blocks(type(model).__name__)
    inside = {id(x): place for place, block in reversed(list(enumerate(found, 1))) for x in block.modules()}
    head, last = output_layer(model), len(found) + 1
    depth: dict[int, int] = {}
    begun = 0
    for module in model.modules():
        here = inside.get(id(module), 0)
        begun = max(begun, here)
        outside = last if begun == len(found) or module is head else begun
        for param in module.parameters(recurse=False):
            depth.setdefault(id(param), here or (0 if id(param) in first else outside))
    return depth


def _matched(matcher: Any, named: Mapping[int, str]) -> dict[int, int]:
    """The layers that a `group_matcher` gives to parameters, from 0 without gaps."""
    place: Callable[[str], Any] = matcher if callable(matcher) else _place_of(matcher)
    found: dict[int, tuple[float, ...]] = {}
    for key, name in named.items():
        there = math.inf if (given := place(name)) is None else given
        found[key] = cast("tuple[float, ...]", there if isinstance(there, tuple) else (there,))
    depth = -1
    numbered: dict[tuple[float, ...], int] = {}
    for there in sorted(set(found.values())):
        if depth < 0 or there[-1] != WITH_THE_LAYER_BEFORE:
            depth += 1
        numbered[there] = depth
    return {key: numbered[there] for key, there in found.items()}


def _place_of(matcher: Mapping[str, Any]) -> Callable[[str], tuple[float, ...]]:
    """The order of a name: of the expression that matches it, then what that captures."""
    rules: list[tuple[re.Pattern[str], int, Any]] = []
    for place, given in enumerate(matcher.values()):
        several = [(given, None)] if isinstance(given, str) else given or ()
        rules += [(re.compile(text), place, more) for text, more in several]

    def place_of(name: str) -> tuple[float, ...]:
        for expression, place, more in rules:
            match = expression.match(name)
            if match:
                return (place, *(float(x) for x in match.groups() if x is not None), *(more or ()))
        return (math.inf,)

    return place_of
