"""Prints passes over whole rows, and what is computed for each column between them.

A value per row is a double, computed between the loops over the elements of the row. Sums of columns are kept
for each chunk, whose rows are added one after the other; between two passes they are added up, chunk by chunk,
so that the number of threads does not show. Values per column are kept as the elements read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

import torch

from steprule.engine.program.program import (
    Columns,
    Instruction,
    Operand,
    Pass,
    Program,
    Reduction,
    Register,
    Scalar,
)
from steprule.engine.runners.kernels.cpu.printer import REDUCTIONS, Printer
from steprule.engine.runners.kernels.turns import Turn, in_blocks, line_arrays, turns_of

IMPORTS = (
    "from steprule.engine.runners.kernels.cpu.line_words import *",
    "from steprule.engine.runners.kernels.cpu.words import *",
)


class _Doubles(Printer):
    """What prints words on elements, and words on doubles for rows or columns."""

    imports = IMPORTS

    def __init__(self, program: Program, sweep: Pass | Columns, dtypes: Mapping[str, torch.dtype]):
        super().__init__(program, sweep, dtypes)
        self.prefix = "in"
        self.kept = line_arrays(program)
        self._double = False

    def _names(self, place: int) -> tuple[str, str]:
        """Not those of what is kept and added of rows and columns."""
        return f"block_values{place}", f"block_sum{place}"

    def _line(self, step: Instruction) -> str:
        self._double = step.out.level == self._level
        text = super()._line(step)
        self._double = False
        return _in_double(text) if step.out.level == self._level else text

    # The level that is computed in double.
    _level = ""

    def _number(self, operand: Operand) -> str:
        if self._double and isinstance(operand, Scalar):
            return f"d{operand.index}"
        text = super()._number(operand)
        cast = isinstance(operand, Register) and operand.level == self._level and not operand.mask
        return f"number({text})" if cast and not self._double else text

    def _kept(self, name: str, kind: str, first: str) -> str:
        """The line that finds the memory of what is kept of rows or columns."""
        return f"{name} = {kind}_array(job, {len(self.arrays) + self.kept.index(name)}, tensor, {first})"

    def _stored_line(self, name: str, place: str, position: str, x: Register) -> str:
        """The line that stores an element of a slot per row or column.

        place: in the chunk. position: its block and its place there, which decide the noise.
        """
        value = f"number({x})" if not x.mask else f"where({x}, number(1.0), number(0.0))"
        if name not in self.noisy:
            return f"store(at_{name}, {place}, {value})"
        return f"store_randomly(offset(at_{name}, {place}), 0, {value}, noise_from(key_{name}, {position}))"

    def _start(self, reduction: Reduction) -> str:
        start = super()._start(reduction)
        return _in_double(start) if reduction.operand.level == self._level else start

    def _doubles(self, steps: Iterable[Instruction]) -> list[str]:
        return [f"d{index} = scalar(job, row + {index})" for index in self._scalars_of(steps)]


class LinePrinter(_Doubles):
    """Prints a pass that goes over whole rows, each of them in several turns."""

    _level = "row"

    def __init__(self, program: Program, sweep: Pass, dtypes: Mapping[str, torch.dtype]):
        super().__init__(program, sweep, dtypes)
        self.lines = sweep
        self.in_blocks = bool(self.coded or self.summed or self.draws) or in_blocks(program, self.noisy)
        self.turns = turns_of(sweep)
        self.loops = [x for x in self.turns if x.loops]

    def _body(self) -> list[str]:
        lines = ["chunk = chunk_at(job, place)"]
        lines += ["tensor, start = tensor_of(job, chunk), start_of(job, chunk)"]
        lines += ["columns = columns_of(job, tensor)", "top = start // columns"]
        lines += self._before()
        lines += [*self._in_lines(), "lines = columns // width"] if self.in_blocks else []
        row = chain.from_iterable(self._turn(turn) for turn in self.turns)
        body = ["first = line * columns", *self._rows(), *row, *self._end()]
        lines += ["for line in range(length_of(job, chunk) // columns):", *("    " + x for x in body)]
        return [*lines, *self._after()]

    def _first(self, name: str) -> str:
        slot = self.program.slots.get(name)
        return "top" if slot is not None and slot.per == "row" else super()._first(name)

    def _before(self) -> list[str]:
        lines = super()._before()
        sweep = self.lines
        lines += [self._kept(f"rows{x.index}", "float64", "top") for x in (*sweep.known_rows, *sweep.kept_rows)]
        lines += [self._kept(f"values{x.index}", self.number, "0") for x in sweep.columns]
        chunk = "(chunk - first_chunk(job, tensor)) * columns"
        for x in sweep.column_sums:
            start = _in_double(REDUCTIONS[x.word][0])
            lines += [self._kept(f"sums{x.index}", "float64", chunk)]
            lines += ["for i in range(columns):", f"    store(sums{x.index}, i, {start})"]
        count = len(self.written)
        lines += [f"buffer_{x} = scratch(job, part * {count} + {i})" for i, x in enumerate(self.written)]
        if any(x in self.program.slots and self.program.slots[x].per == "row" for x in self.noisy):
            lines += ["first_row = row_at(job, chunk)"]
        return lines

    def _scalars(self) -> list[str]:
        steps = self.sweep.instructions
        elements = [x for x in steps if x.out.level == "element"]
        lines = [f"c{index} = number(scalar(job, row + {index}))" for index in self._scalars_of(elements)]
        return lines + self._doubles(x for x in steps if x.out.level == "row")

    def _rows(self) -> list[str]:
        """What is known of a row before its elements are read."""
        slots = [(name, r) for name, r in self.sweep.inputs.items() if r.level == "row"]
        lines = [f"{r} = float64(load(at_{name}, line))" for name, r in slots]
        return lines + [f"{x.out} = load(rows{x.index}, line)" for x in self.lines.known_rows]

    def _turn(self, turn: Turn) -> list[str]:
        """Arithmetic on a row, then a loop over its elements and what that comes to."""
        lines = [self._line(x) for x in turn.rows]
        if not turn.loops:
            return lines
        lines += [f"sum{x.index} = {REDUCTIONS[x.word][0]}" for x in turn.row_sums]
        lines += self._loop(turn)
        for x in turn.row_sums:
            total = f"sum{x.index}"
            finished = {"mean": f"{total} / float64(columns)", "norm": f"sqrt({total})"}
            lines.append(f"{x.out} = {finished.get(x.word, f'float64({total})')}")
        return lines

    def _loop(self, turn: Turn) -> list[str]:
        names = [*dict.fromkeys((*turn.inputs, *turn.outputs))]
        if "p" in names:
            names += [x for x in ("low_bits", "compensation") if x in self.arrays]
        arrays = [(f"in_{x}", f"at_{x}") for x in names]
        lined = [f"values{x.index}" for x in turn.columns] + [f"sums{x.index}" for x in turn.column_sums]
        inside = self._inside_turn(turn, "of_" if self.in_blocks else "")
        if not self.in_blocks:
            lines = [f"{into} = offset({array}, first)" for into, array in arrays]
            return [*lines, "for i in range(columns):", *("    " + x for x in inside)]
        strip = ["before = max(block * strip - begun, 0)", "start_of_strip = stretch * width + before"]
        strip += ["count = min((block + 1) * strip - begun, width) - before"]
        strip += [f"of_{x} = offset({x}, start_of_strip)" for x in lined]
        summed = [place for place, _ in turn.reductions if place in self.summed]
        strip += self._strip(inside, "(line * lines + stretch)", "first + start_of_strip", summed)
        lines = ["for stretch in range(lines):"]
        lines += ["    for block in range((begun + width + strip - 1) // strip):"]
        return [*lines, *("        " + x for x in strip)]

    def _inside_turn(self, turn: Turn, of: str) -> list[str]:
        """What is done for each element."""
        lines = [f"{r} = {self._loaded(name)}" for name, r in turn.inputs.items()]
        for x in turn.columns:
            loaded = f"load({of}values{x.index}, i)"
            lines.append(f"{x} = {loaded} != number(0.0)" if x.mask else f"{x} = {loaded}")
        lines += [self._line(x) for x in turn.instructions]
        sums = [(f"sum{x.index}", x) for x in turn.row_sums]
        sums += [(f"total{place}", x) for place, x in turn.reductions if place not in self.summed]
        for name, x in sums:
            lines.append(f"{name} = {REDUCTIONS[x.word][1].format(name, self._number(x.operand))}")
        for place, x in turn.reductions:
            if place in self.summed and self._in_memory(place) is None:
                lines.append(f"store({self._names(place)[0]}, i, {self._number(x.operand)})")
        for x in turn.column_sums:
            lines.append(f"store({of}sums{x.index}, i, {self._added(x, f'{of}sums{x.index}')})")
        for name, register in turn.outputs.items():
            lines += self._stored(name, self._number(register))
        return lines

    def _added(self, x: Reduction, array: str) -> str:
        """The text of a column's sum with one more element."""
        value, before = f"float64({self._number(x.operand)})", f"load({array}, i)"
        if x.word == "largest":
            return f"larger({before}, {value})"
        return f"{before} + {value} * {value}" if x.word == "norm" else f"{before} + {value}"

    def _end(self) -> list[str]:
        """What is stored and added up of a row."""
        lines = [f"store(rows{x.index}, line, {x.out})" for x in self.lines.kept_rows]
        for place, x in enumerate(self.lines.reductions):
            if x.operand.level == "row":
                lines.append(_added(place, x))
        slots = [(name, r) for name, r in self.sweep.outputs.items() if r.level == "row"]
        return lines + [self._stored_line(name, "line", "first_row + line, 0", r) for name, r in slots]


