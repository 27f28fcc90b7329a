"""A program over lists of tensors: one `torch._foreach_*` call per word, for many tensors at once.

Tensors are processed in buckets whose temporaries stay below `BUCKET_BYTES`; a large tensor is cut into views.
Within a bucket, a temporary is reused as soon as nothing needs it any more. The results equal the reference's
bit for bit: the words are the same ATen operations on the same values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from steprule.engine import draws, lines, storage, views
from steprule.engine.program import decisions, phases, sums
from steprule.engine.program.phases import Going, Part
from steprule.engine.program.program import Instruction, Pass, Program, Reduction, Register, Scalar, Scalars
from steprule.engine.program.sums import Partial
from steprule.engine.runners import reference
from steprule.engine.runners.eager import Eager, in_range
from steprule.engine.runners.reference import Work, compute_dtype, real
from steprule.engine.sharding.parts import region_in, shape_of
from steprule.plain import Double

BUCKET_BYTES = 64 * 2**20

Tensors = list[Tensor]
UNARY = ("neg", "abs", "sqrt", "sign", "exp", "log", "reciprocal")
BINARY = {
    "shift": "add",
    "scale": "mul",
    "divide": "div",
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "div": "div",
    "lerp": "lerp",
    "add_scaled": "add",
    "addcmul": "addcmul",
}


def _listed(word: str, in_place: bool) -> Callable[..., Any] | None:
    """torch's function for a word on lists of tensors, or None if there is none."""
    name = word if word in UNARY else BINARY.get(word)
    if name is None:
        return None
    call: Callable[..., Any] = getattr(torch, f"_foreach_{name}{'_' if in_place else ''}")
    keyword = {"add_scaled": "alpha", "addcmul": "value"}.get(word)
    if keyword is None:
        return call

    def with_scale(*operands: Any) -> Any:
        return call(*operands[:-1], **{keyword: operands[-1]})

    return with_scale


LISTS = {word: _listed(word, in_place=False) for word in (*UNARY, *BINARY)}
IN_PLACE = {word: _listed(word, in_place=True) for word in (*UNARY, *BINARY)}
_copy: Callable[[Tensors, Tensors], None] = getattr(torch, "_foreach_copy_")  # noqa: B009


def _sweep(
    program: Program,
    number: int,
    scalars: Sequence[Any],
    columns: dict[str, Tensors],
    dtype: torch.dtype,
) -> list[tuple[Reduction, list[Partial]]]:
    """One sweep over tensors. `columns` holds a list for 'p', 'g' and every slot.

    scalars: floats, or lists with one of each tensor. Returns what each reduction came to over each tensor.
    """
    sweep = program.passes[number]
    live = most_alive(program, [name for name, column in columns.items() if column[0].dtype != dtype])
    found: list[tuple[Reduction, list[Partial]]] = [(x, []) for x in sweep.reductions]
    whole = bool(sweep.reductions) or program.draws or any(isinstance(x, list) for x in scalars)
    first = 0
    for bucket in _buckets(columns, live, dtype, cut=not whole):
        count = len(bucket["p"])
        own: list[Any] = [x[first : first + count] if type(x) is list else x for x in scalars]
        first += count
        for (_, partials), new in zip(found, _run_bucket(program, sweep, own, bucket, dtype), strict=True):
            partials += new
    return found


