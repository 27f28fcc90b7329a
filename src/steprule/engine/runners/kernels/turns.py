"""How a kernel goes through a row: again for every sum over the row that other values of the row depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from steprule.engine.program.program import Instruction, Pass, Program, Reduction, Register


@dataclass(frozen=True)
class Turn:
    """Arithmetic on the values of a row, and then one loop over its elements.

    rows: the arithmetic. inputs, columns, instructions: what the loop loads and computes for each element.
    row_sums, reductions, column_sums: what it adds up; reductions with their places among those of the pass.
    outputs: what it stores.
    """

    rows: tuple[Instruction, ...]
    inputs: dict[str, Register]
    columns: tuple[Register, ...]
    instructions: tuple[Instruction, ...]
    row_sums: tuple[Reduction, ...]
    reductions: tuple[tuple[int, Reduction], ...]
    column_sums: tuple[Reduction, ...]
    outputs: dict[str, Register]

    @property
    def loops(self) -> bool:
        """Whether there is anything to do for each element."""
        return bool(self.row_sums or self.reductions or self.column_sums or self.outputs)


def turns_of(sweep: Pass) -> list[Turn]:
    """The turns of a pass over each row; the last has no loop if only values of rows are left to compute."""
    number = _numbers(sweep)
    outputs = {x: r for x, r in sweep.outputs.items() if r.level == "element"}
    ending = [(i, x) for i, x in enumerate(sweep.reductions) if x.operand.level == "element"]
    asked = [*outputs.values(), *(x.operand for _, x in ending)]
    asked += [x.operand for x in (*sweep.row_sums, *sweep.column_sums)]
    # Everything is stored in the last loop, since others read what it replaces.
    last = max((number[x] for x in asked), default=0)
    turns = [
        _turn(
            sweep,
            tuple(x for x in sweep.instructions if x.out.level == "row" and number[x.out] == turn),
            tuple(x for x in sweep.row_sums if number[x.operand] == turn),
            tuple((i, x) for i, x in ending if number[x.operand] == turn),
            tuple(x for x in sweep.column_sums if number[x.operand] == turn),
            outputs if turn == last else {},
        )
        for turn in range(max([last, *number.values()]) + 1)
    ]
    return turns


def _numbers(sweep: Pass) -> dict[Register, int]:
    """For every register, how many loops over the row must be over before it can be computed."""
    known = [*sweep.inputs.values(), *sweep.columns, *(x.out for x in sweep.known_rows if x.out is not None)]
    number = dict.fromkeys(known, 0)
    steps = [*sweep.instructions, *sweep.row_sums]
    for step in sorted(steps, key=lambda x: x.out.index if x.out is not None else -1):
        if step.out is not None:
            below = max((number[x] for x in step.reads), default=0)
            number[step.out] = below + isinstance(step, Reduction)
    return number


def _turn(
    sweep: Pass,
    rows: tuple[Instruction, ...],
    row_sums: tuple[Reduction, ...],
    reductions: tuple[tuple[int, Reduction], ...],
    column_sums: tuple[Reduction, ...],
    outputs: dict[str, Register],
) -> Turn:
    needed = {*outputs.values(), *(x.operand for _, x in reductions)}
    needed |= {x.operand for x in (*row_sums, *column_sums)}
    body: list[Instruction] = []
    for step in reversed(sweep.instructions):
        if step.out.level == "element" and step.out in needed:
            body.append(step)
            needed.update(step.reads)
    inputs = {x: r for x, r in sweep.inputs.items() if r in needed and r.level == "element"}
    columns = tuple(x for x in sweep.columns if x in needed)
    return Turn(rows, inputs, columns, tuple(body[::-1]), row_sums, reductions, column_sums, outputs)


def kept_rows(program: Program) -> list[Reduction]:
    """The sums over rows that one sweep keeps for another."""
    return [x for sweep in program.passes for x in sweep.kept_rows]


def line_arrays(program: Program) -> list[str]:
    """The names of what kernels keep of rows and columns during a step, in the order of their addresses."""
    names = [f"rows{x.index}" for x in kept_rows(program)]
    names += [f"sums{x.index}" for x in program.column_sums]
    return [*names, *(f"values{x.index}" for x in program.column_values)]


def in_blocks(program: Program, names: Iterable[str]) -> bool:
    """Whether any of these is the parameter or a slot per element."""
    return any(name == "p" or program.slots[name].per == "element" for name in names)
