"""What processes tell each other in a step. No other module calls a collective.

What is exchanged, and in which order, follows from what all processes know: groups, shapes, meshes. So a
process whose every part is empty takes part like any other, and one that fails tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from steprule import process_errors
from steprule.engine.program import exact, sums
from steprule.engine.program.exact import Sum
from steprule.engine.program.sums import Partial
from steprule.engine.sharding import parts

# What is sent from one process to another begins at multiples of so many bytes.
ALIGNED = 16
LIMB = 0xFFFFFFFF
# What is smaller is packed with others, up to so many bytes; what is larger is sent from where it is.
PACKED, PACK = 1 << 20, 1 << 25
# A sum in limbs, how many elements it has, and whether its share is given.
_WIDTH = exact.DOUBLE.width + 2


def ranks_of(mesh: Any) -> tuple[int, ...]:
    """The ranks of all processes of a mesh, in order."""
    return tuple(sorted(mesh.mesh.flatten().tolist()))


@contextmanager
def others_wait() -> Generator[None]:
    """In the `with` block, processes wait for what others send: an error says so.

    It cannot be told to the others, since the next thing that they get has to be what they wait for.
    """
    try:
        yield
    except Exception as error:
        error.add_note(process_errors.others_wait())
        raise


class Processes:
    """The processes that hold the parameters of one optimizer together.

    here: the number of this one among them. ranks: of all of them, in order.
    """

    def __init__(self, mesh: Any):
        import torch.distributed as dist

        self.ranks = ranks_of(mesh)
        self.here = self.ranks.index(dist.get_rank())
        self.device = torch.device(mesh.device_type, *_index(mesh.device_type))
        everybody = len(self.ranks) == dist.get_world_size()
        flat = mesh if mesh.ndim == 1 else None if everybody else mesh._flatten()
        self.group: Any = dist.group.WORLD if everybody else cast(Any, flat).get_group()

    def __len__(self) -> int:
        return len(self.ranks)

    def added(self, numbers: Tensor) -> Tensor:
        """The sum of what all processes give."""
        import torch.distributed as dist

        numbers = numbers.to(self.device)
        cast(Any, dist).all_reduce(numbers, group=self.group)
        return numbers.cpu()

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest of what all processes give."""
        import torch.distributed as dist

        numbers = numbers.to(self.device)
        cast(Any, dist).all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group)
        return numbers.cpu()

    def passing(self, pieces: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]) -> Passing:
        """Begin to give each process these pieces of memory, and to get what each gives to this one.

        wanted: the memory for it, which is filled at the end.
        """
        import torch.distributed as dist

        given = [_bytes_of(own, self.device) for own in pieces]
        sizes = [sum(map(_room, own)) for own in wanted]
        got = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        rooms, memory = list(map(len, given)), torch.cat(given)
        options = {"group": self.group, "async_op": True}
        work = cast(Any, dist).all_to_all_single(got, memory, sizes, rooms, **options)
        sent = sum(rooms) - rooms[self.here]
        return Passing(work, memory, got, [x for own in wanted for x in own], sent)

    def spread(self, pieces: Sequence[Sequence[Tensor]]) -> None:
        """Fill these pieces of memory, which all processes have, with what each process has in its own."""
        import torch.distributed as dist

        started: list[tuple[Any, Tensor, list[Tensor]]] = []
        for process, own in enumerate(pieces):
            source = {"src": self.ranks[process], "group": self.group, "async_op": True}
            for pack in _packs([x for x in own if x.numel()]):
                # Of one large piece, its own memory; it need not be copied.
                alone = len(pack) == 1 and pack[0].is_contiguous() and pack[0].device == self.device
                if alone:
                    memory = pack.pop().detach().view(-1).view(torch.uint8)
                elif process == self.here:
                    memory = _bytes_of(pack, self.device)
                else:
                    memory = torch.empty(sum(map(_room, pack)), dtype=torch.uint8, device=self.device)
                work = cast(Any, dist).broadcast(memory, **source)
                started.append((work, memory, [] if process == self.here else pack))
        for work, memory, pack in started:
            work.wait()
            _unpack(memory, pack)