def _run_bucket(
    program: Program, sweep: Pass, scalars: Sequence[Any], columns: dict[str, Tensors], dtype: torch.dtype
) -> list[list[Partial]]:
    machine = Eager(program.rule, dtype)
    values: dict[int, Tensors] = {}
    owned: set[int] = set()
    goal = {register.index: name for name, register in sweep.outputs.items()}
    home: dict[int, str] = {}
    for name, register in sweep.inputs.items():
        stored = columns[name]
        # Bind no variable to a converted copy: that would keep it in memory to the end.
        values[register.index] = stored if stored[0].dtype == dtype else [x.to(dtype) for x in stored]
        if values[register.index] is not stored:
            owned.add(register.index)
        elif name != "g":
            home[register.index] = name
    for step, dying in zip(sweep.instructions, _deaths(sweep), strict=True):
        first = step.operands[0]
        index = first.index if isinstance(first, Register) else -1
        # In place: on a temporary that is not needed any more, or on a slot that this word replaces.
        mine = index in owned or (index in home and goal.get(step.out.index) == home[index])
        reuse = mine and index in dying and step.word in IN_PLACE and _fits(step, first, scalars)
        values[step.out.index] = (
            _carry_out(machine, step, values, scalars, reuse)
            if step.draw is None
            else _drawn(step.word, step.draw, columns, dtype)
        )
        if reuse and index in home:
            home[step.out.index] = home[index]
        else:
            owned.add(step.out.index)
        for dead in dying - {step.out.index}:
            values.pop(dead, None)
    partials = [
        sums.partials(x.word, [machine.counted(value) for value in values[x.operand.index]])
        for x in sweep.reductions
    ]
    _store(sweep, columns, values, home)
    return partials


def _store(sweep: Pass, columns: dict[str, Tensors], values: dict[int, Tensors], home: dict[int, str]) -> None:
    """Copy every result to where it belongs, unless it was computed there."""
    moved = {name: r.index for name, r in sweep.outputs.items() if home.get(r.index) != name}
    for index in moved.values():
        # A slot gets the old value of another one, which is overwritten as well.
        if home.get(index) in moved:
            values[index] = [x.clone() for x in values[index]]
            home.pop(index)
    for name, index in moved.items():
        _copy(columns[name], values[index])


def _carry_out(
    machine: Eager,
    step: Instruction,
    values: dict[int, Tensors],
    scalars: Sequence[Any],
    reuse: bool,
) -> Tensors:
    operands: list[Any] = []
    for place, x in enumerate(step.operands):
        value: Any = scalars[x.index] if isinstance(x, Scalar) else x
        if isinstance(value, float):
            value = in_range(value, machine.dtype)
        if isinstance(x, Register):
            value = values[x.index]
            # A comparison stays boolean as a condition, and counts as 1 or 0 elsewhere.
            if x.mask and (step.word != "where" or place):
                value = [machine.counted(entry) for entry in value]
        operands.append(value)
    call = (IN_PLACE if reuse else LISTS).get(step.word)
    if call is not None and not _differ(step, scalars):
        made = call(*operands)
        return operands[0] if reuse else list(made)
    count = len(values[next(x.index for x in step.operands if isinstance(x, Register))])
    result: Tensors = []
    for i in range(count):
        row: list[Any] = [x[i] if type(x) is list else x for x in operands]
        made = machine.emit(step.word, *row)
        # A plain choice returns one of its operands: copy it, since results are later changed in place.
        result.append(made.clone() if any(made is x for x in row) else made)
    return result


def _drawn(word: str, draw: int, columns: dict[str, Tensors], dtype: torch.dtype) -> Tensors:
    """A random number for every element."""
    pairs = zip(columns["p"], columns[storage.NOISE_KEY], strict=True)
    return [draws.drawn(word, draw, int(key), like, dtype) for like, key in pairs]


def _differ(step: Instruction, scalars: Sequence[Any]) -> bool:
    """Whether each tensor has plain numbers of its own here."""
    return any(isinstance(x, Scalar) and isinstance(scalars[x.index], list) for x in step.operands)


def _fits(step: Instruction, first: Any, scalars: Sequence[Any]) -> bool:
    """Whether the result has the form of the first operand, which no other operand is."""
    if first.mask or _differ(step, scalars):
        return False
    return sum(isinstance(x, Register) and x.index == first.index for x in step.operands) == 1


def _deaths(sweep: Pass) -> list[set[int]]:
    """For every instruction, the registers that nothing after it needs."""
    alive = {register.index for register in (*sweep.outputs.values(), *(x.operand for x in sweep.reductions))}
    deaths: list[set[int]] = []
    for step in reversed(sweep.instructions):
        used = {x.index for x in step.operands if isinstance(x, Register)}
        deaths.append(used - alive)
        alive |= used
    return deaths[::-1]


