"""Prints passes over whole rows, and what is computed for each column between them.

A program of the launch goes through the rows of its chunk, one after the other. A value per row is a double,
computed between the loops over the elements of the row: `turn0`, `turn1`, …, each of which does the work for
one block of them. Sums of columns are kept for each chunk; between two passes they are added up, in the order
of the chunks, so that the same numbers come out every time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

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
from steprule.engine.runners.kernels.gpu.printer import FOLDS, REDUCTIONS, Printer
from steprule.engine.runners.kernels.printing import draws_in
from steprule.engine.runners.kernels.turns import Turn, line_arrays, turns_of

# How many columns, and how many chunks of each, are worked on at a time between passes.
COLUMNS = 32
# The block of a slot per column that an element is in, and its place there.
COLUMN = "(start + i) // width * blocks + (start + i) % width // strip, (start + i) % width % strip"


class _Doubles(Printer):
    """What prints words on elements, and words on doubles for rows or columns."""

    # The level that is computed in double.
    level = ""

    def __init__(self, program: Program, sweep: Pass | Columns, dtypes: Mapping[str, torch.dtype]):
        super().__init__(program, sweep, dtypes)
        self.kept = line_arrays(program)
        self._double = False

    def _lines(self, step: Instruction) -> list[str]:
        """A word on doubles."""
        before, self.number, self._double = self.number, "tl.float64", True
        texts = [f"{step.out} = {_in_double(text)}" for text in self._expressions(step)]
        self.number, self._double = before, False
        return texts

    def _number(self, operand: Operand, plain: bool = False) -> str:
        if self._double and isinstance(operand, Scalar):
            return f"d{operand.index}"
        text = super()._number(operand, plain)
        cast = isinstance(operand, Register) and operand.level == self.level and not operand.mask
        return f"{text}.to(number)" if cast and not self._double else text

    def _where(self, step: Instruction) -> str:
        condition, a, b = step.operands
        if not isinstance(condition, float):
            return super()._where(step)
        chosen = a if condition else b
        # A row has one of them.
        fits = step.out.level == "row" or (isinstance(chosen, Register) and chosen.level == step.out.level)
        return self._number(chosen) if fits else f"tl.broadcast_to({self._number(chosen)}, i.shape)"

    def _kept_at(self, name: str, kind: str, first: str) -> str:
        """The line that finds the memory of what is kept of rows or columns."""
        place = len(self.arrays) + self.kept.index(name)
        address = f"tl.load(pointers + {len(self.arrays) + len(self.kept)} * tensor + {place})"
        return f"{name} = {address}.to(tl.pointer_type({kind})) + {first}"

    def _address(self, name: str) -> str:
        place = self.arrays.index(name)
        return f"tl.load(pointers + {len(self.arrays) + len(self.kept)} * tensor + {place})"

    def _loaded_line(self, name: str, place: str, inside: str) -> str:
        """The text that loads an element of a slot per row or column, in double."""
        return f"{self._wide(name, f'tl.load(at_{name} + {place}{inside})')}.to(tl.float64)"

    def _stored_line(self, name: str, place: str, position: str, x: Register, inside: str) -> str:
        """The line that stores it. position: its block and its place there, which decide the noise."""
        value = f"tl.where({x}, 1.0, 0.0).to(number)" if x.mask else f"{x}.to(number)"
        if name in self.noisy:
            kept = f"to_bfloat16_at_random({value}, noise_at(key_{name}, {position}))"
        else:
            kept = self._narrow(name, value)
        return f"tl.store(at_{name} + {place}, {kept}{inside})"

    def _scalars_of(self, steps: Iterable[Instruction]) -> list[int]:
        used = {str(x) for step in steps for x in step.operands}
        return [index for index in self.scalars if f"c{index}" in used]

    def _head(self) -> list[str]:
        given = ["pointers", "chunks", "rows", "scalars", "scaling"]
        given += ["layouts", "places"] if self.placed else []
        given += ["heights", "widths", "bounds"]
        given += ["partials"] if self.totals else []
        return ["@triton.jit", f"def kernel({', '.join([*given, *self._flags()])}):"]

    def _places(self) -> Iterator[str]:
        """Where the chunk is, and the slots per row or column."""
        yield "chunk = chunks + 3 * tl.program_id(0).to(tl.int64)"
        yield "tensor, start = tl.load(chunk), tl.load(chunk + 1)"
        yield "length = tl.where(tl.load(scaling + 1) == 0.0, tl.load(chunk + 2), 0).to(tl.int32)"
        yield "columns = tl.load(widths + tensor).to(tl.int32)"

    def _pointer(self, name: str, first: str) -> str:
        kind = "uint16" if self.dtypes[name] == "bfloat16" else self.dtypes[name]
        return f"at_{name} = {self._address(name)}.to(tl.pointer_type(tl.{kind})) + {first}"

    def _partials(self) -> Iterator[str]:
        for place, (total, step) in enumerate(zip(self.totals, self.sweep.reductions, strict=True)):
            folded = total if step.operand.level == self.level == "row" else FOLDS[step.word].format(total)
            cell = f"{len(self.totals)} * tl.program_id(0).to(tl.int64) + {place}"
            yield f"tl.store(partials + {cell}, {folded})"


class LinePrinter(_Doubles):
    """Prints a pass that goes over whole rows, each of them in several turns."""

    level = "row"

    def __init__(self, program: Program, sweep: Pass, dtypes: Mapping[str, torch.dtype]):
        super().__init__(program, sweep, dtypes)
        self.lines = sweep
        self.by_row = [x for x in self.touched if x in program.slots and program.slots[x].per == "row"]
        self.walked = [x for x in self.walked if x not in self.by_row]
        self.turns = turns_of(sweep)

    def _functions(self) -> list[list[str]]:
        turns = [self._turn(number, turn) for number, turn in enumerate(self.turns) if turn.loops]
        return [*turns, self._whole()]

    # One block of the elements of a row

    def _turn(self, number: int, turn: Turn) -> list[str]:
        is_coded = self._has_codes(turn)
        given = [*self._given_to(turn), *self._sums(turn), "base", "column"]
        flags = ["BLOCK: tl.constexpr", "SHARING: tl.constexpr"]
        given += ["first", "inside", *flags] if is_coded else ["lanes", "inside"]
        lines = ["@triton.jit", f"def turn{number}({', '.join(given)}):"]
        lines += [] if is_coded else ["    first = base + column"]
        lines += [f"    i = {'base + column' if is_coded else 'first + lanes'}"]
        lines += ["    shared = (first + tl.arange(0, BLOCK)) // SHARING"] if is_coded else []
        lines += self._position([x for x in self.noisy if x in turn.outputs], draws_in(turn.instructions))
        along = "column" if is_coded else "column + lanes"
        for name, register in turn.inputs.items():
            lines.append(f"    {register} = {self._load(name)}")
        for x in turn.columns:
            loaded = f"tl.load(values{x.index} + {along}, inside)"
            lines.append(f"    {x} = {loaded} != 0.0" if x.mask else f"    {x} = {loaded}")
        for step in turn.instructions:
            lines += [f"    {step.out} = {x}" for x in self._expressions(step)]
        sums = [(f"sum{x.index}", x) for x in turn.row_sums]
        sums += [(self.totals[place], x) for place, x in turn.reductions]
        for total, step in sums:
            start, form = REDUCTIONS[step.word]
            lines += [f"    value = tl.broadcast_to({self._number(step.operand)}.to(tl.float64), i.shape)"]
            lines += ["    if inside is not None:", f"        value = tl.where(inside, value, {start})"]
            lines += [f"    {total} = {form.format(total, 'value')}"]
        for x in turn.column_sums:
            at = f"sums{x.index} + {along}"
            value = f"tl.broadcast_to({self._number(x.operand)}.to(tl.float64), i.shape)"
            lines += [f"    value = {value}"]
            added = REDUCTIONS[x.word][1].format(f"tl.load({at}, inside)", "value")
            lines += [f"    tl.store({at}, {added}, inside)"]
        for name, register in turn.outputs.items():
            lines += [f"    {line}" for line in self._store(name, self._number(register))]
        kept = self._sums(turn)
        return [*lines, f"    return {', '.join(kept)}"] if kept else lines

    def _sums(self, turn: Turn) -> list[str]:
        """What a turn hands on from block to block."""
        return [
            *(f"sum{x.index}" for x in turn.row_sums),
            *(self.totals[place] for place, _ in turn.reductions),
        ]

    def _has_codes(self, turn: Turn) -> bool:
        return any(x in self.coded for x in (*turn.inputs, *turn.outputs))

    def _given_to(self, turn: Turn) -> list[str]:
        """What a turn is handed because it is the same for all elements of a row."""
        names = {*turn.inputs, *turn.outputs}
        names |= {f"{name}_scale" for name in names}
        names |= {"compensation", "low_bits"} if "p" in names else set[str]()
        arrays = [f"at_{name}" for name in self.walked if name in names]
        keys = self._given_for_noise((x for x in self.noisy if x in turn.outputs), draws_in(turn.instructions))
        scaling = ["unscale"] if "g" in turn.inputs else []
        scalars = [f"c{index}" for index in self._scalars_of(turn.instructions)]
        operands = [x for step in turn.instructions for x in step.reads]
        operands += [x.operand for x in (*turn.row_sums, *turn.column_sums, *(x for _, x in turn.reductions))]
        of_row = dict.fromkeys(str(x) for x in (*operands, *turn.outputs.values()) if x.level == "row")
        lined = [f"values{x.index}" for x in turn.columns] + [f"sums{x.index}" for x in turn.column_sums]
        return [*arrays, *lined, *keys, *scaling, *scalars, *of_row]

    # A chunk of rows

    def _whole(self) -> list[str]:
        lines = [*self._head(), *(f"    {line}" for line in self._before_rows())]
        lines += ["    for line in range(0, length // columns):", "        base = line * columns"]
        body = [f"{r} = {self._loaded_line(x, 'line', '')}" for x, r in self._row_inputs()]
        body += [f"{x.out} = tl.load(rows{x.index} + line)" for x in self.lines.known_rows]
        for number, turn in enumerate(self.turns):
            body += [line for step in turn.rows for line in self._lines(step)]
            body += self._loop(number, turn) if turn.loops else []
        body += [f"tl.store(rows{x.index} + line, {x.out})" for x in self.lines.kept_rows]
        for place, x in enumerate(self.lines.reductions):
            if x.operand.level == "row":
                value = f"tl.where({x.operand}, 1.0, 0.0).to(tl.float64)" if x.operand.mask else str(x.operand)
                total = self.totals[place]
                body.append(f"{total} = {REDUCTIONS[x.word][1].format(total, value)}")
        slots = [(name, r) for name, r in self.sweep.outputs.items() if r.level == "row"]
        # Every thread reads the old value.
        body += ["tl.debug_barrier()"] if slots and self._row_inputs() else []
        body += [self._stored_line(name, "line", "first_row + line, first_row * 0", r, "") for name, r in slots]
        # Another thread may have added what comes next to the sums.
        body += ["tl.debug_barrier()"] if self.lines.column_sums else []
        return [*lines, *(f"        {line}" for line in body), *(f"    {line}" for line in self._partials())]

    def _row_inputs(self) -> list[tuple[str, Register]]:
        return [(name, r) for name, r in self.sweep.inputs.items() if r.level == "row"]

    def _before_rows(self) -> Iterator[str]:
        yield from self._places()
        yield "top = start // columns"
        if "g" in self.sweep.inputs:
            yield "unscale = tl.load(scaling).to(number)"
        yield from self._placing()
        if self.noisy:
            yield "first_row = tl.load(places + 4)"
        for name in self.walked:
            yield self._pointer(name, "tl.load(places + 2)" if name.endswith("_scale") else "start")
        for name in self.by_row:
            yield self._pointer(name, "top")
        yield from self._keys()
        if self.scalars:
            yield f"row = scalars + {self.program.scalar_count} * tl.load(rows + tensor)"
        steps = self.sweep.instructions
        for index in self._scalars_of(x for x in steps if x.out.level == "element"):
            yield f"c{index} = tl.load(row + {index}).to(number)"
        for index in self._scalars_of(x for x in steps if x.out.level == "row"):
            yield f"d{index} = tl.load(row + {index})"
        for x in (*self.lines.known_rows, *self.lines.kept_rows):
            yield self._kept_at(f"rows{x.index}", "tl.float64", "top")
        for x in self.lines.columns:
            yield self._kept_at(f"values{x.index}", self.number, "0")
        yield "lanes = tl.arange(0, BLOCK)"
        if self.coded:
            yield "end = columns // width * scales * SHARING"
            yield "filled = tl.where((strip == SHARING) & (width == columns), columns // BLOCK * BLOCK, 0)"
        yield "full = columns // BLOCK * BLOCK"
        yield from self._starts()

    def _starts(self) -> Iterator[str]:
        """What sums start from."""
        for total, step in zip(self.totals, self.sweep.reductions, strict=True):
            shape = "()" if step.operand.level == "row" else "(BLOCK,)"
            yield f"{total} = tl.full({shape}, {REDUCTIONS[step.word][0]}, tl.float64)"
        sums = self.lines.column_sums
        for x in sums:
            first = "(tl.program_id(0) - tl.load(bounds + tensor)) * columns"
            yield self._kept_at(f"sums{x.index}", "tl.float64", first)
        if sums:
            yield "for first in range(0, columns, BLOCK):"
        for x in sums:
            start = f"tl.full((BLOCK,), {REDUCTIONS[x.word][0]}, tl.float64)"
            yield f"    tl.store(sums{x.index} + first + lanes, {start}, first + lanes < columns)"
        if sums:
            yield "tl.debug_barrier()"

    def _loop(self, number: int, turn: Turn) -> list[str]:
        """A loop over the elements of a row, and what that comes to."""
        kept = self._sums(turn)
        call = f"turn{number}({', '.join([*self._given_to(turn), *kept])}, base"
        into = f"{', '.join(kept)} = " if kept else ""
        lines = [
            f"sum{x.index} = tl.full((BLOCK,), {REDUCTIONS[x.word][0]}, tl.float64)" for x in turn.row_sums
        ]
        if self._has_codes(turn):
            lines += [
                "for first in range(0, filled, BLOCK):",
                f"    {into}{call}, first + lanes, line * end + first, None, BLOCK, SHARING)",
                "for first in range(filled, end, BLOCK):",
                "    i, inside = within(first + lanes, width, strip, 0, scales, columns, SHARING)",
                f"    {into}{call}, i, line * end + first, inside, BLOCK, SHARING)",
            ]
        else:
            lines += [
                "for first in range(0, full, BLOCK):",
                f"    {into}{call}, first, lanes, None)",
                "if full < columns:",
                f"    {into}{call}, full, lanes, full + lanes < columns)",
            ]
        for x in turn.row_sums:
            folded = FOLDS[x.word].format(f"sum{x.index}")
            finished = {"mean": f"{folded} / columns.to(tl.float64)", "norm": f"tl.sqrt({folded})"}
            lines.append(f"{x.out} = {finished.get(x.word, folded)}")
        return lines


class ColumnPrinter(_Doubles):
    """Prints what is computed for each column before a pass."""

    level = "column"

    def __init__(self, program: Program, columns: Columns, dtypes: Mapping[str, torch.dtype]):
        super().__init__(program, columns, dtypes)
        self.columns = columns

    def _functions(self) -> list[list[str]]:
        lines = [*self._head(), *(f"    {line}" for line in self._before_columns())]
        for x in self.columns.sums:
            lines += [f"    {line}" for line in self._sum(x)]
        for name, r in self.columns.inputs.items():
            lines.append(f"    {r} = {self._loaded_line(name, 'i', ', inside')}")
        lines += [f"    {line}" for step in self.columns.instructions for line in self._lines(step)]
        for x in self.columns.values:
            value = f"tl.where({x}, 1.0, 0.0).to(number)" if x.mask else f"{x}.to(number)"
            lines.append(f"    tl.store(values{x.index} + i, {value}, inside)")
        for total, x in zip(self.totals, self.columns.reductions, strict=True):
            start, form = REDUCTIONS[x.word]
            value = f"tl.where({x.operand}, 1.0, 0.0).to(tl.float64)" if x.operand.mask else str(x.operand)
            lines.append(f"    value = tl.where(inside, {value}, {start})")
            lines.append(f"    {total} = {form.format(f'tl.full(i.shape, {start}, tl.float64)', 'value')}")
        for name, r in self.columns.outputs.items():
            lines.append(f"    {self._stored_line(name, 'i', COLUMN, r, ', inside')}")
        return [[*lines, *(f"    {line}" for line in self._partials())]]

    def _before_columns(self) -> Iterator[str]:
        yield from self._places()
        yield from self._placing()
        yield "chunks_of_rows = (tl.load(bounds + tensor + 1) - tl.load(bounds + tensor)).to(tl.int32)"
        for name in self.touched:
            yield self._pointer(name, "start")
        yield from self._keys()
        if self.scalars:
            yield f"row = scalars + {self.program.scalar_count} * tl.load(rows + tensor)"
        for index in self.scalars:
            yield f"d{index} = tl.load(row + {index})"
        for x in self.columns.sums:
            yield self._kept_at(f"sums{x.index}", "tl.float64", "start")
        for x in self.columns.values:
            yield self._kept_at(f"values{x.index}", self.number, "start")
        yield f"i = tl.arange(0, {COLUMNS})"
        yield "inside = i < length"

    def _sum(self, x: Reduction) -> Iterator[str]:
        """Bring together what the chunks of rows came to, some at a time."""
        start, form = REDUCTIONS["largest" if x.word == "largest" else "total"]
        yield f"together = tl.full(({COLUMNS}, {COLUMNS}), {start}, tl.float64)"
        yield f"for first in range(0, chunks_of_rows, {COLUMNS}):"
        yield f"    part = first + tl.arange(0, {COLUMNS})[:, None]"
        yield "    there = (part < chunks_of_rows) & inside[None, :]"
        yield f"    value = tl.load(sums{x.index} + part * columns + i[None, :], there, {start})"
        yield f"    together = {form.format('together', 'value')}"
        if x.word == "largest":
            yield f"{x.out} = largest_along(together)"
            return
        total = "tl.sum(together, 0)"
        rows = "tl.load(heights + tensor).to(tl.float64)"
        finished = {"mean": f"{total} / {rows}", "norm": f"tl.sqrt({total})"}
        yield f"{x.out} = {finished.get(x.word, total)}"


def _in_double(text: str) -> str:
    return re.sub(r"\bnumber\b", "tl.float64", text)
