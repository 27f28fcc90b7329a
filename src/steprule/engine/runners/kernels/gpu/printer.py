"""Prints one pass of a program over memory as the source of a GPU kernel.

Each word of a program becomes one line, by the table below. All values are computed in float32, or in float64
if the arrays have that dtype, and rounded once, to nearest with ties to even, when they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch

from steprule.engine import storage
from steprule.engine.program.program import (
    Columns,
    Instruction,
    Operand,
    Pass,
    Program,
    Reduction,
    Register,
)
from steprule.engine.runners.kernels.places import Needs
from steprule.engine.runners.kernels.printing import (
    arrays_of,
    coded,
    draws_in,
    is_exact,
    names_of,
    needs_of,
    noisy,
)

# What each word becomes; the operands' texts are filled in. `-x` would be `0 - x` in Triton and lose the sign
# of zero.
WORDS = {
    "neg": "{0} * -1.0",
    "abs": "tl.abs({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "sign": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0)).to(number)",
    # The fast exponential of GPUs is off by many units in the last place for large x.
    "exp": "tl.exp({0}.to(tl.float64)).to(number)",
    "log": "tl.log({0}.to(tl.float64)).to(number)",
    "atan2": "atan2({0}, {1}).to(number)",
    "reciprocal": "tl.div_rn(1.0, {0})",
    "shift": "{0} + {1}",
    "scale": "{0} * {1}",
    "divide": "tl.div_rn({0}, {1})",
    "power": "power({0}, {1})",
    "exponential": "power({1}, {0})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "tl.div_rn({0}, {1})",
    "add_scaled": "tl.fma({2}, {1}, {0})",
    "addcmul": "tl.fma({3} * {1}, {2}, {0})",
    "lerp": "tl.fma(tl.where({3}, {2}, {2} - 1.0), {1} - {0}, tl.where({3}, {0}, {1}))",
    "larger": "tl.maximum({0}, {1}, tl.PropagateNan.ALL)",
    "smaller": "tl.minimum({0}, {1}, tl.PropagateNan.ALL)",
    "less": "{0} < {1}",
    "less_equal": "{0} <= {1}",
    "greater": "{0} > {1}",
    "greater_equal": "{0} >= {1}",
    "equal": "{0} == {1}",
    "not_equal": "{0} != {1}",
}

# Double precision is rounded correctly by the plain words.
WORDS_IN_DOUBLE = {
    "sqrt": "tl.sqrt({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "reciprocal": "1.0 / {0}",
    "divide": "{0} / {1}",
    "div": "{0} / {1}",
}

# Powers that torch computes without `pow`, in words.
POWERS: dict[float, tuple[str, ...]] = {
    1.0: (),
    2.0: ("square",),
    3.0: ("cube",),
    0.5: ("sqrt",),
    -0.5: ("sqrt", "reciprocal"),
    -1.0: ("reciprocal",),
    -2.0: ("square", "reciprocal"),
}
PRODUCTS = {"square": "{0} * {0}", "cube": "{0} * {0} * {0}"}

# How a reduction starts, and how it takes in one block of values; masked values count as its start.
REDUCTIONS = {
    "total": ("0.0", "{0} + {1}"),
    "mean": ("0.0", "{0} + {1}"),
    "norm": ("0.0", "{0} + {1} * {1}"),
    "largest": ('float("-inf")', WORDS["larger"]),
}

# How its lanes become one number.
FOLDS = {"total": "tl.sum({0})", "mean": "tl.sum({0})", "norm": "tl.sum({0})", "largest": "largest({0})"}


# What is handed on of where a chunk is in the whole tensor.
PLACES = ("width", "strip", "begun", "first_block", "blocks", "element", "span")


def needs_on_gpu(program: Program, dtypes: Mapping[str, torch.dtype]) -> Needs:
    """What the kernels of a program do that depends on where elements are in the whole tensor.

    Where elements are added up, each block has lanes of its own, as where it shares a scale.
    """
    needs = needs_of(program, dtypes)
    return Needs(needs.rounded or (needs.summed and not program.lined), False, needs.drawn)


def added_in(program: Program, sweep: Pass | Columns) -> Sequence[Reduction]:
    """The reductions of a pass that are sums of blocks; others are taken within a chunk."""
    return [] if program.lined else [x for x in sweep.reductions if is_exact(x)]


class Printer:
    """Prints a pass in which every element is on its own."""

    def __init__(self, program: Program, sweep: Pass | Columns, dtypes: Mapping[str, torch.dtype]):
        self.program = program
        self.sweep = sweep
        self.dtypes = names_of(dtypes)
        self.arrays = arrays_of(program, dtypes)
        self.number = "tl.float64" if "float64" in self.dtypes.values() else "tl.float32"
        self.touched = [name for name in self.arrays if name in sweep.inputs or name in sweep.outputs]
        self.coded = [x for x in coded(program, dtypes) if x in self.touched]
        # Whether kernels are told where the chunks are in the whole tensors.
        needs = needs_on_gpu(program, dtypes)
        self.placed = needs.rounded or needs.drawn
        beside = [f"{name}_scale" for name in self.coded]
        beside += [x for x in ("compensation", "low_bits") if x in dtypes and "p" in self.touched]
        self.walked = [*self.touched, *beside]
        self.noisy = noisy(program, sweep, dtypes)
        self.draws = draws_in(sweep.instructions)
        used = {x for step in sweep.instructions for x in step.operands}
        self.scalars = [i for i in range(program.scalar_count) if any(str(x) == f"c{i}" for x in used)]
        self.added = added_in(program, sweep)
        self.blocked = bool(self.coded or self.added)
        # Sums are taken from turn to turn, unless blocks have to be there as a whole to be encoded.
        self.in_turns = bool(self.added) and not any(x in self.coded for x in sweep.outputs)
        self.sums = [f"sum{place}" for place in range(len(self.added) if self.in_turns else 0)]
        self.taken = [x for x in sweep.reductions if x not in self.added]
        self.totals = [f"total{place}" for place in range(len(self.taken))]

    def text(self, title: str) -> str:
        """The whole source."""
        head = f'"""{title}; written by steprule.\n\n{self.program}\n"""\n\n'
        head += "import triton\nimport triton.language as tl\n\n"
        head += "from steprule.engine.runners.kernels.gpu.words import *\n\n"
        head += f"number = tl.constexpr({self.number})\n\n"
        functions = [*self._functions(), *([self._combine()] if self.totals else [])]
        return head + "\n" + "\n\n\n".join("\n".join(lines) for lines in functions) + "\n"

    def _functions(self) -> list[list[str]]:
        """All functions but `combine`."""
        return [self._entries(), self._kernel()]

    # One block of elements

    def _entries(self) -> list[str]:
        """The function that loads, computes and stores."""
        whole = self.blocked and not self.in_turns
        given = [*self._given(), *self.totals, *self.sums, "q" if self.in_turns else "first"]
        given += ["i" if self.blocked else "lanes", "inside", *(["BLOCK: tl.constexpr"] if whole else [])]
        given += ["SHARING: tl.constexpr"] if self.blocked or self.noisy else []
        lines = ["@triton.jit", f"def entries({', '.join(given)}):"]
        lines += [] if self.blocked else ["    i = first + lanes"]
        lanes = "(first + tl.arange(0, BLOCK))" if whole else "q"
        lines += [f"    shared = {lanes} // SHARING"] if self.coded else []
        if self.noisy or self.draws:
            lines += ["    if inside is None:", *(f"    {line}" for line in self._position_in_full())]
            lines += ["    else:", *(f"    {line}" for line in self._position(self.noisy, self.draws))]
        for name, register in self.sweep.inputs.items():
            lines.append(f"    {register} = {self._load(name)}")
        for step in self.sweep.instructions:
            lines += [f"    {step.out} = {x}" for x in self._expressions(step)]
        for place, step in enumerate(self.added):
            value = f"{self._number(step.operand)}.to(tl.float64)"
            lines += [f"    value = tl.broadcast_to({value}, i.shape)"]
            value = "value * value" if step.word == "norm" else "value"
            if self.in_turns:
                given = f"sum{place}, sums + {place}, loose, i, inside, {value}, {len(self.added)}"
                lines += [f"    sum{place} = added({given})"]
            else:
                given = f"loose, first, i, inside, {value}, {len(self.added)}, BLOCK, SHARING"
                lines += [f"    store_sums(sums + {place}, {given})"]
        for total, step in zip(self.totals, self.taken, strict=True):
            start, form = REDUCTIONS[step.word]
            value = self._number(step.operand)
            lines += [f"    value = {value}.to(tl.float64)"]
            lines += ["    if inside is not None:", f"        value = tl.where(inside, value, {start})"]
            lines += [f"    {total} = {form.format(total, 'value')}"]
        for name, register in self.sweep.outputs.items():
            lines += [f"    {line}" for line in self._store(name, self._number(register))]
        kept = [*self.totals, *self.sums]
        return [*lines, f"    return {', '.join(kept)}"] if kept else lines

    def _given(self) -> list[str]:
        """What `entries` is handed because it is the same for all entries of a tensor."""
        names = {str(x) for step in self.sweep.instructions for x in step.operands}
        scaling = ["unscale"] if "g" in self.sweep.inputs else []
        scalars = [f"c{i}" for i in self.scalars if f"c{i}" in names]
        arrays = [f"at_{name}" for name in self.walked]
        sums = ["sums", "loose"] if self.added else []
        return [*arrays, *sums, *self._given_for_noise(self.noisy, self.draws), *scaling, *scalars]

    def _given_for_noise(self, noisy: Iterable[str], draws: Iterable[int]) -> list[str]:
        """What random roundings and draws are made of, and where the chunk begins."""
        keys = [f"key_{name}" for name in noisy]
        keys += [f"{what}_{draw}" for draw in draws for what in ("stream", "turn")]
        return [*keys, *PLACES] if keys else []

    def _position_in_full(self) -> list[str]:
        """The lines that say where elements are in their blocks, if all are in one line of full blocks."""
        lines = ["    place = i + begun"] if self.noisy else []
        lines += ["    block, place = first_block + place // SHARING, place % SHARING"] if self.noisy else []
        return lines + (["    drawn = element + i"] if self.draws else [])

    def _position(self, noisy: Collection[str], draws: Collection[int]) -> list[str]:
        """The lines that say where elements are in their blocks."""
        lines = ["    line = i // width"] if noisy or draws else []
        if noisy:
            lines += ["    place = i - line * width + begun"]
            lines += ["    block, place = first_block + line * blocks + place // strip, place % strip"]
        return lines + (["    drawn = element + line * (span - width) + i"] if draws else [])

    def _load(self, name: str) -> str:
        """The text that loads elements of an array and decodes them."""
        if name in self.coded:
            codes, scales = (
                f"tl.load(at_{name} + i, inside)",
                f"tl.load(at_{name}_scale + shared, inside)",
            )
            return f"from_code({codes}, {scales}, {self._kind(name)})"
        if name == "p" and "low_bits" in self.walked:
            return "from_halves(tl.load(at_p + i, inside), tl.load(at_low_bits + i, inside))"
        loaded = self._wide(name, f"tl.load(at_{name} + i, inside)")
        if name == "p" and "compensation" in self.walked:
            loaded += " + " + self._wide("compensation", "tl.load(at_compensation + i, inside)")
        return f"{loaded} * unscale" if name == "g" else loaded

    def _store(self, name: str, value: str) -> list[str]:
        """Lines that store."""
        if name in self.coded:
            given = f"at_{name}, at_{name}_scale, first, i, inside, {value}, noise_at(key_{name}, block, place)"
            return [f"store_codes({given}, {self._kind(name)}, BLOCK, SHARING)"]
        if name == "p" and "low_bits" in self.walked:
            return [
                f"upper = upper_half({value})",
                "tl.store(at_p + i, upper.to(tl.uint16), inside)",
                f"tl.store(at_low_bits + i, (bits_of({value}) - (upper << 16)).to(tl.int16), inside)",
            ]
        if name == "p" and "compensation" in self.walked:
            rest = self._narrow("compensation", "rest")
            return [
                f"kept = {self._narrow(name, value)}",
                "tl.store(at_p + i, kept, inside)",
                f"rest = finite_or_zero({value} - {self._wide(name, 'kept')})",
                f"tl.store(at_compensation + i, {rest}, inside)",
            ]
        if name in self.noisy:
            rounded = f"to_bfloat16_at_random({value}, noise_at(key_{name}, block, place))"
            return [f"tl.store(at_{name} + i, {rounded}, inside)"]
        return [f"tl.store(at_{name} + i, {self._narrow(name, value)}, inside)"]

    def _kind(self, name: str) -> str:
        return "SIGNED" if self.dtypes[name] == "int8" else "UNSIGNED"

    def _wide(self, name: str, stored: str) -> str:
        """Values in the precision they are computed in, from what an array holds."""
        if self.dtypes[name] == "bfloat16":
            return f"from_bfloat16({stored})"
        return stored if f"tl.{self.dtypes[name]}" == self.number else f"{stored}.to(number)"

    def _narrow(self, name: str, value: str) -> str:
        """What an array holds, from values."""
        if self.dtypes[name] == "bfloat16":
            return f"to_bfloat16({value})"
        return value if f"tl.{self.dtypes[name]}" == self.number else f"{value}.to(tl.{self.dtypes[name]})"

    # One chunk of a tensor

    def _kernel(self) -> list[str]:
        """The function that every program of the launch runs, on a chunk of its own."""
        given = ["pointers", "chunks", "rows", "scalars", "scaling"]
        given += ["layouts", "places"] if self.placed else []
        given += ["rooms", "sums"] if self.added else []
        given += ["partials"] if self.totals else []
        lines = ["@triton.jit", f"def kernel({', '.join([*given, *self._flags()])}):"]
        lines += [f"    {line}" for line in self._before()]
        kept = [*self.totals, *self.sums]
        call = f"entries({', '.join([*self._given(), *kept])}"
        call = f"{', '.join(kept)} = {call}" if kept else call
        lines += [f"    {line}" for line in (self._turns if self.in_turns else self._loops)(call)]
        for place, (total, step) in enumerate(zip(self.totals, self.taken, strict=True)):
            folded = FOLDS[step.word].format(total)
            cell = f"{len(self.totals)} * tl.program_id(0).to(tl.int64) + {place}"
            lines.append(f"    tl.store(partials + {cell}, {folded})")
        return lines

    def _flags(self) -> list[str]:
        flags = ["ALIGNED: tl.constexpr", "BLOCK: tl.constexpr"]
        return [*flags, "SHARING: tl.constexpr"] if self.placed else flags

    def _loops(self, call: str) -> list[str]:
        """The loops over the elements of a chunk, block by block."""
        simple = ["(strip == SHARING)"] if self.blocked or self.noisy else []
        simple += ["(begun == 0)"] if self.blocked else []
        simple += ["(length <= width)"] if self.blocked or self.noisy or self.draws else []
        if self.blocked:
            return [
                "across = tl.minimum(scales, (begun + length + strip - 1) // strip)",
                "end = (length + width - 1) // width * across * SHARING",
                f"full = tl.where({' & '.join(simple)}, length // BLOCK * BLOCK, 0)",
                "for first in range(0, full, BLOCK):",
                f"    {call}, first, first + lanes, None, BLOCK, SHARING)",
                "for first in range(full, end, BLOCK):",
                "    i, inside = within(first + lanes, width, strip, begun, across, length, SHARING)",
                f"    {call}, first, i, inside, BLOCK, SHARING)",
            ]
        more = ", SHARING" if self.noisy else ""
        if simple:
            return [
                f"full = tl.where({' & '.join(simple)}, length // BLOCK * BLOCK, 0)",
                "for first in range(0, full, BLOCK):",
                f"    {call}, first, lanes, None{more})",
                "for first in range(full, length, BLOCK):",
                f"    {call}, first, lanes, first + lanes < length{more})",
            ]
        return [
            "full = length // BLOCK * BLOCK",
            "for first in range(0, full, BLOCK):",
            f"    {call}, first, lanes, None)",
            "if full < length:",
            f"    {call}, full, lanes, full + lanes < length)",
        ]

    def _turns(self, call: str) -> Iterator[str]:
        """The loops of a pass with sums: blocks that fill BLOCK together, 16 elements of each in a turn."""
        yield "across = tl.minimum(scales, (begun + length + strip - 1) // strip)"
        yield "count = (length + width - 1) // width * across"
        simple = "(strip == SHARING) & (begun == 0) & (length <= width) & (loose == 0)"
        yield f"full = tl.where({simple}, length // BLOCK * BLOCK, 0)"
        turn = "lanes + (first + LANES * turn)"
        # Full blocks are known not to be loose: a branch in each turn would keep the next turn's loads back.
        for begin, end, turns, loose in (
            ("0", "full", "tl.static_range", "0"),
            ("full", "count * SHARING", "range", "loose"),
        ):
            yield f"for first in range({begin}, {end}, BLOCK):"
            for x in self.sums:
                yield f"    {x} = tl.zeros(lanes.shape, tl.float64)"
            yield f"    for turn in {turns}(SHARING // LANES):"
            given = call.replace(" loose,", f" {loose},")
            if begin == "0":
                yield f"        {given}, {turn}, {turn}, None, SHARING)"
            else:
                yield f"        i, inside = within({turn}, width, strip, begun, across, length, SHARING)"
                yield f"        {given}, {turn}, i, inside, SHARING)"
            for place, x in enumerate(self.sums):
                given = f"{loose}, first // SHARING, count, {x}, {len(self.sums)}, BLOCK // SHARING"
                yield f"    store_lanes(sums + {place}, {given})"

    def _before(self) -> Iterator[str]:
        """Where the chunk is, and what is the same for all its elements; a skipped step has none."""
        yield "chunk = chunks + 3 * tl.program_id(0).to(tl.int64)"
        yield "tensor, start = tl.load(chunk), tl.load(chunk + 1)"
        yield "length = tl.where(tl.load(scaling + 1) == 0.0, tl.load(chunk + 2), 0).to(tl.int32)"
        if "g" in self.sweep.inputs:
            yield "unscale = tl.load(scaling).to(number)"
        yield from self._placing()
        for name in self.walked:
            kind = "uint16" if self.dtypes[name] == "bfloat16" else self.dtypes[name]
            first = "tl.load(places + 2)" if name.endswith("_scale") else "start"
            yield f"at_{name} = {self._address(name)}.to(tl.pointer_type(tl.{kind})) + {first}"
        for name in self.walked:
            if not name.endswith("_scale"):
                yield f"at_{name} = tl.multiple_of(at_{name}, 16 if ALIGNED else 1)"
        yield from self._keys()
        if self.scalars:
            yield f"row = scalars + {self.program.scalar_count} * tl.load(rows + tensor)"
        for index in self.scalars:
            yield f"c{index} = tl.load(row + {index})"
        if self.added:
            room = "tl.load(rooms + tl.program_id(0).to(tl.int64))"
            yield f"sums, loose = sums + {len(self.added)} * {room}, tl.load(layouts + 2) == 1"
        if self.in_turns:
            yield "lanes = tl.arange(0, BLOCK // (SHARING // LANES))"
            yield "lanes = lanes // LANES * SHARING + lanes % LANES"
        else:
            yield "lanes = tl.arange(0, BLOCK)"
        for total, step in zip(self.totals, self.taken, strict=True):
            yield f"{total} = tl.full(lanes.shape, {REDUCTIONS[step.word][0]}, tl.float64)"

    def _placing(self) -> Iterator[str]:
        """Where the chunk is in the whole tensor, and how it goes along lines."""
        if not (self.blocked or self.noisy or self.draws):
            return
        yield "layouts, places = layouts + 6 * tensor, places + 5 * tl.program_id(0).to(tl.int64)"
        yield "width = tl.minimum(tl.load(layouts), 2147483647).to(tl.int32)"
        yield "strip, begun = tl.load(layouts + 1).to(tl.int32), tl.load(places + 1).to(tl.int32)"
        yield "first_block, blocks = tl.load(places), tl.load(layouts + 3)"
        yield "element, span = tl.load(places + 3), tl.load(layouts + 5)"
        if self.blocked:
            yield "scales = tl.load(layouts + 4).to(tl.int32)"

    def _keys(self) -> Iterator[str]:
        """What random roundings and draws of a tensor are made of."""
        for name, (key, salt) in self.noisy.items():
            found = f"tl.load({self._address(key)}.to(tl.pointer_type(tl.int64)))"
            yield f"key_{name} = {found}.to(tl.uint32) ^ {salt}"
        if self.draws:
            yield f"noise = tl.load({self._address(storage.NOISE_KEY)}.to(tl.pointer_type(tl.int64)))"
        for draw in self.draws:
            yield f"stream_{draw} = stream_of(noise, {storage.salt_of(draw)})"
            yield f"turn_{draw} = turn_of(noise, stream_{draw})"

    def _address(self, name: str) -> str:
        return f"tl.load(pointers + {len(self.arrays)} * tensor + {self.arrays.index(name)})"

    # All chunks of a tensor

    def _combine(self) -> list[str]:
        """The function that brings together what the reductions came to over a tensor's chunks, in order."""
        lines = [
            "@triton.jit",
            "def combine(bounds, partials, reduced, BLOCK: tl.constexpr):",
            "    tensor = tl.program_id(0).to(tl.int64)",
            "    chunk, end = tl.load(bounds + tensor), tl.load(bounds + tensor + 1)",
        ]
        count = len(self.totals)
        steps = list(zip(self.totals, self.taken, strict=True))
        for total, step in steps:
            lines.append(f"    {total} = tl.full((BLOCK,), {REDUCTIONS[step.word][0]}, tl.float64)")
        lines += ["    while chunk < end:", "        lanes = chunk + tl.arange(0, BLOCK)"]
        for place, (total, step) in enumerate(steps):
            start, form = REDUCTIONS["largest" if step.word == "largest" else "mean"]
            value = f"tl.load(partials + {count} * lanes + {place}, lanes < end, {start})"
            lines += [f"        value = {value}", f"        {total} = {form.format(total, 'value')}"]
        lines.append("        chunk += BLOCK")
        for place, (total, step) in enumerate(steps):
            cell = f"{place} * tl.num_programs(0) + tensor"
            lines.append(f"    tl.store(reduced + {cell}, {FOLDS[step.word].format(total)})")
        return lines

    # One word

    def _expressions(self, step: Instruction) -> list[str]:
        """What the word's register is set to; where there are several, each builds on the one before."""
        if step.word == "where":
            return [self._where(step)]
        if step.draw is not None:
            bits = f"bits_at(stream_{step.draw}, turn_{step.draw}, drawn)"
            return [f"{step.word}({bits}).to(number)"]
        if step.word == "clamp":
            x, low, high = map(self._number, step.operands)
            return [WORDS["larger"].format(x, low), WORDS["smaller"].format(step.out, high)]
        plain = self._form(step.word).startswith("{0} ")
        texts = [self._number(operand, plain) for operand in step.operands]
        # `lerp` goes from whichever end is nearer.
        texts += [f"tl.abs({texts[2]}) < 0.5"] if step.word == "lerp" else []
        exponent = step.operands[-1]
        if step.word == "power" and isinstance(exponent, float) and exponent in POWERS:
            forms = [self._form(word) for word in POWERS[exponent]] or ["{0}"]
            return [form.format(step.out if i else texts[0]) for i, form in enumerate(forms)]
        return [self._form(step.word).format(*texts)]

    def _form(self, word: str) -> str:
        if self.number == "tl.float64" and word in WORDS_IN_DOUBLE:
            return WORDS_IN_DOUBLE[word]
        return PRODUCTS[word] if word in PRODUCTS else WORDS[word]

    def _where(self, step: Instruction) -> str:
        condition, a, b = step.operands
        if isinstance(condition, float):
            chosen = a if condition else b
            text = self._number(chosen)
            return text if isinstance(chosen, Register) else f"tl.broadcast_to({text}, i.shape)"
        is_mask = isinstance(condition, Register) and condition.mask
        test = str(condition) if is_mask else f"{self._number(condition)} != 0.0"
        return f"tl.where({test}, {self._number(a)}, {self._number(b)})"

    def _number(self, operand: Operand, plain: bool = False) -> str:
        """The operand's text; a comparison counts as 1 or 0, as in torch.

        plain: next to an operator, a plain number takes the other side's precision; elsewhere it is float32.
        """
        if isinstance(operand, float):
            value = repr(operand) if math.isfinite(operand) else f'float("{operand}")'
            return value if plain else f"tl.full((), {value}, number)"
        if isinstance(operand, Register) and operand.mask:
            return f"tl.where({operand}, 1.0, 0.0).to(number)"
        return str(operand)
