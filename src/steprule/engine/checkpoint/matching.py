"""Matches the parameters of a checkpoint with those of the optimizer that loads it.

If both sides have names, the names decide; what wrappers add to them does not count. Without names, or if no
name is on both sides, positions decide, and then everything must agree: the number of groups, their sizes and
every shape that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule import errors
from steprule.engine.checkpoint.report import quoted

SHAPES = "param_shapes"
# What wrapped modules call the module inside: DataParallel, DDP, DeepSpeed and averaged models, torch.compile,
# FSDP (and fairscale's and XLA's), checkpointed activations, Lightning, Opacus, ONNX Runtime, TorchRec.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"}
    | {"_forward_module", "_original_module", "_module", "_torch_module", "_dmp_wrapped_module"}
)


@dataclass(frozen=True)
class Place:
    """One parameter as one side knows it: its group, name and shape, and the key of its state.

    shape: None if it is not known: it is not in the checkpoint, or a lazy parameter has none yet.
    """

    group: int
    label: str
    shape: tuple[int, ...] | None
    key: Any

    @property
    def shown(self) -> str:
        """How messages refer to it."""
        return self.label if self.label.startswith("parameter ") else f"'{self.label}'"


@dataclass(frozen=True)
class Match:
    """Which saved parameter belongs to which of the optimizer's, as pairs (saved, own).

    strangers: both sides have names, but none in common, so positions decided.
    """

    by: str
    pairs: list[tuple[Place, Place]]
    missing: list[Place]
    unexpected: list[Place]
    reshaped: list[tuple[Place, Place]]
    strangers: bool = False


def own_places(groups: list[dict[str, Any]]) -> list[Place]:
    """The optimizer's parameters."""
    places: list[Place] = []
    for index, group in enumerate(groups):
        params: list[Tensor] = group["params"]
        names = names_of(group)
        for i, param in enumerate(params):
            label = names[i] if names else f"parameter {len(places)}"
            shape = None if is_lazy(param) else tuple(param.shape)
            places.append(Place(index, label, shape, param))
    return places


def saved_places(groups: list[dict[str, Any]], state: Mapping[Any, Any], slots: Iterable[Any]) -> list[Place]:
    """The parameters of a checkpoint. A shape is known if it was stored, or if a slot of that shape was."""
    slots = list(slots)
    places: list[Place] = []
    for index, group in enumerate(groups):
        names = names_of(group)
        shapes = _shapes_of(group)
        for i, key in enumerate(group["params"]):
            label = names[i] if names else f"parameter {len(places)}"
            shape = shapes[i] if shapes else None
            if shape is None and names:
                shape = shape_in(state.get(key, {}), slots)
            places.append(Place(index, label, shape, key))
    return places


def shape_in(state: Mapping[str, Any], slots: Iterable[Any]) -> tuple[int, ...] | None:
    """The shape of the parameter that a saved state belongs to, as its slots show it."""
    whole = [slot.key for slot in slots if slot.per == "element"]
    stored = [state.get(x) for key in whole for x in (key, f"{key}_codes")]
    found = {tuple(x.shape) for x in stored if isinstance(x, Tensor)}
    return found.pop() if len(found) == 1 else None


def _differ(there: Place, here: Place) -> bool:
    """Whether both shapes are known, and not the same."""
    return None not in (there.shape, here.shape) and there.shape != here.shape


def names_of(group: Mapping[str, Any]) -> list[str] | None:
    """The names of a group's parameters, if there is one for each."""
    return _one_each(group, "param_names", _is_name)


def _without_wrappers(places: list[Place]) -> list[str]:
    """The names of the parameters in the module without its wrappers."""
    split = (place.label.split(".") for place in places)
    return [".".join([*(part for part in parts[:-1] if part not in WRAPPERS), parts[-1]]) for parts in split]


def _is_name(name: Any) -> bool:
    return isinstance(name, str)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, (list, tuple)) and all(type(n) is int for n in cast("list[Any]", shape))


def _shapes_of(group: Mapping[str, Any]) -> list[tuple[int, ...]] | None:
    shapes = _one_each(group, SHAPES, _is_shape)
    return None if shapes is None else [tuple(shape) for shape in shapes]


def _one_each(group: Mapping[str, Any], key: str, fits: Callable[[Any], bool]) -> list[Any] | None:
    entries: Any = group.get(key)
    if not isinstance(entries, (list, tuple)):
        return None
    entries = list(cast("list[Any]", entries))
    return entries if len(entries) == len(group["params"]) and all(map(fits, entries)) else None