def most_alive(program: Program, converted: Iterable[str] = ()) -> int:
    """The largest number of temporaries that exist at once.

    converted: the inputs that are stored in another dtype than the one computed in, so that they are copied.
    """
    return max(_most_alive(sweep, converted) for sweep in program.passes)


def _most_alive(sweep: Pass, converted: Iterable[str]) -> int:
    alive = {sweep.inputs[name].index for name in converted if name in sweep.inputs}
    inputs = {register.index for register in sweep.inputs.values()} - alive
    most = max(1, len(alive))
    for step, dying in zip(sweep.instructions, _deaths(sweep), strict=True):
        alive.add(step.out.index)
        most = max(most, len(alive - inputs))
        alive -= dying
    return most


def _buckets(
    columns: dict[str, Tensors], live: int, dtype: torch.dtype, cut: bool
) -> Iterator[dict[str, Tensors]]:
    """Rows of `columns`, a few at a time; long dense tensors are cut into views."""
    room = max(1, BUCKET_BYTES // (live * dtype.itemsize))
    bucket: defaultdict[str, Tensors] = defaultdict(list)
    filled = 0
    for row in zip(*columns.values(), strict=True):
        dense = cut and all(x.is_contiguous() and x.numel() == row[0].numel() for x in row)
        size = row[0].numel()
        pieces = [row]
        if dense and size > room:
            flat = [x.view(-1) for x in row]
            pieces = list(zip(*(x.split(room) for x in flat), strict=True))
        for piece in pieces:
            if filled and filled + piece[0].numel() > room:
                yield bucket
                bucket = defaultdict(list)
                filled = 0
            for name, tensor in zip(columns, piece, strict=True):
                bucket[name].append(tensor)
            filled += piece[0].numel()
    if bucket:
        yield bucket


def takes(work: Work) -> bool:
    """Whether torch's lists can step this parameter: gradient, memory and storage are plain."""
    param, gradient, state = work
    stored = [x for x in state.values() if isinstance(x, Tensor)]
    return (
        gradient.layout == torch.strided
        and gradient.shape == param.shape
        and not (region_in(state) is not None and storage.NOISE_KEY in state)
        and not storage.keeps_more(state)
        and not any(x.is_neg() or x.is_conj() for x in (param, *stored))
    )


def scalars_of(program: Program, group: dict[str, Any], work: Work) -> tuple[Any, Any]:
    """What a parameter's scalars depend on at its next step, and a function that computes them.

    program: the group's, which may have one of its own for vectors.
    """
    param, _, state = work
    t = reference.next_step(state)
    own = decisions.chosen(program, group, param, state, t)
    slots = own.scalar_slots.items()
    numbers = {x: group[slot.key] if slot.shared else state[slot.key].item() for x, slot in slots}
    double, parts = compute_dtype(param) == torch.float64, 1 + param.is_complex()
    shape = shape_of(param, state)
    shape = views.of(group, param).shape(shape) if own.matrices is not None else shape
    numbers |= lines.facts(shape, double, own.facts, parts)
    return (id(own), t, *numbers.values()), lambda: own.scalars[0].function(group, t, numbers)


def check_scalars(program: Program, group: dict[str, Any], work: list[Work]) -> None:
    """Have the scalars of these parameters raise now what they would raise in their step."""
    known: set[Any] = set()
    for entry in work:
        seen, scalars = scalars_of(program, group, entry)
        if seen not in known:
            scalars()
            known.add(seen)


def prepare(program: Program, group: dict[str, Any], work: list[Work], after: dict[str, float]) -> list[Part]:
    """One step of these parameters, those with equal scalars together: all but running it.

    after: gets the new values of slots that the group's parameters share.
    """
    together: dict[Any, list[Work]] = {}
    known: dict[Any, tuple[Any, ...]] = {}
    for entry in work:
        param, gradient, state = entry
        seen, scalars = scalars_of(program, group, entry)
        if seen not in known:
            known[seen] = scalars()
        dtypes = tuple(state[slot.key].dtype for slot in program.of(param).slots.values())
        together.setdefault((seen, param.dtype, param.device, gradient.dtype, dtypes), []).append(entry)
    parts: list[Part] = []
    for seen, entries in together.items():
        own = program.of(entries[0][0])
        batch = _Batch(own, entries, known[seen[0]], after)
        parts.append(Part(partial(batch.start, group), phases.stages_of(own, group)))
    return parts


class _Batch:
    """Parameters that one call of torch steps, and what their scalars are."""

    def __init__(self, program: Program, work: list[Work], first: tuple[Any, ...], after: dict[str, float]):
        self._program = program
        self._work = work
        # Floats, also for comparisons: torch's lists take no truth for a factor.
        self._scalars: list[Any] = list(map(float, first[0]))
        self._new: dict[str, Any] = dict(zip(program.scalars[0].slots, first[1], strict=True))
        self._handed_on: Any = first[2] if len(first) > 2 else ()
        self._after = after

    def start(self, group: dict[str, Any]) -> Going | None:
        """Run the step, or return what runs it between sums over several tensors."""
        if self._program.shares:
            return self._step(group)
        for _ in self._step(group):
            raise AssertionError("no sum over several tensors was asked for")
        return None

    def _step(self, group: dict[str, Any]) -> Going:
        program = self._program
        columns = _columns(program, self._work)
        dtype = compute_dtype(self._work[0][0])
        reduced: list[dict[int, Double]] = [{} for _ in self._work]
        sweeps = len(program.passes)
        for number in range(max(sweeps, len(program.scalars))):
            if number:
                self._add_scalars(program.scalars[number], reduced)
            if number == sweeps:
                break
            found = _sweep(program, number, self._scalars, columns, dtype)
            yield from _finish(found, reduced, group)
        for row, (_, _, state) in enumerate(self._work):
            if program.counts:
                reference.count(state)
            storage.next_keys(state)
            for letter, column in self._new.items():
                value: Any = cast("list[Any]", column)[row] if isinstance(column, list) else column
                slot = program.scalar_slots[letter]
                if slot.shared:
                    self._after[slot.key] = float(value)
                else:
                    reference.put(state[slot.key], float(value))

    def _add_scalars(self, stage: Scalars, reduced: list[dict[int, Double]]) -> None:
        """The scalars that are made of finished reductions: lists, with one of each tensor."""
        rows = [stage.function(self._handed_on, own) for own in reduced]
        self._scalars += [list(map(float, column)) for column in zip(*(row[0] for row in rows), strict=True)]
        columns = [list(column) for column in zip(*(row[1] for row in rows), strict=True)]
        self._new |= dict(zip(stage.slots, columns, strict=True))


def _finish(
    found: list[tuple[Reduction, list[Partial]]], reduced: list[dict[int, Double]], group: dict[str, Any]
) -> Going:
    """Put what the reductions of a sweep came to into the tensors' rows."""
    asked: dict[Any, tuple[str, Partial]] = {}
    for reduction, partials in found:
        if not reduction.shared:
            for row, own in zip(reduced, partials, strict=True):
                row[reduction.index] = Double(sums.finished(reduction.word, [own]))
        else:
            asked[phases.key_in(group, reduction)] = reduction.word, sums.together(reduction.word, partials)
    if not asked:
        return
    known = yield asked
    for reduction, _ in found:
        if reduction.shared:
            for row in reduced:
                row[reduction.index] = Double(known[phases.key_in(group, reduction)])


def _columns(program: Program, entries: list[Work]) -> dict[str, Tensors]:
    columns = {
        "p": [real(param) for param, _, _ in entries],
        "g": [real(gradient).resolve_neg() for _, gradient, _ in entries],
    }
    if program.draws:
        columns[storage.NOISE_KEY] = [state[storage.NOISE_KEY] for _, _, state in entries]
    slots = program.slots.items()
    return columns | {x: [real(state[slot.key]) for _, _, state in entries] for x, slot in slots}
