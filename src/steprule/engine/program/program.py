"""A traced step: straight lists of words, and how they are cut into sweeps over memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from torch import Tensor

from steprule.engine.fields import Slot
from steprule.whole import MatrixWord

# The words for random numbers, which are told which draw of the step they are.
DRAWS = ("gaussian", "coin")


@dataclass(frozen=True)
class Register:
    """The result of an instruction, or an input.

    mask: it is a comparison, which counts as 1 or 0. level: whether there is one per element, row or column.
    """

    index: int
    mask: bool = False
    level: str = "element"

    def __str__(self) -> str:
        return f"{'k' if self.mask else 'r'}{self.index}"


@dataclass(frozen=True)
class Scalar:
    """One entry of the vector that all of `Program.scalars` return together."""

    index: int

    def __str__(self) -> str:
        return f"c{self.index}"


Operand = Register | Scalar | float


class _WithOperands:
    """What both kinds of instruction know of their operands."""

    operands: tuple[Any, ...]

    @property
    def reads(self) -> tuple[Register, ...]:
        """The registers among its operands."""
        return tuple(x for x in self.operands if isinstance(x, Register))

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """The scalars among its operands, those in tuples included."""
        return tuple(x for x in _flat(self.operands) if isinstance(x, Scalar))


@dataclass(frozen=True)
class Instruction(_WithOperands):
    """`out = word(operands)`."""

    word: str
    operands: tuple[Operand, ...]
    out: Register

    @property
    def draw(self) -> int | None:
        """For a random number, which draw of the step it is."""
        return int(cast(float, self.operands[0])) if self.word in DRAWS else None

    def __str__(self) -> str:
        lined = "" if self.out.level == "element" else f" per {self.out.level}"
        return f"{self.out} = {self.word}({', '.join(map(str, self.operands))}){lined}"


@dataclass(frozen=True)
class WholeInstruction(_WithOperands):
    """`out = word(operands)` on whole matrices; operands that are no registers may be of any kind."""

    word: MatrixWord
    operands: tuple[Any, ...]
    out: Register

    def renumbered(self, places: Mapping[Scalar, Scalar]) -> WholeInstruction:
        """The same with the scalars in other places."""
        return replace(self, operands=_replaced(self.operands, places))

    def __str__(self) -> str:
        return f"{self.out} = {self.word.name}({', '.join(map(str, self.operands))}) of whole matrices"


def _flat(operands: Iterable[Any]) -> Iterable[Any]:
    for x in operands:
        yield from _flat(cast("tuple[Any, ...]", x)) if isinstance(x, tuple) else (x,)


def _replaced(operands: tuple[Any, ...], places: Mapping[Scalar, Any]) -> tuple[Any, ...]:
    return tuple(
        _replaced(cast("tuple[Any, ...]", x), places)
        if isinstance(x, tuple)
        else places.get(x, x)
        if isinstance(x, Scalar)
        else x
        for x in operands
    )


@dataclass(frozen=True)
class Reduction:
    """`r[index] = word(operand)`, over all elements of a tensor, a group, or the optimizer.

    Or `out = word(operand)` for each row or column; over the rows of what is one per column, or the columns of
    what is one per row, it is a plain number again. key: what says that reductions of several groups are one
    and the same, if it goes over tensors.
    """

    index: int
    word: str
    operand: Register
    over: str
    key: tuple[str, int]
    out: Register | None = None

    @property
    def shared(self) -> bool:
        """Whether it goes over more than one tensor."""
        return self.over in ("group", "all")

    @property
    def reads(self) -> tuple[Register, ...]:
        """Its operand."""
        return (self.operand,)

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """None."""
        return ()

    def __str__(self) -> str:
        name = f"r[{self.index}]" if self.out is None else str(self.out)
        return f"{name} = {self.word}({self.operand}) over {self.over}"


@dataclass(frozen=True)
class Pass:
    """One sweep over memory: what it loads, computes, and then stores or reduces.

    columns: the values per column that it reads. row_sums: the reductions that are finished row by row, within
    the sweep; known_rows: those that an earlier sweep has kept, and kept_rows: those that it keeps itself.
    column_sums: the reductions whose columns are finished after the sweep.
    """

    inputs: dict[str, Register]
    instructions: tuple[Instruction, ...]
    outputs: dict[str, Register]
    reductions: tuple[Reduction, ...]
    columns: tuple[Register, ...] = ()
    row_sums: tuple[Reduction, ...] = ()
    known_rows: tuple[Reduction, ...] = ()
    kept_rows: tuple[Reduction, ...] = ()
    column_sums: tuple[Reduction, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do: it only stands for the time that columns or plain numbers take."""
        return not (self.outputs or self.reductions or self.row_sums or self.column_sums)


