"""Prints one pass of a program over memory as the source of a CPU kernel.

Each word of a program becomes one line, by the table below. All values are computed in float32, or in float64
if the arrays have that dtype, and rounded once when they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from steprule.engine import storage
from steprule.engine.program.program import Columns, Instruction, Operand, Pass, Program, Reduction, Register
from steprule.engine.runners.kernels.printing import arrays_of, coded, draws_in, is_exact, names_of, noisy

# What each word becomes; the operands' texts are filled in. The roundings are those of torch's CPU operations.
WORDS = {
    "neg": "negative({0})",
    "abs": "absolute({0})",
    "sqrt": "sqrt({0})",
    "sign": "sign({0})",
    "exp": "exp({0})",
    "log": "log({0})",
    "atan2": "atan2({0}, {1})",
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

# These words if the second operand is a plain number, which is the same for every element.
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

# How the values of a strip are added.
SUMS = {"total": "add_values", "mean": "add_values", "norm": "add_squares"}

# How a reduction over rows or columns starts, and how it takes in one value.
REDUCTIONS = {
    "total": ("0.0", "sum_with({0}, float64({1}))"),
    "mean": ("0.0", "sum_with({0}, float64({1}))"),
    "norm": ("0.0", "sum_with({0}, float64({1}) * float64({1}))"),
    "largest": ("number(-inf)", "larger({0}, {1})"),
}


def _needs_power(step: Instruction) -> bool:
    """Whether the word is a power that products, quotients and roots cannot make."""
    return step.word == "exponential" or (step.word == "power" and step.operands[1] not in POWERS)


class Printer:
    """Prints a pass in which every element is on its own."""

    imports = ("from steprule.engine.runners.kernels.cpu.words import *",)

    def __init__(self, program: Program, sweep: Pass | Columns, dtypes: Mapping[str, torch.dtype]):
        self.program = program
        self.sweep = sweep
        self.dtypes = names_of(dtypes)
        self.arrays = arrays_of(program, dtypes)
        touched = sweep.inputs.keys() | sweep.outputs.keys()
        self.coded = [x for x in coded(program, dtypes) if x in touched]
        self.written = [x for x in self.coded if x in sweep.outputs]
        self.noisy = noisy(program, sweep, dtypes)
        self.draws = draws_in(sweep.instructions)
        # Which reductions are sums that are exact between blocks.
        self.summed = [place for place, x in enumerate(sweep.reductions) if is_exact(x)]
        self.in_blocks = bool(self.coded or self.noisy or self.summed or self.draws)
        # How the pointers are called that the loop over elements uses.
        self.prefix = "in" if self.in_blocks else "at"
        self.number = "float64" if "float64" in self.dtypes.values() else "float32"

    def text(self, title: str) -> str:
        """The whole source."""
        head = [f'"""{title}; written by steprule.', "", str(self.program), '"""', ""]
        head += ["from numpy import float64, inf", f"from numpy import {self.number} as number", ""]
        beside = {"low_bits", "compensation"} & set(self.arrays)
        more = ["storage_words"] if self.coded or self.noisy or beside else []
        more += ["draw_words"] if self.draws else []
        more += ["power_words"] if any(map(_needs_power, self.sweep.instructions)) else []
        more += ["sums"] if self.summed else []
        more += ["sums_of_doubles"] if self.summed and self.number == "float64" else []
        head += [f"from steprule.engine.runners.kernels.cpu.{name} import *" for name in more]
        head += [*self.imports, "", ""]
        head += [
            "def kernel(job):",
            "    for part in range(thread_number(job), shares(job), thread_count(job)):",
            "        for place in range(first_place(job, part), first_place(job, part + 1)):",
        ]
        return "\n".join([*head, *("            " + line for line in self._body()), ""])

    def _body(self) -> list[str]:
        """What is done for a chunk."""
        loop = self._blocks if self.in_blocks else self._entries
        lines = ["chunk = chunk_at(job, place)"]
        lines += ["tensor, start = tensor_of(job, chunk), start_of(job, chunk)"]
        return [*lines, *self._before(), *loop(self._inside()), *self._after()]

    def _before(self) -> list[str]:
        """What is the same for all elements of a tensor."""
        touched = self.sweep.inputs.keys() | self.sweep.outputs.keys()
        beside = {f"{name}_scale" for name in self.coded} | set(storage.EXTRA_KEYS)
        beside -= set() if self.draws else {storage.NOISE_KEY}
        lines: list[str] = []
        for index, name in enumerate(self.arrays):
            if name in touched | beside:
                lines.append(
                    f"at_{name} = {self.dtypes[name]}_array(job, {index}, tensor, {self._first(name)})"
                )
        lines += [f"key_{name} = key_of(at_{key}, {salt})" for name, (key, salt) in self.noisy.items()]
        for draw in self.draws:
            lines.append(f"stream_{draw} = stream_of(at_{storage.NOISE_KEY}, {storage.salt_of(draw)})")
            lines.append(f"turn_{draw} = turn_of(at_{storage.NOISE_KEY}, stream_{draw})")
        lines.append("row = scalars_of(job, tensor)")
        lines += self._scalars()
        count = len(self.sweep.reductions)
        for place, reduction in enumerate(self.sweep.reductions):
            if place in self.summed:
                values, total = self._names(place)
                if self._in_memory(place) is None:
                    lines.append(f"{values} = {self.number}_values(job, part * {count} + {place})")
                lines.append(f"{total} = sum_of_chunk(job, chunk * {count} + {place})")
                lines.append(f"clear({total})")
            else:
                lines.append(f"total{place} = {self._start(reduction)}")
        return lines

    def _names(self, place: int) -> tuple[str, str]:
        """What the values to be added and their sum are called."""
        return f"values{place}", f"sum{place}"

    def _start(self, reduction: Reduction) -> str:
        """What a reduction starts from."""
        return REDUCTIONS[reduction.word][0]

    def _first(self, name: str) -> str:
        """The place in an array where the chunk begins."""
        if name.endswith("_scale"):
            return "scale_at(job, chunk)"
        return "0" if name.endswith("_key") else "start"

    def _scalars(self) -> list[str]:
        """The lines that load the scalars which the pass uses."""
        used = self._scalars_of(self.sweep.instructions)
        return [f"c{index} = number(scalar(job, row + {index}))" for index in used]

    def _scalars_of(self, steps: Iterable[Instruction]) -> list[int]:
        used = {str(x) for step in steps for x in step.operands}
        return [index for index in range(self.program.scalar_count) if f"c{index}" in used]

    def _entries(self, inside: list[str]) -> list[str]:
        """The loop over the elements of a chunk."""
        return ["for i in range(length_of(job, chunk)):", *("    " + x for x in inside)]

    def _blocks(self, inside: list[str]) -> list[str]:
        """The same, strip by strip of each line.

        Noise restarts in each block, codes need its largest element first, and what is going to be added is in
        the nearest cache.
        """
        count = len(self.written)
        lines = [*self._in_lines()]
        lines += [f"buffer_{name} = scratch(job, part * {count} + {i})" for i, name in enumerate(self.written)]
        lines += ["for line in range((length_of(job, chunk) + width - 1) // width):"]
        body = ["here = min(width, length_of(job, chunk) - line * width)"]
        body += ["for block in range((begun + here + strip - 1) // strip):"]
        strip = ["before = max(block * strip - begun, 0)", "first = line * width + before"]
        strip += ["count = min((block + 1) * strip - begun, here) - before"]
        strip += self._strip(inside, "line", "first", self.summed)
        return [*lines, *("    " + x for x in body), *("        " + x for x in strip)]

    def _in_lines(self) -> list[str]:
        """How a chunk goes along lines."""
        lines = ["width, strip, begun = width_of(job, tensor), strip_of(job, tensor), begun_at(job, chunk)"]
        lines += ["first_block, blocks = number_at(job, chunk), numbers_of(job, tensor)"] if self.noisy else []
        lines += ["scales = scales_of(job, tensor)"] if self.coded else []
        lines += ["element, span = element_at(job, chunk), span_of(job, tensor)"] if self.draws else []
        return lines + (["size = block_of(job, tensor)"] if self.summed else [])

    def _strip(self, inside: list[str], line: str, first: str, summed: Iterable[int]) -> list[str]:
        """What is done for a strip. line, first: which line and element of the chunk it begins at."""
        text = "\n".join(inside)
        written = [x for x in self.written if f"buffer_{x}," in text]
        arrays = [x for x in self.arrays if f"in_{x}," in text or x in written]
        lines = [f"in_{name} = offset(at_{name}, {first})" for name in arrays]
        lines += ["inside = max(begun - block * strip, 0)"] if self.noisy or self.summed else []
        read = [x for x in self.coded if f"scale_{x})" in text]
        lines += [f"scale_{x} = load_scale(at_{x}_scale, {line} * scales + block)" for x in read]
        noisy = [x for x in self.noisy if x in written or f"noise_{x})" in text]
        block = f"first_block + {line} * blocks + block"
        lines += [f"noise_{x} = noise_from(key_{x}, {block}, inside)" for x in noisy]
        lines += [f"drawn = element + {line} * span + before"] if self.draws else []
        lines += [f"top_{x} = size_of_zero()" for x in written]
        lines += ["for i in range(count):", *("    " + text for text in inside)]
        lines += [self._block_added(place) for place in summed]
        # Memory would be idle while codes are computed, so fetch what comes next meanwhile.
        lines += [f"fetch(in_{name}, 2 * strip)" for name in arrays if written]
        for x in written:
            lines += [f"inverse_{x} = store_scale(at_{x}_scale, {line} * scales + block, top_{x})"]
        lines += ["for i in range(count):"] if written else []
        for x in written:
            lines += [f"    store_code(in_{x}, i, load(buffer_{x}, i), inverse_{x}, noise_{x})"]
        return lines

    def _loaded(self, name: str) -> str:
        """The text that loads an element of an array."""
        array = f"{self.prefix}_{name}"
        if name in self.coded:
            return f"load_code({array}, i, scale_{name})"
        if name == "p" and "low_bits" in self.arrays:
            return f"load_master({array}, {array[:2]}_low_bits, i)"
        if name == "p" and "compensation" in self.arrays:
            return f"load({array}, i) + load({array[:2]}_compensation, i)"
        return f"load({array}, i)"

    def _stored(self, name: str, x: str) -> list[str]:
        """The lines that store an element of an array."""
        array = f"{self.prefix}_{name}"
        if name in self.coded:
            return [f"store(buffer_{name}, i, {x})", f"top_{name} = larger_size(top_{name}, {x})"]
        if name == "p" and "low_bits" in self.arrays:
            return [f"store_master({array}, {array[:2]}_low_bits, i, {x})"]
        if name == "p" and "compensation" in self.arrays:
            return [f"store_compensated({array}, {array[:2]}_compensation, i, {x})"]
        if name in self.noisy:
            return [f"store_randomly({array}, i, {x}, noise_{name})"]
        return [f"store({array}, i, {x})"]

    def _inside(self) -> list[str]:
        """What is done for each element: load, compute, store."""
        lines = [f"{r} = {self._loaded(name)}" for name, r in self.sweep.inputs.items()]
        lines += [self._line(x) for x in self.sweep.instructions]
        for place, reduction in enumerate(self.sweep.reductions):
            value = self._number(reduction.operand)
            if place not in self.summed:
                form = REDUCTIONS[reduction.word][1]
                lines.append(f"total{place} = {form.format(f'total{place}', value)}")
            elif self._in_memory(place) is None:
                lines.append(f"store({self._names(place)[0]}, i, {value})")
        for name, register in self.sweep.outputs.items():
            lines += self._stored(name, self._number(register))
        return lines

    def _after(self) -> list[str]:
        """The lines that keep the results of the reductions over the chunk."""
        count = len(self.sweep.reductions)
        return [
            f"keep_partial(job, {count}, {place}, chunk, float64(total{place}))"
            for place in range(count)
            if place not in self.summed
        ]

    def _in_memory(self, place: int) -> str | None:
        """The array whose elements a sum is taken of as they are, if there is one."""
        operand = self.sweep.reductions[place].operand
        for name, register in self.sweep.inputs.items():
            as_it_is = self.dtypes[name] == self.number and self._loaded(name) == f"load(in_{name}, i)"
            if register == operand and as_it_is and name not in self.sweep.outputs:
                return name
        return None

    def _block_added(self, place: int) -> str:
        """The line that adds the values of a strip to a sum."""
        word, name = SUMS[self.sweep.reductions[place].word], self._in_memory(place)
        values, total = self._names(place)
        return f"{word}({total}, {values if name is None else f'in_{name}'}, count, size, inside)"

    def _line(self, step: Instruction) -> str:
        return f"{step.out} = {self._expression(step)}"

    def _expression(self, step: Instruction) -> str:
        if step.word == "where":
            return self._where(step)
        if step.draw is not None:
            bits = f"bits_at(stream_{step.draw}, turn_{step.draw}, drawn + i)"
            return f"number({step.word}({bits}))"
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
        is_mask = isinstance(condition, Register) and condition.mask
        test = str(condition) if is_mask else f"{self._number(condition)} != number(0.0)"
        return f"where({test}, {self._number(a)}, {self._number(b)})"

    def _number(self, operand: Operand) -> str:
        """The operand's text; a comparison counts as 1 or 0, as in torch."""
        if isinstance(operand, float):
            return f"number({operand!r})" if operand == operand else "number(inf - inf)"
        if isinstance(operand, Register) and operand.mask:
            return f"where({operand}, number(1.0), number(0.0))"
        return str(operand)
