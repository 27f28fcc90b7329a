"""What users give as parameters: tensors, with names or without, a module, or groups of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from steprule import errors
from steprule.engine import notices


def as_groups(who: str, params: Any) -> Any:
    """The groups that users give as parameters, or one of all of them."""
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    if isinstance(params, Tensor):
        raise errors.bare_tensor(who, type(params).__name__)
    if isinstance(params, (set, frozenset)):
        raise errors.unordered_params(who)
    if callable(params):
        raise errors.function_for_params(who, getattr(cast(object, params), "__name__", "it"))
    if isinstance(params, (str, bytes, dict)) or not isinstance(params, Iterable):
        raise errors.bare_tensor(who, type(cast(object, params)).__name__)
    groups = list(cast(Iterable[Any], params))
    if not groups:
        raise errors.no_parameters(who)
    if isinstance(groups[0], dict):
        return groups
    return [{"params": groups}]


def tensors_and_names(who: str, params: Any, group: int) -> tuple[list[Tensor], list[str]]:
    """The parameters of a group, and their names if they have any."""
    if isinstance(params, Tensor):
        params = [params]
    elif isinstance(params, nn.Module):
        params = params.named_parameters()
    if isinstance(params, (set, frozenset)):
        raise errors.unordered_params(who)
    entries: list[Any] = list(params)
    names = [cast(str, entry[0]) for entry in entries if isinstance(entry, tuple)]
    tensors: list[Any] = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    if names and len(names) != len(entries):
        raise errors.names_missing(who, group)
    for place, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise errors.not_a_tensor(who, type(tensor).__name__, place, group)
    return tensors, names


def name(names: list[str], place: int) -> str:
    """How messages refer to the parameter at a place: by name, if there are names."""
    return f"'{names[place]}'" if names else f"parameter {place}"


def without_duplicates(who: str, tensors: list[Tensor], names: list[str], group: int) -> list[int]:
    """The places of the parameters, each once; a warning tells of others."""
    seen: set[int] = set()
    unique: list[int] = []
    twice: list[str] = []
    for place, tensor in enumerate(tensors):
        if id(tensor) in seen:
            twice.append(name(names, place))
        else:
            seen.add(id(tensor))
            unique.append(place)
    if twice:
        notices.warn(errors.duplicate_parameters(who, ", ".join(twice), group))
    return unique