@dataclass(frozen=True)
class Columns:
    """What is computed for each column before a sweep, or after the last one.

    values: what sweeps read of it. sums: the column sums that it reads. reductions: over all columns.
    """

    inputs: dict[str, Register]
    sums: tuple[Reduction, ...]
    instructions: tuple[Instruction, ...]
    values: tuple[Register, ...]
    outputs: dict[str, Register]
    reductions: tuple[Reduction, ...]


Step = Instruction | WholeInstruction | Reduction


@dataclass(frozen=True)
class Matrices:
    """What a program does with whole matrices, besides its sweeps over elements.

    slots: those that have no value per element, by letter; inputs, outputs: their registers before and after
    the step. instructions: words on whole matrices.
    """

    slots: dict[str, Slot]
    inputs: dict[str, Register]
    outputs: dict[str, Register]
    instructions: tuple[WholeInstruction, ...]

    def renumbered(self, places: Mapping[Scalar, Scalar]) -> Matrices:
        """The same with the scalars in other places."""
        return replace(self, instructions=tuple(x.renumbered(places) for x in self.instructions))


@dataclass(frozen=True)
class Decision:
    """A condition on plain numbers that decides between two programs, before a step.

    function: of (h, t, n), as the first of `Program.scalars`. facts: as in Program. holds, fails: the programs,
    which may have to be decided between, too.
    """

    source: str
    facts: tuple[str, ...]
    holds: Program
    fails: Program
    function: Callable[..., bool] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Stage:
    """What is done with whole matrices before a sweep.

    takes: the values per element that it reads, of earlier sweeps or the gradient. slots: the slots that it
    reads, by letter. steps: what it does, in order. gives: the values per element that sweeps read.
    """

    takes: dict[str, Register]
    slots: dict[str, Register]
    steps: tuple[Step, ...]
    gives: dict[str, Register]


