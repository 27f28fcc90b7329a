"""Prints a program as the source of CPU kernels: one for each pass over memory for all tensors of the program.

The source is a part of Python, which `language` describes, and meant to be read: it is in the cache folder next
to its machine code, and `explain` says where.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from steprule.engine.program.program import Program
from steprule.engine.runners.kernels.cpu.lines import ColumnPrinter, LinePrinter
from steprule.engine.runners.kernels.cpu.printer import Printer
from steprule.engine.runners.kernels.printing import DTYPES, STORAGE, Source, arrays_of


def sources(program: Program, dtypes: Mapping[str, torch.dtype]) -> list[Source]:
    """The kernels of a program, one per pass that is not idle.

    dtypes: of 'p', 'g' and every slot letter of the program, then of what `storage` keeps next to them: the
    scales of codes ('<letter>_scale') and the entries named in `storage.EXTRA_KEYS`.
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
    kinds = "-".join(dict.fromkeys((DTYPES | STORAGE)[dtypes[name]] for name in arrays_of(program, dtypes)))
    return "-".join(filter(None, (program.rule, kinds, which)))
