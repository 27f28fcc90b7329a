"""Prints a program as the source of GPU kernels: one for each pass over memory for all tensors of the program.

The source is Python for Triton, meant to be read: it is in the cache folder.

A pass has two functions: `entries` does the work for one block of elements, `kernel` goes through one chunk of
one tensor. Full blocks are not masked, so that every thread loads and stores 16 bytes at a time. Sums of blocks
are stored, and `gpu.sums` adds them up; other reductions, and all of a pass that goes by rows, are brought
together by `combine`, always in the same order. Words that Triton lacks are functions of `gpu.words`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from steprule.engine.program.program import Instruction, Program
from steprule.engine.runners.kernels.gpu.lines import ColumnPrinter, LinePrinter
from steprule.engine.runners.kernels.gpu.printer import POWERS, Printer
from steprule.engine.runners.kernels.printing import CODED, DTYPES, STORAGE, Source, arrays_of


def why_not(program: Program, dtypes: Mapping[str, torch.dtype]) -> str | None:
    """Why no kernel can be printed for this program over arrays of these dtypes, or None."""
    for name in program.inputs:
        if dtypes[name] not in (*DTYPES, *CODED):
            return f"no GPU kernel is written for '{name}' in {dtypes[name]}"
    double = torch.float64 in dtypes.values()
    if double and len({dtypes[name] for name in program.inputs}) > 1:
        return "float64 is mixed with another precision"
    if any(_needs_power(step) for step in program.instructions if double or step.out.level != "element"):
        return "no GPU kernel is written for powers in double precision"
    return None


def _needs_power(step: Instruction) -> bool:
    """Whether the word is a power that products, quotients and roots cannot make."""
    if step.word == "exponential":
        return True
    exponent = step.operands[-1]
    return step.word == "power" and not (isinstance(exponent, float) and exponent in POWERS)


def sources(program: Program, dtypes: Mapping[str, torch.dtype]) -> list[Source]:
    """The kernels of a program, one per pass that is not idle.

    dtypes: of 'p', 'g' and every slot letter of the program, and of what is stored with them (see
    `cpu.kernel.sources`).
    """
    printed: list[Source] = []
    sweeps = program.passes
    for number, sweep in enumerate(sweeps):
        if sweep.idle:
            continue
        title = f"{program.rule}, pass {number + 1} of {len(sweeps)}"
        printer = (LinePrinter if program.lined else Printer)(program, sweep, dtypes)
        name = _name(program, dtypes, str(number + 1) * (len(sweeps) > 1))
        printed.append(Source(name, printer.text(title)))
    return printed


def sources_of_columns(program: Program, dtypes: Mapping[str, torch.dtype]) -> list[Source | None]:
    """The kernels of what is computed per column, for each part of `Program.columns`."""
    printed: list[Source | None] = []
    for number, part in enumerate(program.columns):
        if part is None:
            printed.append(None)
            continue
        title = f"{program.rule}, columns before pass {number + 1}"
        name = _name(program, dtypes, f"columns{number + 1}")
        printed.append(Source(name, ColumnPrinter(program, part, dtypes).text(title)))
    return printed


def _name(program: Program, dtypes: Mapping[str, torch.dtype], which: str) -> str:
    kinds = "-".join(dict.fromkeys((DTYPES | STORAGE)[dtypes[x]] for x in arrays_of(program, dtypes)))
    return "-".join(filter(None, (program.rule, "gpu", kinds, which)))