@dataclass(frozen=True)
class Scalars:
    """Arithmetic on plain numbers, before a sweep.

    first, count: which of the program's scalars it computes. slots: the letters of the coarse slots that get
    their new values here. function: of (h, t, n), the hyper-parameters, the step and the coarse slots, in the
    first; of (c, r), what the first one hands on and the finished reductions, in the others. It returns the
    scalars, the slots' values and, in the first, what is handed on.
    """

    source: str
    first: int
    count: int
    slots: tuple[str, ...]
    function: Callable[..., tuple[Any, ...]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Program:
    """A traced step. `inputs` and `outputs` are keyed 'p', 'g' and by slot letter."""

    rule: str
    inputs: dict[str, Register]
    instructions: tuple[Instruction, ...]
    outputs: dict[str, Register]
    slots: dict[str, Slot]
    scalar_slots: dict[str, Slot]
    reductions: tuple[Reduction, ...]
    calls: tuple[Reduction, ...]
    scalars: tuple[Scalars, ...]
    # Whether it is a step; an estimate of the curvature is none, and leaves the parameter alone.
    counts: bool = True
    # The hyper-parameters that slots for all parameters are made of, so that all groups must agree on them.
    common: frozenset[str] = frozenset()
    # The keys under which scalars find the size of a tensor and its numbers of rows and columns, if they ask.
    facts: tuple[str, ...] = ()
    # Whether more than two dimensions are a stack of matrices.
    stacked: bool = False
    # The program of vectors and single numbers, if it is another one.
    of_vectors: Program | None = None
    # What it does with whole matrices, if it is the program of a rule on them.
    matrices: Matrices | None = None
    # Whether vectors have no program, since its rule only says what matrices do.
    only_matrices: bool = False
    # What decides between it and another program for the same kind of parameter, if anything does.
    decision: Decision | None = None

    def __str__(self) -> str:
        inputs, outputs = self.inputs, self.outputs
        if self.matrices is not None:
            inputs, outputs = inputs | self.matrices.inputs, outputs | self.matrices.outputs
        lines = [f"{self.rule}: " + ", ".join(f"{r} = {n}{_per(r)}" for n, r in inputs.items())]
        lines += [f"    {line}" for line in self.scalars[0].source.splitlines()]
        lines += [f"    {step}" for step in self._made]
        lines += [f"    {reduction}" for reduction in self.reductions if reduction.out is None]
        for later in self.scalars[1:]:
            lines += [f"    {line}" for line in later.source.splitlines()]
        lines += [f"    {name} <- {register}" for name, register in outputs.items()]
        return "\n".join(lines)

    def of(self, param: Tensor) -> Program:
        """The program of this parameter."""
        return self if self.of_vectors is None or param.dim() > 1 else self.of_vectors

    @property
    def kinds(self) -> tuple[Program, ...]:
        """The programs of matrices and of vectors, however they are decided: one, if they are the same."""
        return self.choices if self.of_vectors is None else (*self.choices, *self.of_vectors.kinds)

    @property
    def choices(self) -> tuple[Program, ...]:
        """The programs between which a decision decides for parameters of the same kind; itself without one."""
        return (
            (self,) if self.decision is None else (*self.decision.holds.choices, *self.decision.fails.choices)
        )

    @property
    def all_slots(self) -> dict[str, Slot]:
        """The slots with elements, and those that have one per row, column or pair, by letter."""
        return self.slots | (self.matrices.slots if self.matrices is not None else {})

    @property
    def written(self) -> set[str]:
        """What a step writes: 'p' and the letters of slots with elements."""
        return {*self.outputs, *(self.matrices.outputs if self.matrices is not None else ())}

    @property
    def may_raise(self) -> bool:
        """Whether a word on whole matrices may raise in the middle of a step."""
        return self.matrices is not None and any(not x.word.never_raises for x in self.matrices.instructions)

    @property
    def needs_matrices(self) -> bool:
        """Whether it is for parameters of two dimensions and more only."""
        own = self.matrices is not None and (self.matrices.instructions or self.matrices.slots)
        return self.only_matrices or bool(own)

    @property
    def scalar_count(self) -> int:
        """How many scalars there are, of all stages."""
        return self.scalars[-1].first + self.scalars[-1].count

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return any(x.draw is not None for x in self.instructions)

    @property
    def shares(self) -> bool:
        """Whether anything is taken over more than one tensor."""
        return any(x.shared for x in self.reductions)

    @cached_property
    def gradient_norm(self) -> Reduction | None:
        """The norm of all gradients, if the first sweep takes it: it is finite only if all of them are."""
        gradient = self.inputs["g"]
        negated = [x.out for x in self.instructions if x.word == "neg" and x.operands == (gradient,)]
        for x in self.passes[0].reductions:
            if x.word == "norm" and x.over == "all" and x.operand in (gradient, *negated):
                others = [y for y in self.kinds if y is not self and y.decision is None]
                return x if all(_norm_of(y) is not None for y in others) else None
        return None

    @cached_property
    def lined(self) -> bool:
        """Whether its sweeps have values per row or column."""
        if self.matrices is not None:
            return False
        found = [*self.inputs.values(), *(x.out for x in self.reductions if x.out is not None)]
        return any(x.level != "element" for x in found)

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The sweeps over memory, in order; only the last one stores. One, if nothing is reduced."""
        sweeps: list[Pass] = []
        known: list[Reduction] = []
        for number in range(self._sweeps):
            reductions = tuple(x for x in self._ending if self._stage[x.operand.index] == number)
            outputs = {x: r for x, r in self.outputs.items() if r.level != "column"}
            outputs = outputs if number == self._sweeps - 1 else {}
            outputs = {name_of(r): r for r in self._kept if self._stage[r.index] == number} | outputs
            sweeps.append(self._sweep(outputs, reductions, known))
            known += sweeps[-1].row_sums
        later = [{x.index for sweep in sweeps[n + 1 :] for x in sweep.known_rows} for n in range(len(sweeps))]
        return tuple(_keeping(sweep, indices) for sweep, indices in zip(sweeps, later, strict=True))

    @cached_property
    def columns(self) -> tuple[Columns | None, ...]:
        """What is computed per column before each sweep and after the last one; None where that is nothing."""
        read = {x for sweep in self.passes for x in sweep.columns}
        last = {x: r for x, r in self.outputs.items() if r.level == "column"}
        reductions = [x for x in self.reductions if x.out is None and x.operand.level == "column"]
        wanted = [*read, *last.values(), *(x.operand for x in reductions)]
        stages = [self._stage[x.index] for x in wanted]
        parts: list[Columns | None] = []
        for number in range(max([*stages, -1]) + 1):
            own = tuple(sorted((x for x in read if self._stage[x.index] == number), key=lambda x: x.index))
            ending = tuple(x for x in reductions if self._stage[x.operand.index] == number)
            # Slots are stored by the last part, so that no other finds them changed.
            outputs = last if number == max(stages) else {}
            asked = own or ending or outputs
            parts.append(self._columns(own, outputs, ending) if asked else None)
        return tuple(parts)

    @property
    def column_values(self) -> tuple[Register, ...]:
        """All values per column that sweeps read."""
        return tuple(x for part in self.columns if part is not None for x in part.values)

    @property
    def column_sums(self) -> tuple[Reduction, ...]:
        """All reductions to one value per column."""
        return tuple(x for sweep in self.passes for x in sweep.column_sums)

    @cached_property
    def _made(self) -> list[Step]:
        """Instructions and the reductions that fill registers, in order."""
        filling = [x for x in self.reductions if x.out is not None]
        whole = self.matrices.instructions if self.matrices is not None else ()
        return sorted([*self.instructions, *whole, *filling], key=_place)

    @cached_property
    def _stage(self) -> dict[int, int]:
        """For every register, how many sweeps must be finished before it can be computed."""
        of_scalar = [number for number, x in enumerate(self.scalars) for _ in range(x.count)]
        stage = {register.index: 0 for register in self.inputs.values()}
        stage |= {register.index: 0 for register in self._whole}
        for step in self._made:
            below = [stage[x.index] for x in step.reads]
            if step.out in self._whole:
                below = [stage[x.index] + (x in self._kept) for x in step.reads]
            elif isinstance(step, Reduction):
                below = [below[0] + (step.over == "column")]
            below += [of_scalar[x.index] for x in step.scalars]
            stage[_place(step)] = max(below, default=0)
        return stage

    @cached_property
    def _whole(self) -> frozenset[Register]:
        """The values that are computed with whole matrices, and the slots that only those read.

        What is not per element, what is made of it, and of the rest what is made only of such values and
        goes into another one.
        """
        if self.matrices is None:
            return frozenset()
        found = set(self.matrices.inputs.values())
        for step in self._made:
            if not isinstance(step, Instruction) or {x.level for x in (step.out, *step.reads)} != {"element"}:
                found.add(cast(Register, step.out))
        made_of_them = set(found)
        for step in self._made:
            if step.reads and made_of_them.issuperset(step.reads):
                made_of_them.add(cast(Register, step.out))
        wanted = {x for step in self._made if step.out in found for x in step.reads}
        for step in reversed(self._made):
            if step.out in wanted & made_of_them:
                found.add(step.out)
                wanted.update(step.reads)
        return frozenset(found)

    @cached_property
    def _kept(self) -> tuple[Register, ...]:
        """The values of sweeps that are kept for words on whole matrices; the gradient is read where it is."""
        read = {x for step in self._made if step.out in self._whole for x in step.reads}
        read -= {*self._whole, self.inputs["g"]}
        return tuple(sorted(read, key=lambda x: x.index))

    @cached_property
    def stages(self) -> tuple[Stage | None, ...]:
        """What is done with whole matrices before each sweep."""
        if self.matrices is None:
            return ()
        steps = [x for x in self._made if x.out in self._whole]
        asked = {x for sweep in self.passes for x in sweep.inputs.values() if x in self._whole}
        found: list[Stage | None] = []
        for number in range(max([self._stage[_place(x)] for x in steps], default=-1) + 1):
            own = tuple(x for x in steps if self._stage[_place(x)] == number)
            read = {x for step in own for x in step.reads}
            takes = {"g": self.inputs["g"]} if self.inputs["g"] in read else {}
            takes |= {name_of(x): x for x in self._kept if x in read}
            slots = {name: x for name, x in self.matrices.inputs.items() if x in read}
            gives = {name_of(x): x for x in (step.out for step in own) if x in asked}
            found.append(Stage(takes, slots, own, gives) if own else None)
        return tuple(found)

    @cached_property
    def _ending(self) -> list[Reduction]:
        """The reductions that are finished when a sweep is over."""
        if self.matrices is not None:
            return [x for x in self.reductions if x.out is None]
        return [x for x in self.reductions if x.operand.level != "column" and not _within_row(x)]

    @cached_property
    def _sweeps(self) -> int:
        """How many sweeps there are: the last one, which stores, comes after all words on whole matrices."""
        last = [*(r for r in self.outputs.values() if r.level != "column"), *self._kept, *self._whole]
        return 1 + max((self._stage[x.index] for x in (*last, *(x.operand for x in self._ending))), default=0)

    def _sweep(
        self, outputs: dict[str, Register], reductions: tuple[Reduction, ...], known: Collection[Reduction]
    ) -> Pass:
        """What is needed to store and reduce this, with the row sums that are known."""
        wanted = [*outputs.values(), *(x.operand for x in reductions)]
        stops = {*(x.out for x in known), *self._whole}
        body, sums, needed = self._behind(wanted, lambda x: x.level == "column" or x in stops)
        inputs = {name: r for name, r in self.inputs.items() if r in needed and r.level != "column"}
        return Pass(
            inputs | {name_of(r): r for r in sorted(self._whole & needed, key=lambda x: x.index)},
            tuple(body),
            outputs,
            tuple(x for x in reductions if x.out is None),
            columns=tuple(sorted((x for x in needed if x.level == "column"), key=lambda x: x.index)),
            row_sums=tuple(sums),
            known_rows=tuple(x for x in known if x.out in needed),
            column_sums=tuple(x for x in reductions if x.out is not None),
        )

    def _columns(
        self, values: tuple[Register, ...], outputs: dict[str, Register], reductions: tuple[Reduction, ...]
    ) -> Columns:
        wanted = [*values, *outputs.values(), *(x.operand for x in reductions)]
        sums = {x.out: x for x in self.reductions if x.over == "column" and x.out is not None}
        body, _, needed = self._behind(wanted, lambda x: x in sums)
        return Columns(
            {name: r for name, r in self.inputs.items() if r in needed},
            tuple(x for out, x in sums.items() if out in needed),
            tuple(body),
            values,
            outputs,
            reductions,
        )

    def _behind(
        self, wanted: Iterable[Register], stops: Callable[[Register], bool]
    ) -> tuple[list[Instruction], list[Reduction], set[Register]]:
        """The instructions and row sums that these registers depend on, and all registers in them."""
        needed = set(wanted)
        body: list[Instruction] = []
        sums: list[Reduction] = []
        for step in reversed(self._made):
            if step.out is not None and step.out in needed and not stops(step.out):
                needed.update(step.reads)
                if isinstance(step, Instruction):
                    body.append(step)
                elif isinstance(step, Reduction):
                    sums.append(step)
        return body[::-1], sums[::-1], needed


def _per(register: Register) -> str:
    return "" if register.level == "element" else f" per {register.level}"


def _norm_of(program: Program) -> Reduction | None:
    return program.gradient_norm


def name_of(register: Register) -> str:
    """What an array is called that goes from a sweep to words on whole matrices, or back."""
    return f"x{register.index}"


def _place(step: Step) -> int:
    return step.out.index if step.out is not None else -1


def _within_row(reduction: Reduction) -> bool:
    """Whether it is finished within each row."""
    return reduction.over == "row" and reduction.out is not None


def _keeping(sweep: Pass, later: Collection[int]) -> Pass:
    """The same sweep, with those of its row sums kept that later ones read."""
    kept = tuple(x for x in sweep.row_sums if x.index in later)
    return replace(sweep, kept_rows=kept) if kept else sweep


def live(made: Sequence[Step], wanted: Iterable[Register]) -> tuple[list[Step], set[Scalar]]:
    """What these registers depend on, and the scalars in it."""
    needed = {register.index for register in wanted}
    kept: list[Step] = []
    scalars: set[Scalar] = set()
    for step in reversed(made):
        if _place(step) in needed:
            kept.append(step)
            needed |= {x.index for x in step.reads}
            scalars |= set(step.scalars)
    return kept[::-1], scalars