def match(
    who: str,
    saved_groups: list[dict[str, Any]],
    own_groups: list[dict[str, Any]],
    saved: list[Place],
    own: list[Place],
    in_order: bool,
) -> Match:
    """Pair the parameters.

    in_order: the rule keeps one state for all parameters together, so they must be the same ones in the same
    order. Raises: ValueError if there are no names to match by and the positions do not agree.
    """
    named = all(names_of(g) is not None for g in (*saved_groups, *own_groups) if g["params"])
    there, here = _without_wrappers(saved), _without_wrappers(own)
    if not (_unique(there) and _unique(here)):
        there, here = [place.label for place in saved], [place.label for place in own]
    there, here = _without_prefix(there, here)
    if not (named and _unique(there) and _unique(here)):
        return _by_position(who, saved_groups, own_groups, saved, own)
    if not set(there) & set(here) and _places_agree(saved_groups, own_groups, saved, own):
        return Match("position", list(zip(saved, own, strict=True)), [], [], [], strangers=True)
    if in_order and there != here:
        raise errors.checkpoint(
            who,
            "it keeps one history for all parameters together, and the checkpoint has other parameters or "
            "another order",
            "Build it from the same parameters in the same order.",
        )
    by_name = dict(zip(there, saved, strict=True))
    pairs = [(by_name[name], place) for name, place in zip(here, own, strict=True) if name in by_name]
    reshaped = [(a, b) for a, b in pairs if _differ(a, b)]
    return Match(
        by="name",
        pairs=[pair for pair in pairs if pair not in reshaped],
        missing=[place for name, place in zip(here, own, strict=True) if name not in by_name],
        unexpected=[place for name, place in by_name.items() if name not in set(here)],
        reshaped=reshaped,
    )


def _without_prefix(there: list[str], here: list[str]) -> tuple[list[str], list[str]]:
    """The names, without a prefix that every name of one side has if that makes both sides equal."""
    for longer, shorter in ((there, here), (here, there)):
        prefix = longer[0].partition(".")[0] + "." if longer else ""
        if prefix and {prefix + name for name in shorter} == set(longer):
            bare = [name.removeprefix(prefix) for name in longer]
            return (bare, here) if longer is there else (there, bare)
    return there, here


def _unique(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _places_agree(
    saved_groups: list[dict[str, Any]],
    own_groups: list[dict[str, Any]],
    saved: list[Place],
    own: list[Place],
) -> bool:
    """Whether the parameters could be the same ones, in the same order and groups."""
    there, here = ([len(group["params"]) for group in groups] for groups in (saved_groups, own_groups))
    return there == here and bool(saved) and not any(map(_differ, saved, own))


def _by_position(
    who: str,
    saved_groups: list[dict[str, Any]],
    own_groups: list[dict[str, Any]],
    saved: list[Place],
    own: list[Place],
) -> Match:
    fix = (
        "Build the groups as they were when it was saved, or give both optimizers named_parameters() or the "
        "module: then parameters are matched by name."
    )
    if len(saved_groups) != len(own_groups):
        problem = (
            f"the checkpoint has {len(saved_groups)} parameter groups, a different number of parameter "
            f"groups than the optimizer's {len(own_groups)}"
        )
        raise errors.checkpoint(who, problem, fix)
    for index, (there, here) in enumerate(zip(saved_groups, own_groups, strict=True)):
        if len(there["params"]) != len(here["params"]):
            problem = (
                f"parameter group {index} has {len(there['params'])} parameters in the checkpoint, which "
                f"doesn't match the size of optimizer's group ({len(here['params'])})"
            )
            raise errors.checkpoint(who, problem, fix)
    pairs = list(zip(saved, own, strict=True))
    for there, here in pairs:
        if _differ(there, here):
            problem = (
                f"{here.shown} has shape {here.shape}, but in its position the checkpoint has "
                f"{there.shown} with shape {there.shape}"
            )
            raise errors.checkpoint(who, problem, fix)
    return Match("position", pairs, [], [], [])


def refuse_differences(who: str, match: Match) -> None:
    """Raise ValueError if a parameter is on one side only, or has another shape."""
    problems: list[str] = []
    if match.missing:
        problems.append(f"the checkpoint lacks {quoted(place.label for place in match.missing)}")
    if match.unexpected:
        problems.append(f"the optimizer lacks {quoted(place.label for place in match.unexpected)}")
    problems += [
        f"{here.shown} has shape {there.shape} in the checkpoint and {here.shape} here"
        for there, here in match.reshaped[:3]
    ]
    if problems:
        fix = (
            "load_state_dict(…, strict=False) loads what fits, leaves the rest as it is, and returns a "
            "report of it."
        )
        raise errors.checkpoint(who, "; ".join(problems), fix)