class ColumnPrinter(_Doubles):
    """Prints what is computed for each column before a pass."""

    _level = "column"

    def __init__(self, program: Program, columns: Columns, dtypes: Mapping[str, torch.dtype]):
        super().__init__(program, columns, dtypes)
        self.columns = columns

    def _body(self) -> list[str]:
        lines = ["chunk = chunk_at(job, place)"]
        lines += ["tensor, start = tensor_of(job, chunk), start_of(job, chunk)"]
        lines += ["columns = columns_of(job, tensor)"]
        lines += ["chunks = end_chunk(job, tensor) - first_chunk(job, tensor)"]
        lines += self._before()
        inside = [*self._loads(), *map(self._line, self.columns.instructions), *self._stores()]
        lines += ["for i in range(length_of(job, chunk)):", *("    " + x for x in inside)]
        return [*lines, *self._after()]

    def _before(self) -> list[str]:
        lines = super()._before()
        lines += [self._kept(f"sums{x.index}", "float64", "start") for x in self.columns.sums]
        if self.noisy:
            lines += ["width, strip = width_of(job, tensor), strip_of(job, tensor)"]
            lines += ["blocks = numbers_of(job, tensor)"]
        return lines + [self._kept(f"values{x.index}", self.number, "start") for x in self.columns.values]

    def _scalars(self) -> list[str]:
        return self._doubles(self.columns.instructions)

    def _loads(self) -> list[str]:
        lines = [f"{r} = float64(load(at_{name}, i))" for name, r in self.columns.inputs.items()]
        for x in self.columns.sums:
            part = f"load(sums{x.index}, chunk_of_rows * columns + i)"
            added = f"larger({x.out}, {part})" if x.word == "largest" else f"{x.out} + {part}"
            lines += [f"{x.out} = {_in_double(REDUCTIONS[x.word][0])}", "for chunk_of_rows in range(chunks):"]
            lines += [f"    {x.out} = {added}"]
            finished = {"mean": f"{x.out} / float64(lines_of(job, tensor))", "norm": f"sqrt({x.out})"}
            lines += [f"{x.out} = {finished[x.word]}"] if x.word in finished else []
        return lines

    def _stores(self) -> list[str]:
        lines: list[str] = []
        for x in self.columns.values:
            value = f"where({x}, number(1.0), number(0.0))" if x.mask else f"number({x})"
            lines.append(f"store(values{x.index}, i, {value})")
        for place, x in enumerate(self.columns.reductions):
            lines.append(_added(place, x))
        slots = self.columns.outputs.items()
        position = "(start + i) // width * blocks + (start + i) % width // strip, (start + i) % width % strip"
        return lines + [self._stored_line(name, "i", position, r) for name, r in slots]


def _added(place: int, x: Reduction) -> str:
    """The line that adds a value of a row or column to a sum over all of them."""
    value = f"where({x.operand}, 1.0, 0.0)" if x.operand.mask else str(x.operand)
    return f"total{place} = {_in_double(REDUCTIONS[x.word][1]).format(f'total{place}', value)}"


def _in_double(text: str) -> str:
    return text.replace("number(", "float64(")
