"""All parameters as one vector: from end to end in one tensor, or in parts that several processes have.

L-BFGS is the same for both. Vectors add, subtract and scale where their elements are; a dot product and the
largest element of parts are taken over all processes, exactly, so that any number of them gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from steprule import process_errors
from steprule.engine.blocks import Region
from steprule.engine.program import exact
from steprule.engine.program import sums as partial_sums
from steprule.engine.program.sums import Partial
from steprule.engine.sharding import exchange, parts

# A tensor of all elements, or `Parts`: they have the same operations.
Vector: TypeAlias = Any
States: TypeAlias = Any
Space: TypeAlias = "Flat | Sharded"
# The entries of a state that are vectors, and those that are a history of vectors.
VECTORS, HISTORIES = ("d", "prev_flat_grad"), ("old_dirs", "old_stps")


def of(who: str, params: Sequence[Tensor]) -> Space:
    """The parameters as one vector."""
    return Sharded(who, params) if any(map(parts.sharded, params)) else Flat(params)


def largest(x: Vector) -> Tensor:
    """max|x|."""
    return x.largest() if isinstance(x, Parts) else x.abs().max()


def length(x: Vector) -> Tensor:
    """‖x‖₁."""
    return x.length() if isinstance(x, Parts) else x.abs().sum()


class Flat:
    """Parameters that are all here: vectors and the state are those of torch.optim."""

    def __init__(self, params: Sequence[Tensor]):
        self.params = params

    def state_in(self, states: States, history_size: int) -> dict[str, Any]:
        """The state of the vector, which torch.optim keeps with the first parameter."""
        state: dict[str, Any] = states[self.params[0]]
        state.setdefault("func_evals", 0)
        state.setdefault("n_iter", 0)
        return state

    def keep(self, state: dict[str, Any], states: States, history_size: int) -> None:
        """Nothing: it is where it belongs."""

    def agreed(self, value: float, names: Sequence[str]) -> float:
        """The loss that all processes have."""
        return value

    def gradient(self) -> Tensor:
        """The gradients end to end in a new tensor; a complex number counts as two real ones."""
        found: list[Tensor] = []
        for param in self.params:
            gradient = torch.zeros_like(param) if param.grad is None else param.grad
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            found.append(_real(gradient.resolve_conj()).reshape(-1))
        return torch.cat(found)

    def move(self, d: Tensor, t: Any) -> None:
        """θ ← θ + t·d."""
        place = 0
        for param in self.params:
            numbers = _real(param)
            part = d[place : place + numbers.numel()]
            numbers.add_(part.view_as(numbers), alpha=float(t))
            place += numbers.numel()

    def copies(self) -> list[Tensor]:
        """θ as it is now."""
        return [p.clone(memory_format=torch.contiguous_format) for p in self.params]

    def put_back(self, saved: Sequence[Tensor]) -> None:
        """Set θ back to what was saved."""
        for param, value in zip(self.params, saved, strict=True):
            param.copy_(value)


class Sharded:
    """Parameters of which this process has parts: vectors are `Parts`.

    The state is kept with every parameter, sharded as it is, so that torch.distributed.checkpoint saves it and
    loads it with any number of processes. It always has room for the whole history: what is loaded has to fit
    what is there. Plain numbers are with the first parameter, which no process has to share.
    """

    def __init__(self, who: str, params: Sequence[Any]):
        self.who, self.params = who, params
        meshes = {id(p.device_mesh): p.device_mesh for p in params if parts.sharded(p)}
        ranks = {exchange.ranks_of(mesh): mesh for mesh in meshes.values()}
        most = max(ranks, key=len)
        for own in ranks:
            if not set(own) <= set(most):
                raise process_errors.other_processes(who, most, own)
        self._processes = exchange.Processes(ranks[most])
        self._counts = [self._is_counted(p) for p in params]
        self._regions = list(map(_region, params))
        self.dtype = reduce(torch.promote_types, (_real(parts.local(p.detach())).dtype for p in params))
        self.device = parts.local(params[0]).device
        # Of all processes.
        self.count = sum(math.prod(x.whole) for x in self._regions)

    def _is_counted(self, param: Any) -> bool:
        """Whether this process counts its part in sums: of what is repeated, one process does."""
        together = self._processes
        if not parts.sharded(param):
            return together.here == 0
        return not parts.repeated(param) and together.ranks[0] in exchange.ranks_of(param.device_mesh)

    # The state

    def state_in(self, states: States, history_size: int) -> dict[str, Any]:
        """The state of the vector, as it is while a step is taken: with vectors and lists of them."""
        first = states[self.params[0]]
        if "pairs" not in first:
            self.keep({"func_evals": 0, "n_iter": 0}, states, history_size)
        state = {key: first[key] for key in ("func_evals", "n_iter")}
        if first["prev_loss"] == math.inf:  # nothing was moved yet
            return state
        each = [states[p] for p in self.params]
        state |= {key: first[key] for key in ("t", "H_diag", "prev_loss")}
        state |= {key: Parts(self, [parts.local(x[key]) for x in each]) for key in VECTORS}
        for key in HISTORIES:
            rows = [parts.local(x[key]) for x in each]
            state[key] = [Parts(self, [row[place] for row in rows]) for place in range(first["pairs"])]
        return state | {"ro": first["ro"][: first["pairs"]].tolist()}

    def keep(self, state: dict[str, Any], states: States, history_size: int) -> None:
        """Put the state back into what checkpoints see."""
        first, begun = states[self.params[0]], "d" in state
        first |= {key: state[key] for key in ("func_evals", "n_iter")}
        first["prev_loss"] = state["prev_loss"] if begun else math.inf
        first |= {key: float(state[key]) if begun else 0.0 for key in ("t", "H_diag")}
        # The newest ones, if there is less room than before.
        ratios = state.get("ro", [])[-history_size:]
        first["pairs"] = len(ratios)
        first["ro"] = torch.zeros(history_size, dtype=torch.float64, device="cpu")
        first["ro"][: len(ratios)] = torch.tensor(list(map(float, ratios)), dtype=torch.float64)
        for place, (param, region) in enumerate(zip(self.params, self._regions, strict=True)):
            own = states[param]
            for key in VECTORS:
                room = self._room(own, key, param, region, None)
                if begun:
                    room.copy_(state[key].tensors[place])
            for key in HISTORIES:
                room = self._room(own, key, param, region, history_size)
                # The oldest first: a pair moves to where an older one was.
                for row, vector in enumerate(state.get(key, [])[-history_size:]):
                    room[row].copy_(vector.tensors[place])

    def _room(self, state: dict[str, Any], key: str, param: Any, region: Region, rows: int | None) -> Tensor:
        """The memory here of a vector, or of so many, for one parameter."""
        there = state.get(key)
        shape = region.shape if rows is None else (rows, *region.shape)
        if there is not None:
            own: Tensor = parts.local(there)
            if (tuple(own.shape), own.dtype, own.device) == (shape, self.dtype, self.device):
                return own
        made = torch.zeros(shape, dtype=self.dtype, device=parts.local(param).device)
        like = parts.like if rows is None else parts.stacked
        state[key] = like(param, made, region.whole if rows is None else (rows, *region.whole))
        return made

    def misfit(self, param: Any, state: Mapping[str, Any]) -> str:
        """Why this cannot be the state of a parameter; empty if it can."""
        numbers = ("func_evals", "n_iter", "pairs", "prev_loss", "t", "H_diag", "ro")
        wanted = {*VECTORS, *HISTORIES, *(numbers if param is self.params[0] else ())}
        if state and set(state) != wanted:
            return f"has {', '.join(sorted(map(str, state)))}, must have {', '.join(sorted(wanted))}"
        whole = _region(param).whole
        for key in (*VECTORS, *HISTORIES) if state else ():
            value = state[key]
            alike = isinstance(value, Tensor) and parts.sharded(value) == parts.sharded(param)
            # torch distributes no single numbers of a whole state dict.
            if not alike and not (isinstance(value, Tensor) and not value.dim()):
                return f"has a {type(value).__name__} as '{key}', must have a {type(param.data).__name__}"
            if tuple(value.shape[1:] if key in HISTORIES else value.shape) != whole:
                return f"has '{key}' of shape {tuple(value.shape)}, and the parameter has {whole}"
        return ""

    # The parameters

    def gradient(self) -> Parts:
        """What is here of the gradients, in new tensors; a complex number counts as two real ones."""
        found: list[Tensor] = []
        for param in self.params:
            if param.grad is None:
                found.append(torch.zeros_like(_real(parts.local(param.detach())), dtype=self.dtype))
            else:
                part = parts.local(exchange.arranged(param, param.grad)).detach()
                part = (part.to_dense() if part.is_sparse else part).resolve_conj()
                found.append(_real(part).to(self.dtype, copy=True))
        return Parts(self, found)

    def move(self, d: Parts, t: Any) -> None:
        """θ ← θ + t·d."""
        for param, part in zip(self.params, d.tensors, strict=True):
            _add(_real(parts.local(param.detach())), part, float(t))
        torch.autograd.graph.increment_version(list(self.params))

    def copies(self) -> list[Tensor]:
        """What is here of θ as it is now."""
        return [parts.local(p.detach()).clone() for p in self.params]

    def put_back(self, saved: Sequence[Tensor]) -> None:
        """Set θ back to what was saved."""
        for param, value in zip(self.params, saved, strict=True):
            parts.local(param.detach()).copy_(value)
        torch.autograd.graph.increment_version(list(self.params))

    # What all processes know

    def agreed(self, value: float, names: Sequence[str]) -> float:
        """The loss that all processes have; NaN if it is not finite in one of them.

        names: of the parameters. Raises: ValueError, in all processes, if they have different losses, or one
        has a gradient that another lacks: they would go different ways.
        """
        fine = math.isfinite(value)
        own = [value, -value, 0.0] if fine else [-math.inf, -math.inf, 1.0]
        there = [float(p.grad is not None) for p in self.params]
        own += [*there, *(1 - x for x in there)]
        found = self._processes.largest(torch.tensor(own, dtype=torch.float64))
        most, least, wrong, *flags = cast("list[float]", cast(Any, found).tolist())
        some, lacking = flags[: len(there)], flags[len(there) :]
        rows = zip(names, some, lacking, strict=True)
        if missing := [name for name, *both in rows if all(both)]:
            raise process_errors.missing_gradients(self.who, missing)
        if wrong:
            return math.nan
        if most != -least:
            raise process_errors.other_losses(self.who, -least, most)
        return value

    def added(self, tensors: Iterable[Tensor]) -> Tensor:
        """The sum of all elements of doubles, one for each parameter, over all processes."""
        counted = [place for place, counts in enumerate(self._counts) if counts]
        some = (x for x, counts in zip(tensors, self._counts, strict=True) if counts)
        return self._everywhere("total", exact.of_all(some, [self._regions[place] for place in counted]))

    def most(self, tensors: Sequence[Tensor]) -> Tensor:
        """The largest of all elements, over all processes; NaN if one is."""
        own = [x.amax() for x in tensors if x.numel()]
        return self._everywhere("largest", torch.stack(own).max().item() if own else -math.inf)

    def _everywhere(self, word: str, value: Any) -> Tensor:
        share = Partial(value, 0)
        if len(self._processes) == 1:
            number = partial_sums.finished(word, [share])
        else:
            number = exchange.Sums(self.who, self._processes, {word: word}, False).known({word: [share]})[word]
        return torch.tensor(number, dtype=self.dtype, device=self.device)


class Parts:
    """What is here of a vector: for each parameter, the elements that belong to its part."""

    def __init__(self, space: Sharded, tensors: Sequence[Tensor]):
        self.space, self.tensors = space, tensors
        self.dtype, self.device = tensors[0].dtype, tensors[0].device

    def numel(self) -> int:
        """How many elements the vector has in all processes."""
        return self.space.count

    def dot(self, other: Parts) -> Tensor:
        """The sum of the products of the elements, which are doubles."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return self.space.added(x.double() * y for x, y in pairs)

    def largest(self) -> Tensor:
        """max|x|."""
        return self.space.most([x.abs() for x in self.tensors])

    def length(self) -> Tensor:
        """‖x‖₁."""
        return self.space.added(x.double().abs() for x in self.tensors)

    def neg(self) -> Parts:
        """-x."""
        return Parts(self.space, [-x for x in self.tensors])

    def sub(self, other: Parts) -> Parts:
        """x - y."""
        return Parts(self.space, [x - y for x, y in zip(self.tensors, other.tensors, strict=True)])

    def mul(self, t: Any) -> Parts:
        """x·t."""
        return Parts(self.space, [x * t for x in self.tensors])

    def add_(self, other: Parts, *, alpha: float) -> Parts:
        """x ← x + alpha·y."""
        for x, y in zip(self.tensors, other.tensors, strict=True):
            _add(x, y, alpha)
        return self

    def neg_(self) -> Parts:
        """x ← -x."""
        for x in self.tensors:
            x.neg_()
        return self

    def to(self, other: Parts) -> Parts:
        """The same elements, in the dtype and on the device of another vector."""
        return Parts(self.space, [x.to(y) for x, y in zip(self.tensors, other.tensors, strict=True)])


def _add(x: Tensor, y: Tensor, alpha: float) -> None:
    """x ← x + alpha·y, where each element is rounded once."""
    if y.dtype in (torch.bfloat16, torch.float16):
        # torch rounds products, too, at some places in memory and not at others: how x is cut would show.
        x.copy_(x.float().add_(y, alpha=alpha))
    else:
        x.add_(y, alpha=alpha)


def _real(x: Tensor) -> Tensor:
    """The same numbers, where a complex one is two real ones."""
    return torch.view_as_real(x) if x.is_complex() else x


def _region(param: Any) -> Region:
    """Which elements of a parameter are here, where a complex one is two."""
    own = parts.region_of(param)
    if not param.is_complex():
        return own
    return Region((*own.whole, 2), (*own.shape, 2), (*own.first, 0))