class Passing:
    """Pieces of memory on their way between processes."""

    def __init__(self, work: Any, given: Tensor, got: Tensor, wanted: Sequence[Tensor], sent: int):
        self._work = work
        self._given = given  # read until the end
        self._got = got
        self._wanted = wanted
        self._sent = sent

    def end(self) -> int:
        """Wait for all pieces, and put them where they belong. Returns how many bytes this process sends."""
        self._work.wait()
        _unpack(self._got, self._wanted)
        return self._sent


def _packs(pieces: Iterable[Tensor]) -> list[list[Tensor]]:
    """Which pieces are sent together."""
    found: list[list[Tensor]] = []
    small: list[Tensor] = []
    for x in pieces:
        if _room(x) >= PACKED:
            found.append([x])
            continue
        if sum(map(_room, small)) + _room(x) > PACK:
            found.append(small)
            small = []
        small.append(x)
    return [*found, small] if small else found


def _unpack(memory: Tensor, pieces: Iterable[Tensor]) -> None:
    """Put what has come into the pieces that it belongs to."""
    first = 0
    for x in pieces:
        count = x.numel() * x.element_size()
        x.copy_(memory[first : first + count].view(x.dtype).view(x.shape))
        first += _room(x)


def _index(device: str) -> tuple[int, ...]:
    module: Any = getattr(torch, device, None)
    return () if device == "cpu" or module is None else (module.current_device(),)


def _room(x: Tensor) -> int:
    size = x.numel() * x.element_size()
    return size + -size % ALIGNED


