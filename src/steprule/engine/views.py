"""How the matrices lie in a parameter: a convolution, a stack of experts, several projections in one weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule import group_errors

# The key of a group under which it has a view for each of its parameters, as a dict or None.
KEY = "views"


@dataclass(frozen=True)
class View:
    """How the matrices lie in a parameter of two dimensions and more.

    flatten: the first dimension is that of the rows, and all others together are the columns; otherwise the
    last two are a matrix, and the others a stack of them. split: into how many equal matrices each of them is
    split, along the rows, or along the columns if dim is 1; or how many rows each of the matrices has that lie
    under each other in it. transpose: what is a row of the parameter is a column of the matrix.
    """

    flatten: bool = False
    split: int | tuple[int, ...] = 1
    dim: int = 0
    transpose: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.split, list):  # as JSON has it
            object.__setattr__(self, "split", tuple(cast("list[int]", self.split)))

    def __str__(self) -> str:
        said = ["flattened"] if self.flatten else []
        along = "columns" if self.dim else "rows"
        if isinstance(self.split, tuple):
            said += [f"matrices of {', '.join(map(str, self.split[:-1]))} and {self.split[-1]} rows"]
        elif self.split > 1:
            said += [f"{self.split} matrices side by side along the {along}"]
        return ", ".join(said + ["transposed"] * self.transpose)

    @property
    def parts(self) -> int:
        """How many equal matrices there are. Unequal ones are stepped as parameters of their own."""
        return 1 if isinstance(self.split, tuple) else self.split

    @property
    def plain(self) -> bool:
        """Whether the matrices lie one after the other in memory, each row by row."""
        return not self.transpose and (self.dim == 0 or self.parts == 1)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what `matrices` makes of a parameter of this shape; that of a vector stays."""
        if len(shape) < 2 or self == AS_IT_IS:
            return tuple(shape)
        *stack, rows, columns = (shape[0], math.prod(shape[1:])) if self.flatten else shape
        sizes = [rows, columns]
        sizes[self.dim] //= self.parts
        stack += [self.parts] if self.parts > 1 else []
        return (*([math.prod(stack)] if stack else []), *(reversed(sizes) if self.transpose else sizes))

    def matrices(self, x: Tensor, leading: int = 0) -> Tensor:
        """The matrices, in the last two dimensions of a tensor of two or three.

        leading: how many dimensions come before those of the parameter, to which all of a stack are added.
        """
        if x.dim() - leading < 2:
            return x
        if self.flatten:
            x = x.flatten(leading + 1)
        if self.parts > 1:
            along = x.dim() - 2 + self.dim
            parts: Tensor = cast(Any, x).unflatten(along, (self.parts, x.size(along) // self.parts))
            x = parts.movedim(along, -3)
        if self.transpose:
            x = x.mT
        return x.flatten(0, -3) if x.dim() > 3 else x

    def back(self, matrices: Tensor, shape: Sequence[int], leading: int = 0) -> Tensor:
        """A tensor of this shape of whose matrices these are the values."""
        if len(shape) - leading < 2 or self.plain:
            return matrices.reshape(tuple(shape))
        x = matrices.mT if self.transpose else matrices
        if self.parts > 1:
            stack = shape[:leading] if self.flatten else shape[:-2]
            x = x.reshape(*stack, self.parts, *x.shape[-2:]).movedim(-3, -3 + self.dim)
        return x.reshape(tuple(shape))


AS_IT_IS = View()


def told(group: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Where matrices do not lie as they are: one line for each way."""
    found: dict[str, list[str]] = {}
    for place, (name, param) in enumerate(zip(names, group["params"], strict=True)):
        view = at(group, place)
        shape = view.shape(()) if is_lazy(param) else view.shape(param.shape)
        stack = f"a stack of {math.prod(shape[:-2])} matrices"
        said = str(view) or (stack if len(shape) > 2 else "")
        if said:
            found.setdefault(said, []).append(name)
    return [f"{said}: {', '.join(own[:3])}{', …' * (len(own) > 3)}" for said, own in found.items()]


def of(group: Mapping[str, Any], param: Tensor) -> View:
    """How the matrices lie in a parameter of this group."""
    if group.get(KEY) is None:
        return AS_IT_IS
    return at(group, next(i for i, other in enumerate(group["params"]) if other is param))


def says(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether the group says how the matrices lie in a parameter."""
    return group.get(KEY) is not None and any(
        other is param and view is not None for other, view in zip(group["params"], group[KEY], strict=False)
    )


def at(group: Mapping[str, Any], place: int) -> View:
    """How the matrices lie in the parameter at this place of a group."""
    given = group.get(KEY)
    return AS_IT_IS if given is None or given[place] is None else View(**given[place])


def checked(who: str, group: Mapping[str, Any], index: int) -> list[dict[str, Any] | None] | None:
    """The views of a group, one for each parameter. One alone is that of all of them.

    Raises: ValueError for a view that does not exist or does not fit.
    """
    given: Any = group.get(KEY)
    if given is None:
        return None
    params = list(group["params"])
    views: list[Any] = [given] * len(params) if isinstance(given, Mapping) else list(given)
    if len(views) != len(params):
        raise group_errors.wrong_view(
            who, f"{len(views)} views for {len(params)} parameters", "one for each", index
        )
    return [_checked(who, view, param, index) for view, param in zip(views, params, strict=True)]


def _checked(who: str, given: Any, param: Tensor, index: int) -> dict[str, Any] | None:
    if given is None:
        return None
    known: dict[str, tuple[type, str]] = {
        "flatten": (bool, "True or False"),
        "split": (int, "a whole number, at least 1, or the rows of each matrix"),
        "dim": (int, "0 or 1"),
        "transpose": (bool, "True or False"),
    }
    entries = cast("dict[str, Any]", given)
    if not isinstance(given, Mapping) or not entries.keys() <= known.keys():
        raise group_errors.wrong_view(who, repr(entries), f"a dict with {', '.join(known)}, or None", index)
    entries = {**entries}
    if isinstance(entries.get("split"), (tuple, list)):
        entries["split"] = _sizes(who, entries, param, index)
    for name, value in entries.items():
        if isinstance(value, tuple):
            continue
        kind, allowed = known[name]
        fits = type(value) is kind and (name != "split" or value >= 1) and (name != "dim" or value in (0, 1))
        if not fits:
            raise group_errors.wrong_view(who, f"{name}={value!r}", allowed, index)
    view = View(**entries)
    if is_lazy(param):
        return asdict(view)
    shape = tuple(param.shape)
    if len(shape) < 2:
        raise group_errors.wrong_view(who, f"of a parameter of shape {shape}", "two dimensions or more", index)
    rows, columns = (shape[0], math.prod(shape[1:])) if view.flatten else shape[-2:]
    length, what = (columns, "columns") if view.dim else (rows, "rows")
    if length % view.parts:
        raise group_errors.wrong_view(who, f"split={view.split} of {length} {what}", "equal parts", index)
    return asdict(view)


def _sizes(who: str, entries: Mapping[str, Any], param: Tensor, index: int) -> int | tuple[int, ...]:
    """The sizes of unequal matrices; the number of equal ones."""
    sizes = tuple(entries["split"])
    if not all(type(x) is int and x > 0 for x in sizes) or len(sizes) < 2:
        raise group_errors.wrong_view(who, f"split={sizes!r}", "two sizes or more, each at least 1", index)
    if len(set(sizes)) == 1:
        return len(sizes)
    if entries.get("dim"):
        raise group_errors.wrong_view(who, f"split={sizes!r} with dim=1", "along the rows: dim=0", index)
    if not is_lazy(param) and param.dim() >= 2:
        if param.dim() > 2 and not entries.get("flatten"):
            said = f"split={sizes!r} of a stack of matrices"
            raise group_errors.wrong_view(who, said, "one number, for equal parts", index)
        if sum(sizes) != len(param):
            said = f"split={sizes!r}, {sum(sizes)} together"
            raise group_errors.wrong_view(who, said, f"{len(param)} together, the rows of the weight", index)
    return sizes
