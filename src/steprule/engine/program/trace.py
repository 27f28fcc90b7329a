"""A composition, traced once into a straight list of words.

`trace` runs `update` on numbers that record what is done to them. The result does not depend on shapes, dtypes,
devices or the values of the hyper-parameters, so that a schedule never builds a new program:

* `instructions`: one word each, over registers (one number per element of the parameter);
* `reductions`: the sums and maxima that make one plain number of many elements;
* `scalars`: everything made only of plain numbers, such as hyper-parameters, `t` and reductions: Python
  functions that compute it in double precision, the first before the first sweep over memory, each further one
  when a sweep has finished the reductions that it reads;
* `passes`: the sweeps, between which the reductions cut the instructions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import chain
from numbers import Real
from typing import Any, cast

from steprule import rule_errors
from steprule.engine.composition import Composition, Hyper, Slots, one_step
from steprule.engine.fields import Field, Slot
from steprule.engine.written import name_in
from steprule.plain import DOUBLE_WORDS, SCALAR_WORDS
from steprule.words import Number, Symbol, spell

COMPARISONS = frozenset({"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"})


@dataclass(frozen=True)
class Register:
    """The result of an instruction, or an input.

    mask: it is a comparison, which counts as 1 or 0.
    """

    index: int
    mask: bool = False

    def __str__(self) -> str:
        return f"{'k' if self.mask else 'r'}{self.index}"


@dataclass(frozen=True)
class Scalar:
    """One entry of the vector that all of `Program.scalars` return together."""

    index: int

    def __str__(self) -> str:
        return f"c{self.index}"


Operand = Register | Scalar | float


@dataclass(frozen=True)
class Instruction:
    """`out = word(operands)`."""

    word: str
    operands: tuple[Operand, ...]
    out: Register

    def __str__(self) -> str:
        return f"{self.out} = {self.word}({', '.join(map(str, self.operands))})"


@dataclass(frozen=True)
class Reduction:
    """`r[index] = word(operand)`, over all elements of a tensor, a group, or the optimizer.

    key: what says that reductions of several groups are one and the same, if it goes over tensors.
    """

    index: int
    word: str
    operand: Register
    over: str
    key: tuple[str, int]

    def __str__(self) -> str:
        return f"r[{self.index}] = {self.word}({self.operand}) over {self.over}"


@dataclass(frozen=True)
class Pass:
    """One sweep over memory: what it loads, computes, and then stores or reduces."""

    inputs: dict[str, Register]
    instructions: tuple[Instruction, ...]
    outputs: dict[str, Register]
    reductions: tuple[Reduction, ...]


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
    # The hyper-parameters that slots for all parameters are made of, so that all groups must agree on them.
    common: frozenset[str] = frozenset()

    def __str__(self) -> str:
        lines = [f"{self.rule}: " + ", ".join(f"{r} = {n}" for n, r in self.inputs.items())]
        lines += [f"    {line}" for line in self.scalars[0].source.splitlines()]
        lines += [f"    {instruction}" for instruction in self.instructions]
        lines += [f"    {reduction}" for reduction in self.reductions]
        for later in self.scalars[1:]:
            lines += [f"    {line}" for line in later.source.splitlines()]
        lines += [f"    {name} <- {register}" for name, register in self.outputs.items()]
        return "\n".join(lines)

    @property
    def scalar_count(self) -> int:
        """How many scalars there are, of all stages."""
        return self.scalars[-1].first + self.scalars[-1].count

    @property
    def shares(self) -> bool:
        """Whether anything is taken over more than one tensor."""
        return any(x.over != "tensor" for x in self.reductions)

    @cached_property
    def gradient_norm(self) -> Reduction | None:
        """The norm of all gradients, if the first sweep takes it: it is finite only if all of them are."""
        gradient = self.inputs["g"]
        negated = [x.out for x in self.instructions if x.word == "neg" and x.operands == (gradient,)]
        for x in self.passes[0].reductions:
            if x.word == "norm" and x.over == "all" and x.operand in (gradient, *negated):
                return x
        return None

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The sweeps over memory, in order; only the last one stores. One, if nothing is reduced."""
        stage = self._stages()
        last = max((stage[r.index] for r in self.outputs.values()), default=0)
        sweeps: list[Pass] = []
        for number in range(last + 1):
            reductions = tuple(x for x in self.reductions if stage[x.operand.index] == number)
            outputs = self.outputs if number == last else {}
            wanted = [*outputs.values(), *(x.operand for x in reductions)]
            sweeps.append(self._sweep(wanted, outputs, reductions))
        return tuple(sweeps)

    def _stages(self) -> dict[int, int]:
        """For every register, how many sweeps must be finished before it can be computed."""
        of_scalar = [number for number, x in enumerate(self.scalars) for _ in range(x.count)]
        stage = {register.index: 0 for register in self.inputs.values()}
        for step in self.instructions:
            below = [stage[x.index] for x in step.operands if isinstance(x, Register)]
            below += [of_scalar[x.index] for x in step.operands if isinstance(x, Scalar)]
            stage[step.out.index] = max(below, default=0)
        return stage

    def _sweep(
        self, wanted: list[Register], outputs: dict[str, Register], reductions: tuple[Reduction, ...]
    ) -> Pass:
        """The instructions that are needed for `wanted`."""
        body, _ = _live(self.instructions, wanted)
        needed = {x.index for x in wanted}
        needed |= {x.index for step in body for x in step.operands if isinstance(x, Register)}
        inputs = {name: r for name, r in self.inputs.items() if r.index in needed}
        return Pass(inputs, tuple(body), outputs, reductions)