def _bytes_of(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    found: list[Tensor] = []
    for x in pieces:
        flat = x.detach().to(device).contiguous().reshape(-1).view(torch.uint8)
        found += [flat, flat.new_zeros(-len(flat) % ALIGNED)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.uint8, device=device)


def arranged(param: Any, gradient: Any) -> Any:
    """The gradient with the placements of its parameter: what lies elsewhere is brought here."""
    if not (parts.sharded(param) and parts.sharded(gradient)) or gradient._spec is param._spec:
        return gradient
    if gradient.placements == param.placements and gradient.device_mesh == param.device_mesh:
        return gradient
    return gradient.redistribute(param.device_mesh, param.placements)


def elements(tensor: Any) -> Any:
    """The elements of a tensor that are here; of a DTensor whose parts are still to be added, added."""
    if parts.sharded(tensor) and any(x.is_partial() for x in tensor.placements):
        from torch.distributed.tensor import Replicate

        placements = [Replicate() if x.is_partial() else x for x in tensor.placements]
        tensor = tensor.redistribute(placements=placements)
    return parts.local(tensor)


def agreed(meshes: Iterable[Any], own: bool) -> bool:
    """Whether all processes of these meshes say yes."""
    different = {id(mesh): mesh for mesh in meshes}.values()
    together = {ranks_of(mesh): mesh for mesh in different if mesh.mesh.numel() > 1}
    # The smaller ones first: what they find goes into what the larger ones are told.
    for ranks in sorted(together, key=len):
        no = torch.tensor([float(not own)])
        own = not Processes(together[ranks]).largest(no).item()
    return own


class Sums:
    """The sums over several parameters of one step, taken over all processes.

    who: the optimizer, for messages. words: what is asked for in the step, by key, in an order that all
    processes know; what has no word is only waited for. waits: whether processes wait at the end, too. then: by
    key, what all processes do together as soon as that sum is known.
    """

    def __init__(
        self,
        who: str,
        processes: Processes,
        words: Mapping[Any, str],
        waits: bool,
        then: Mapping[Any, Callable[[], None]] | None = None,
    ):
        self._who = who
        self._processes = processes
        self._left = dict(words)
        self._waits = waits
        self._then = then or {}
        self._mine: dict[Any, Partial] = {}
        self._given = -1

    @property
    def keys(self) -> list[Any]:
        """Which sums are not known yet."""
        return list(self._left)

    def known(self, complete: Mapping[Any, Sequence[Partial]]) -> dict[Any, float]:
        """Which sums are known now that every process has given what is complete in it.

        Raises: RuntimeError if another process has failed.
        """
        for key, shares in complete.items():
            word = self._left[key]
            self._mine[key] = sums.together(word, shares) if word else Partial(Sum(), 0)
        rows = torch.tensor([list(self._row(key)) for key in self._left], dtype=torch.int64)
        given, added = self._round(rows)
        peaks = self._peaks()
        if given == self._given:
            raise AssertionError("the processes wait for each other's sums")
        self._given = given
        found: dict[Any, float] = {}
        for (key, word), row in zip(list(self._left.items()), added, strict=True):
            if row[-1] == len(self._processes):
                del self._left[key]
                self._mine.pop(key, None)
                found[key] = self._finished(word, row, peaks.get(key, 0.0))
                self._given = -1
        for key in found:
            if key in self._then:
                self._do(self._then[key])
        return found

    def _do(self, together: Callable[[], None]) -> None:
        try:
            with others_wait():
                together()
        except Exception:
            self._left, self._waits = {}, False
            raise

    def end(self) -> None:
        """Wait until all processes have run all their parts. Raises: RuntimeError if another one has failed."""
        if self._waits:
            self._waits = False
            self._round(torch.empty(0, 0, dtype=torch.int64))

    def fail(self) -> None:
        """Tell the others that this process has failed, if they wait for it."""
        if self._left or self._waits:
            rows = torch.zeros(len(self._left), _WIDTH if self._left else 0, dtype=torch.int64)
            self._left, self._waits = {}, False
            self._round(rows, failed=True)

    def _round(self, rows: Tensor, failed: bool = False) -> tuple[int, list[list[int]]]:
        """Add what all processes give: how many shares, and the rows."""
        flags = torch.tensor([int(failed), len(self._mine)])
        added = self._processes.added(torch.cat((rows.flatten(), flags)))
        failures, given = _listed(added[-2:])
        if failures and not failed:
            self._left, self._waits = {}, False
            raise process_errors.failed_elsewhere(self._who)
        return given, _listed(added[:-2].view(rows.shape))

    def _row(self, key: Any) -> list[int]:
        """What this process gives: limbs and counts, how many elements, and whether it has given its share."""
        share = self._mine.get(key)
        total = share.value if share is not None and isinstance(share.value, Sum) else Sum()
        return [*_limbs(total), share.elements if share else 0, int(share is not None)]

    def _peaks(self) -> dict[Any, float]:
        """The largest of what all processes have given to sums that are none."""
        keys = [key for key, word in self._left.items() if word == "largest"]
        if not keys:
            return {}
        own = [cast(float, self._mine[key].value) if key in self._mine else -torch.inf for key in keys]
        # A NaN need not be the largest for every backend.
        undefined = [float(x != x) for x in own]
        numbers = torch.tensor([-torch.inf if x != x else x for x in own] + undefined, dtype=torch.float64)
        values, nans = _listed(self._processes.largest(numbers).view(2, -1))
        return {k: torch.nan if bad else x for k, x, bad in zip(keys, values, nans, strict=True)}

    def _finished(self, word: str, row: Sequence[int], peak: float) -> float:
        if word == "largest":
            return peak
        limbs, elements = row[: exact.DOUBLE.width], row[-2]
        return sums.finished(word, [Partial(exact.from_limbs(limbs), elements)]) if word else 0.0


def _listed(x: Tensor) -> list[Any]:
    return cast(Any, x).tolist()


def _limbs(total: Sum) -> Iterable[int]:
    """A sum in limbs of 32 bits, so that very many can be added; the last one has what is left."""
    units, sign, last = abs(total.units), -1 if total.units < 0 else 1, exact.DOUBLE.limbs - 1
    limbs = (units >> 32 * i & LIMB if i < last else units >> 32 * i for i in range(last + 1))
    return (*(sign * limb for limb in limbs), *total[1:])
