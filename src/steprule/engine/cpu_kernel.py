"""Prints a program as the source of a CPU kernel: one pass over memory for all tensors of the program.

The source is Python for numba, meant to be read: it stands in the cache folder beside its machine code, and
`explain` prints it. Each word of a program is one line of it, by the table below. All numbers are computed in
float32, or in float64 where the arrays are, and rounded once when they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from steprule.engine.program import Instruction, Operand, Pass, Program, Register

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

# What each word becomes; the operands' texts are filled in. The roundings are those of torch's CPU operations.
WORDS = {
    "neg": "negative({0})",
    "abs": "absolute({0})",
    "sqrt": "sqrt({0})",
    "sign": "sign({0})",
    "exp": "exp({0})",
    "log": "log({0})",
    "reciprocal": "number(1.0) / {0}",
    "shift": "{0} + {1}",
    "scale": "{0} * {1}",
    "divide": "{0} / {1}",
    "power": "power({0}, {1})",
    "exponential": "power({1}, {0})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "add_scaled": "fma({2}, {1}, {0})",
    "addcmul": "fma({3} * {1}, {2}, {0})",
    "lerp": "lerp({0}, {1}, {2})",
    "larger": "larger({0}, {1})",
    "smaller": "smaller({0}, {1})",
    "clamp": "at_most(at_least({0}, {1}), {2})",
    "less": "{0} < {1}",
    "less_equal": "{0} <= {1}",
    "greater": "{0} > {1}",
    "greater_equal": "{0} >= {1}",
    "equal": "{0} == {1}",
    "not_equal": "{0} != {1}",
    "where": "where({0}, {1}, {2})",
}

# These words when the second operand is a plain number, and the same for every entry.
BOUNDS = {"larger": "at_least({0}, {1})", "smaller": "at_most({0}, {1})"}

# Powers that torch computes without `pow`.
POWERS = {
    1.0: "{0}",
    2.0: "{0} * {0}",
    3.0: "{0} * {0} * {0}",
    0.5: "sqrt({0})",
    -0.5: "number(1.0) / sqrt({0})",
    -1.0: "number(1.0) / {0}",
    -2.0: "number(1.0) / ({0} * {0})",
}

# How a reduction starts, takes one number in, and (in numpy) combines what the chunks came to.
REDUCTIONS = {
    "mean": ("0.0", "sum_with({0}, float64({1}))"),
    "norm": ("0.0", "sum_with({0}, float64({1}) * float64({1}))"),
    "largest": ("number(-inf)", "larger({0}, {1})"),
}


class Source(NamedTuple):
    """The text of one pass of a program, and a name for its files."""

    name: str
    text: str


def why_not(dtypes: Mapping[str, torch.dtype]) -> str | None:
    """Why arrays of these dtypes cannot be computed with together, or None."""
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            return f"{name} is {dtype}, which no CPU kernel is written for"
    if torch.float64 in dtypes.values() and len(set(dtypes.values())) > 1:
        return "float64 is mixed with another precision"
    return None


def sources(program: Program, dtypes: Mapping[str, torch.dtype]) -> list[Source]:
    """The kernels of a program, one per pass.

    dtypes: of 'p', 'g' and every slot letter of the program.
    """
    printed: list[Source] = []
    sweeps = program.passes()
    reductions: dict[int, int] = {}
    for number, sweep in enumerate(sweeps):
        title = f"{program.rule}, pass {number + 1} of {len(sweeps)}"
        printer = _Printer(program, sweep, dtypes, reductions)
        kinds = "-".join(dict.fromkeys(DTYPES[dtypes[name]] for name in program.inputs))
        name = "-".join(filter(None, (program.rule, kinds, str(number + 1) * (len(sweeps) > 1))))
        printed.append(Source(name, printer.text(title)))
        for reduction in sweep.reductions:
            reductions[reduction.out.index] = len(reductions)
    return printed


class _Printer:
    def __init__(
        self,
        program: Program,
        sweep: Pass,
        dtypes: Mapping[str, torch.dtype],
        reductions: Mapping[int, int],
    ):
        self.program = program
        self.sweep = sweep
        self.dtypes = {name: DTYPES[dtypes[name]] for name in program.inputs}
        self.reductions = reductions
        self.number = "float64" if "float64" in self.dtypes.values() else "float32"

    def text(self, title: str) -> str:
        """The whole source."""
        head = [f'"""{title}; written by steprule.', "", str(self.program), '"""', ""]
        head += ["from numpy import float64, inf", f"from numpy import {self.number} as number", ""]
        head += ["from steprule.engine.cpu_words import *", "", ""]
        head += [
            "def kernel(job):",
            "    for part in range(thread_number(job), shares(job), thread_count(job)):",
            "        for place in range(first_place(job, part), first_place(job, part + 1)):",
        ]
        before, inside, after = self._before(), self._inside(), self._after()
        body = [*before, "for i in range(length_of(job, chunk)):", *("    " + x for x in inside)]
        return "\n".join([*head, *("            " + line for line in (*body, *after)), ""])

    def _before(self) -> list[str]:
        """What is the same for all entries of a tensor."""
        arrays = list(self.program.inputs)
        touched = [name for name in arrays if name in self.sweep.inputs or name in self.sweep.outputs]
        lines = ["chunk = chunk_at(job, place)"]
        lines += ["tensor, start = tensor_of(job, chunk), start_of(job, chunk)"]
        for name in touched:
            place = f"job, {arrays.index(name)}, tensor, start"
            lines.append(f"at_{name} = {self.dtypes[name]}_array({place})")
        lines.append("row = scalars_of(job, tensor)")
        used = {x for step in self.sweep.instructions for x in step.operands}
        for index in range(self.program.scalar_count):
            if any(str(x) == f"c{index}" for x in used):
                lines.append(f"c{index} = number(scalar(job, row + {index}))")
        for register in self.sweep.reduced:
            place = f"job, {self.reductions[register.index]}, tensor"
            lines.append(f"{register} = number(reduced({place}))")
        lines += [self._line(x) for x in self.sweep.instructions if x.out.kind == "reduced"]
        for place, reduction in enumerate(self.sweep.reductions):
            lines.append(f"total{place} = {REDUCTIONS[reduction.word][0]}")
        return lines

    def _inside(self) -> list[str]:
        """What is done for each entry: load, compute, store."""
        lines = [f"{r} = load(at_{name}, i)" for name, r in self.sweep.inputs.items()]
        lines += [self._line(x) for x in self.sweep.instructions if x.out.kind != "reduced"]
        for place, reduction in enumerate(self.sweep.reductions):
            form = REDUCTIONS[reduction.word][1]
            value = self._number(reduction.operands[0])
            lines.append(f"total{place} = {form.format(f'total{place}', value)}")
        for name, register in self.sweep.outputs.items():
            lines.append(f"store(at_{name}, i, {self._number(register)})")
        return lines

    def _after(self) -> list[str]:
        """What the reductions came to over the chunk."""
        first, count = len(self.reductions), len(self.sweep.reductions)
        del first
        return [f"keep_partial(job, {count}, {place}, chunk, float64(total{place}))" for place in range(count)]

    def _line(self, step: Instruction) -> str:
        return f"{step.out} = {self._expression(step)}"

    def _expression(self, step: Instruction) -> str:
        if step.word == "where":
            return self._where(step)
        texts = [self._number(operand) for operand in step.operands]
        form = WORDS[step.word]
        if step.word in BOUNDS and not isinstance(step.operands[1], Register):
            form = BOUNDS[step.word]
        if step.word == "power" and isinstance(step.operands[1], float):
            form = POWERS.get(step.operands[1], form)
        return form.format(*texts)

    def _where(self, step: Instruction) -> str:
        condition, a, b = step.operands
        if isinstance(condition, float):
            return self._number(a if condition else b)
        is_mask = isinstance(condition, Register) and condition.kind == "mask"
        test = str(condition) if is_mask else f"{condition} != number(0.0)"
        return f"where({test}, {self._number(a)}, {self._number(b)})"

    def _number(self, operand: Operand) -> str:
        """The operand's text; a comparison counts as 1 or 0, as in torch."""
        if isinstance(operand, float):
            return f"number({operand!r})"
        if isinstance(operand, Register) and operand.kind == "mask":
            return f"where({operand}, number(1.0), number(0.0))"
        return str(operand)