class _Memory:
    """Gives every distinct scalar expression one name."""

    def __init__(self, rule: str):
        self.rule = rule
        self.names: dict[str, str] = {}
        # How many sweeps must be finished before each can be computed.
        self.stages: dict[str, int] = {}

    def name(self, text: str, stage: int = 0) -> str:
        if text not in self.names:
            self.names[text] = name = f"s{len(self.names)}"
            self.stages[name] = max([stage, *(self.stages.get(word, 0) for word in _words_of(text))])
        return self.names[text]

    def plain(self, value: Any) -> Any:
        return _plain(self.rule, value)

    def spelt(self, name: str) -> str:
        """An expression as the rule wrote it, for messages."""
        text = next(text for text, known in self.names.items() if known == name)
        for part in _words_of(text):
            if part in self.names.values():
                text = re.sub(rf"\b{part}\b", lambda _, part=part: self.spelt(part), text)
        return re.sub(r"h\['(?:\w+\.)?(\w+)'\]", r"h.\1", text)

    def symbol(self, text: str, level: str = "all", stage: int = 0) -> Symbol:
        return Symbol(self, self.name(text, stage), level=level, stage=stage)


class _Tracer:
    """The machine that records words."""

    def __init__(self, rule: str):
        self.rule = rule
        self.memory = _Memory(rule)
        self.count = 0
        self.instructions: list[Instruction] = []
        self.scalars: dict[str, Scalar] = {}
        self.stages: dict[Operand, int] = {}
        self.reductions: dict[Any, Reduction] = {}
        # What each call of a reduction over more than one tensor asks for, in order.
        self.calls: list[Reduction] = []
        self._seen: dict[Any, Register] = {}

    def register(self, mask: bool = False) -> Register:
        self.count += 1
        return Register(self.count - 1, mask)

    def plain(self, value: Any) -> Any:
        return _plain(self.rule, value)

    def operand(self, value: Any) -> Operand:
        if isinstance(value, Symbol):
            scalar = self.scalars.setdefault(value.text, Scalar(len(self.scalars)))
            self.stages[scalar] = value.stage
            return scalar
        return value if isinstance(value, Register) else float(value)

    def emit(self, word: str, *operands: Any) -> Register:
        """Record the word; the same word on the same operands is recorded once."""
        if word == "as_stored":
            raise rule_errors.stored_element(self.rule)
        resolved = tuple(self.operand(value) for value in operands)
        key = (word, *((type(x), x) for x in resolved))
        if key not in self._seen:
            out = self.register(word in COMPARISONS)
            self.stages[out] = max((self.stages.get(x, 0) for x in resolved), default=0)
            self.instructions.append(Instruction(word, resolved, out))
            self._seen[key] = out
        return self._seen[key]

    def reduce(self, word: str, operand: Register, over: str) -> Symbol:
        """The plain number that a reduction comes to; the same one is taken once."""
        known = self.reductions.get((word, operand, over))
        if known is None:
            index = len(self.reductions)
            before = sum(x.over != "tensor" and x.key[0] == self.rule for x in self.reductions.values())
            known = Reduction(index, word, operand, over, (self.rule, before))
            self.reductions[word, operand, over] = known
        if over != "tensor":
            self.calls.append(known)
        return self.memory.symbol(f"r[{known.index}]", over, self.stages.get(operand, 0) + 1)


def _plain(rule: str, value: Any) -> Any:
    """A plain number or a symbol unchanged; True and False count as 1 and 0."""
    if isinstance(value, Symbol) or type(value) in (int, float):
        return value
    if not isinstance(value, Real):
        raise rule_errors.no_operand(f"{rule}.update", value)
    return float(value)


def _symbolic(memory: _Memory, name: str, fld: Field, value: Any) -> Any:
    """A hyper-parameter as the tracer passes it to `update`."""
    if fld.choices is not None or isinstance(fld.default, bool) or value is None:
        return value
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        entries = enumerate(cast(tuple[Any, ...], value))
        return tuple(None if x is None else memory.symbol(f"h[{name!r}][{i}]") for i, x in entries)
    if fld.switch:
        return _Switch(memory, memory.name(f"h[{name!r}]"), bool(value))
    return memory.symbol(f"h[{name!r}]")


class _Switch(Symbol):
    """A hyper-parameter whose zero means absent: whether it is on is part of the program's key."""

    __slots__ = ("on",)

    def __init__(self, memory: _Memory, text: str, on: bool):
        super().__init__(memory, text)
        self.on = on

    def __bool__(self) -> bool:  # type: ignore[override]
        return self.on


def static_key(fields: Mapping[str, Field], group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The group's options that decide the program: booleans, choices, which switches are on."""
    parts: list[Any] = []
    for name, fld in fields.items():
        if name not in group or fld.free:
            continue
        if fld.switch:
            parts.append((name, bool(group[name])))
        elif isinstance(fld.default, tuple) and None in fld.default:  # pyright: ignore[reportUnknownMemberType]
            parts.append((name, *(x is None for x in group[name])))
        elif fld.static or isinstance(group[name], (bool, str)) or group[name] is None:
            parts.append((name, group[name]))
    return tuple(parts)


def trace(composition: Composition, group: Mapping[str, Any]) -> Program:
    """The program of a composition in a group with these static options; it is traced only once.

    Raises: AttributeError for a misspelt slot or hyper-parameter, TypeError for an `if` on a number.
    """
    key = static_key(composition.fields, group)
    program: Program | None = composition.programs.get(key)
    if program is None:
        program = _trace(composition, group)
        if str(_trace(composition, group)) != str(program):
            raise rule_errors.changes_by_itself(composition.name)
        composition.programs[key] = program
    return program


def _trace(composition: Composition, group: Mapping[str, Any]) -> Program:
    tracer = _Tracer(composition.rule.__name__)
    memory = tracer.memory
    fields = {name: fld for name, fld in composition.fields.items() if name in group and not fld.free}
    values = {name: _symbolic(memory, name, fld, group[name]) for name, fld in fields.items()}
    h = Hyper(tracer.rule, composition.rule.fields, values)
    exists = {letter: slot for letter, slot in composition.slots.items() if slot.exists(dict(group))}
    slots = {letter: slot for letter, slot in exists.items() if slot.per == "element"}
    scalar_slots = {letter: slot for letter, slot in exists.items() if slot.per != "element"}
    inputs = {name: tracer.register() for name in ("p", "g", *slots)}
    numbers: dict[str, Any] = {letter: Number(tracer, inputs[letter]) for letter in slots}
    numbers |= {letter: memory.symbol(f"n[{letter!r}]", slot.per) for letter, slot in scalar_slots.items()}
    s = Slots(tracer, composition.slots, numbers)
    t = memory.symbol("t", "tensor")
    new = one_step(composition, h, Number(tracer, inputs["p"]), Number(tracer, inputs["g"]), s, t)

    outputs = {"p": new.handle}
    outputs |= {x: _as_register(tracer, s.numbers[x]) for x in slots if x in s.written}
    written = {letter: s.numbers[letter] for letter in scalar_slots if letter in s.written}
    instructions, reductions, used = _needed(tracer, outputs, written)
    name_rule = partial(name_in, who=f"{tracer.rule}.update", written=composition.update)
    scalars, renumber = _scalars(tracer, used, written, name_rule)
    return Program(
        rule=composition.name,
        inputs=inputs,
        instructions=tuple(
            Instruction(
                x.word,
                tuple(renumber[y] if isinstance(y, Scalar) else y for y in x.operands),
                x.out,
            )
            for x in instructions
        ),
        outputs=outputs,
        slots=slots,
        scalar_slots=scalar_slots,
        reductions=tuple(reductions),
        calls=tuple(tracer.calls),
        scalars=scalars,
        common=frozenset(_hyperparameters_in(memory, written, scalar_slots)),
    )


def _hyperparameters_in(
    memory: _Memory, written: Mapping[str, Any], slots: Mapping[str, Slot]
) -> Iterable[str]:
    texts = [spell(value) for letter, value in written.items() if slots[letter].per == "all"]
    for _, text in _lines(memory, texts):
        yield from re.findall(r"h\['([\w.]+)'\]", text)


def _as_register(tracer: _Tracer, value: Any) -> Register:
    if isinstance(value, Number):
        return value.handle
    return tracer.emit("where", 1.0, value, Register(0))


def _live(
    instructions: Sequence[Instruction], wanted: Iterable[Register]
) -> tuple[list[Instruction], set[Scalar]]:
    """The instructions that these registers depend on, and the scalars that they use."""
    needed = {register.index for register in wanted}
    kept: list[Instruction] = []
    scalars: set[Scalar] = set()
    for step in reversed(instructions):
        if step.out.index in needed:
            kept.append(step)
            needed |= {x.index for x in step.operands if isinstance(x, Register)}
            scalars |= {x for x in step.operands if isinstance(x, Scalar)}
    return kept[::-1], scalars


def _needed(
    tracer: _Tracer, outputs: Mapping[str, Register], written: Mapping[str, Any]
) -> tuple[list[Instruction], list[Reduction], set[Scalar]]:
    """What the outputs and the new values of coarse slots depend on."""
    texts = {scalar: text for text, scalar in tracer.scalars.items()}
    wanted = list(outputs.values())
    reductions: list[Reduction] = []
    while True:
        instructions, used = _live(tracer.instructions, wanted)
        asked = [*(texts[scalar] for scalar in used), *map(spell, written.values())]
        asked = {text for _, text in _lines(tracer.memory, asked)}
        more = [x for x in tracer.reductions.values() if f"r[{x.index}]" in asked and x not in reductions]
        if not more:
            return instructions, sorted(reductions, key=lambda x: x.index), used
        reductions += more
        wanted += [x.operand for x in more]


def _lines(memory: _Memory, expressions: Iterable[Any]) -> list[tuple[str, str]]:
    """The names that these expressions need, in order, each with its own expression."""
    texts = {name: text for text, name in memory.names.items()}
    needed: set[str] = set()

    def need(expression: str) -> None:
        for name in _words_of(expression) & texts.keys():
            if name not in needed:
                needed.add(name)
                need(texts[name])

    for expression in expressions:
        need(expression)
    return [(name, text) for name, text in texts.items() if name in needed]


def _scalars(
    tracer: _Tracer, used: set[Scalar], written: Mapping[str, Any], name_rule: Callable[..., None]
) -> tuple[tuple[Scalars, ...], dict[Scalar, Scalar]]:
    """The functions that compute the scalars, stage by stage, and the scalars' places in what they return."""
    memory = tracer.memory
    operands = {text: memory.stages[text] for text, scalar in tracer.scalars.items() if scalar in used}
    slots = {x: value.stage if isinstance(value, Symbol) else 0 for x, value in written.items()}
    late = [text for text, stage in operands.items() if stage]
    late += [spell(written[letter]) for letter, stage in slots.items() if stage]
    late_lines = [line for line in _lines(memory, late) if memory.stages[line[0]]]
    mentioned = set[str]().union(*(_words_of(text) for _, text in late_lines))
    handed_on = [name for name in memory.stages if name in mentioned and not memory.stages[name]]
    found: list[Scalars] = []
    renumber: dict[Scalar, Scalar] = {}
    for stage in range(1 + max([0, *operands.values(), *slots.values()])):
        texts = [text for text in operands if operands[text] == stage]
        letters = tuple(letter for letter in slots if slots[letter] == stage)
        returned = [texts, [spell(written[letter]) for letter in letters]]
        if stage:
            head = ["def scalars(c, r):"]
            head += [f"    {_tuple(handed_on)} = c"] if handed_on else []
            lines = [line for line in _lines(memory, chain(*returned)) if memory.stages[line[0]]]
        else:
            head = ["def scalars(h, t, n):"]
            returned += [handed_on] if late else []
            lines = _lines(memory, chain(*returned))
        body = [f"    {name} = {text}" for name, text in lines]
        source = "\n".join([*head, *body, f"    return {', '.join(map(_tuple, returned))}"])
        first = len(renumber)
        renumber |= {tracer.scalars[text]: Scalar(first + i) for i, text in enumerate(texts)}
        function = _compile_scalars(source, name_rule, DOUBLE_WORDS if stage else SCALAR_WORDS)
        found.append(Scalars(source, first, len(texts), letters, function))
    return tuple(found), renumber


def _tuple(texts: Iterable[str]) -> str:
    return f"({''.join(text + ', ' for text in texts)})"


@lru_cache(maxsize=4096)
def _words_of(expression: str) -> frozenset[str]:
    text = "".join(c if c.isalnum() or c == "_" else " " for c in expression)
    return frozenset(text.split())


def _compile_scalars(
    source: str, name_rule: Callable[..., None], words: Mapping[str, Callable[..., Any]]
) -> Callable[..., tuple[Any, ...]]:
    """The function of this source, whose errors name the rule."""
    head, *body = source.splitlines()
    lines = [head, "    try:", *(f"    {line}" for line in body)]
    lines += ["    except Exception as error:", "        name_rule(error)", "        raise"]
    scope: dict[str, Any] = {**words, "name_rule": name_rule}
    exec(compile("\n".join(lines), "<scalars of a step rule>", "exec"), scope)
    return scope["scalars"]
