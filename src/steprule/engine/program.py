"""A rule and what a group adds to it, traced once into a straight list of words.

`trace` runs `update` on numbers that record what is done to them. The result does not depend on shapes, dtypes,
devices or the values of the hyper-parameters, so that a schedule never builds a new program:

* `instructions`: one word each, over registers (one value per element of the parameter);
* `scalars`: a Python function that computes everything made only of hyper-parameters, `t` and per-tensor slots,
  in double precision, once per step and tensor;
* `passes()`: the instructions, split where a reduction needs the whole tensor before the next one can run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from numbers import Real
from typing import Any, cast

from steprule import rule_errors
from steprule.engine.compose import Added, Hyper, Slots, Update, name_in, one_step
from steprule.engine.fields import Field, Slot
from steprule.words import SCALAR_WORDS, Number, Symbol, spell

REDUCTIONS = frozenset({"mean", "norm", "largest"})
COMPARISONS = frozenset({"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"})


@dataclass(frozen=True)
class Register:
    """The result of an instruction, or an input.

    mask: it is a comparison, which counts as 1 or 0. reduced: it is the same for all elements of a tensor.
    """

    index: int
    mask: bool = False
    reduced: bool = False

    def __str__(self) -> str:
        return f"{'k' if self.mask else 'r'}{self.index}"


@dataclass(frozen=True)
class Scalar:
    """One entry of the vector that `Program.scalars` returns."""

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
class Pass:
    """One sweep over memory: what it loads, computes, and then stores or reduces."""

    inputs: dict[str, Register]
    instructions: tuple[Instruction, ...]
    outputs: dict[str, Register]
    reductions: tuple[Instruction, ...]
    reduced: tuple[Register, ...]


ScalarFunction = Callable[[Mapping[str, Any], float, Mapping[str, float]], tuple[Any, Any]]


@dataclass(frozen=True)
class Program:
    """A traced step. `inputs` and `outputs` are keyed 'p', 'g' and by slot letter."""

    rule: str
    inputs: dict[str, Register]
    instructions: tuple[Instruction, ...]
    outputs: dict[str, Register]
    slots: dict[str, Slot]
    scalar_slots: dict[str, Slot]
    scalar_outputs: tuple[str, ...]
    scalar_count: int
    scalar_source: str
    scalars: ScalarFunction = field(compare=False, repr=False)

    def __str__(self) -> str:
        lines = [f"{self.rule}: " + ", ".join(f"{r} = {n}" for n, r in self.inputs.items())]
        lines += [f"    {line}" for line in self.scalar_source.splitlines()]
        lines += [f"    {instruction}" for instruction in self.instructions]
        lines += [f"    {name} <- {register}" for name, register in self.outputs.items()]
        return "\n".join(lines)

    @property
    def reduces(self) -> bool:
        """Whether anything is computed over whole tensors."""
        return any(step.word in REDUCTIONS for step in self.instructions)

    def passes(self) -> list[Pass]:
        """The sweeps over memory, in order; only the last one stores. One, if nothing is reduced."""
        level = {register.index: 0 for register in self.inputs.values()}
        for step in self.instructions:
            below = max((level[x.index] for x in step.operands if isinstance(x, Register)), default=0)
            level[step.out.index] = below + (step.word in REDUCTIONS)
        last = max((level[r.index] for r in self.outputs.values()), default=0)
        sweeps: list[Pass] = []
        for number in range(last + 1):
            reductions = tuple(
                x for x in self.instructions if x.word in REDUCTIONS and level[x.out.index] == number + 1
            )
            outputs = self.outputs if number == last else {}
            reductions = () if number == last else reductions
            wanted = [x.operands[0] for x in reductions] + list(outputs.values())
            sweeps.append(self._sweep(wanted, outputs, reductions))
        return sweeps

    def _sweep(
        self, wanted: list[Any], outputs: dict[str, Register], reductions: tuple[Instruction, ...]
    ) -> Pass:
        """The instructions needed for `wanted`, where finished reductions count as given."""
        body: list[Instruction] = []
        needed = {x.index for x in wanted if isinstance(x, Register)}
        reduced: list[Register] = []
        for step in reversed(self.instructions):
            if step.out.index not in needed:
                continue
            if step.word in REDUCTIONS:
                reduced.append(step.out)
                continue
            body.append(step)
            needed |= {x.index for x in step.operands if isinstance(x, Register)}
        inputs = {name: r for name, r in self.inputs.items() if r.index in needed}
        return Pass(inputs, tuple(reversed(body)), outputs, reductions, tuple(reversed(reduced)))


class _Memory:
    """Gives every distinct scalar expression one name."""

    def __init__(self, rule: str):
        self.rule = rule
        self.names: dict[str, str] = {}

    def name(self, text: str) -> str:
        return self.names.setdefault(text, f"s{len(self.names)}")

    def plain(self, value: Any) -> Any:
        return _plain(self.rule, value)

    def spelt(self, name: str) -> str:
        """An expression as the rule wrote it, for messages."""
        text = next(text for text, known in self.names.items() if known == name)
        for part in _words_of(text):
            if part in self.names.values():
                text = re.sub(rf"\b{part}\b", lambda _, part=part: self.spelt(part), text)
        return re.sub(r"h\['(\w+)'\]", r"h.\1", text)

    def symbol(self, text: str) -> Symbol:
        return Symbol(self, self.name(text))


class _Tracer:
    """The machine that records words."""

    def __init__(self, rule: str):
        self.rule = rule
        self.memory = _Memory(rule)
        self.count = 0
        self.instructions: list[Instruction] = []
        self.scalars: dict[str, Scalar] = {}
        self._seen: dict[Any, Register] = {}

    def register(self, mask: bool = False, reduced: bool = False) -> Register:
        self.count += 1
        return Register(self.count - 1, mask, reduced)

    def plain(self, value: Any) -> Any:
        return _plain(self.rule, value)

    def operand(self, value: Any) -> Operand:
        if isinstance(value, Symbol):
            return self.scalars.setdefault(value.text, Scalar(len(self.scalars)))
        return value if isinstance(value, Register) else float(value)

    def emit(self, word: str, *operands: Any) -> Register:
        """Record the word; the same word on the same operands is recorded once."""
        resolved = tuple(self.operand(value) for value in operands)
        key = (word, *((type(x), x) for x in resolved))
        if key not in self._seen:
            reduced = all(x.reduced for x in resolved if isinstance(x, Register))
            if reduced and word in REDUCTIONS:
                raise rule_errors.reduced_twice(self.rule, word)
            out = self.register(word in COMPARISONS, reduced or word in REDUCTIONS)
            self.instructions.append(Instruction(word, resolved, out))
            self._seen[key] = out
        return self._seen[key]


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


def static_key(rule: Any, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The group's options that decide the program: booleans, choices, which switches are on."""
    parts: list[Any] = []
    for name, fld in rule.fields.items():
        if name not in group or fld.free:
            continue
        if fld.switch:
            parts.append((name, bool(group[name])))
        elif isinstance(fld.default, tuple) and None in fld.default:  # pyright: ignore[reportUnknownMemberType]
            parts.append((name, *(x is None for x in group[name])))
        elif fld.static or isinstance(group[name], (bool, str)) or group[name] is None:
            parts.append((name, group[name]))
    return tuple(parts)


_programs: dict[Any, Program] = {}


def trace(rule: Any, update: Update, added: Added, group: Mapping[str, Any]) -> Program:
    """The program of `update` in a group with these static options; it is traced only once.

    Raises: AttributeError for a misspelt slot or hyper-parameter, TypeError for an `if` on a number.
    """
    key = (update, rule, added, static_key(rule, group))
    if key not in _programs:
        _programs[key] = _trace(rule, update, added, group)
    return _programs[key]


def _trace(rule: Any, update: Update, added: Added, group: Mapping[str, Any]) -> Program:
    tracer = _Tracer(rule.__name__)
    memory = tracer.memory
    fields = {name: fld for name, fld in rule.fields.items() if name in group and not fld.free}
    values = {name: _symbolic(memory, name, fld, group[name]) for name, fld in fields.items()}
    h = Hyper(tracer.rule, rule.fields, values)
    exists = {letter: slot for letter, slot in rule.slots.items() if slot.exists(dict(group))}
    slots = {letter: slot for letter, slot in exists.items() if not slot.per_tensor}
    scalar_slots = {letter: slot for letter, slot in exists.items() if slot.per_tensor}
    inputs = {name: tracer.register() for name in ("p", "g", *slots)}
    numbers: dict[str, Any] = {letter: Number(tracer, inputs[letter]) for letter in slots}
    numbers |= {letter: memory.symbol(f"n[{letter!r}]") for letter in scalar_slots}
    s = Slots(tracer, rule.slots, numbers)
    t = memory.symbol("t")
    new = one_step(update, added, h, Number(tracer, inputs["p"]), Number(tracer, inputs["g"]), s, t)

    outputs = {"p": new.handle}
    outputs |= {x: _as_register(tracer, s.numbers[x]) for x in slots if x in s.written}
    scalar_written = tuple(letter for letter in scalar_slots if letter in s.written)
    scalar_texts = [spell(s.numbers[letter]) for letter in scalar_written]
    instructions, used = _live(tracer.instructions, outputs)
    operands = [text for text, scalar in tracer.scalars.items() if scalar in used]
    renumber = {tracer.scalars[text]: Scalar(i) for i, text in enumerate(operands)}
    source = _scalar_source(memory, operands, scalar_texts)
    return Program(
        rule=tracer.rule,
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
        scalar_outputs=scalar_written,
        scalar_count=len(operands),
        scalar_source=source,
        scalars=_compile_scalars(source, partial(name_in, who=f"{tracer.rule}.update", written=update)),
    )


def _as_register(tracer: _Tracer, value: Any) -> Register:
    if isinstance(value, Number):
        return value.handle
    return tracer.emit("where", 1.0, value, Register(0))


def _live(
    instructions: list[Instruction], outputs: Mapping[str, Register]
) -> tuple[list[Instruction], set[Scalar]]:
    """The instructions that an output depends on, and the scalars they use."""
    needed = {register.index for register in outputs.values()}
    kept: list[Instruction] = []
    scalars: set[Scalar] = set()
    for step in reversed(instructions):
        if step.out.index in needed:
            kept.append(step)
            needed |= {x.index for x in step.operands if isinstance(x, Register)}
            scalars |= {x for x in step.operands if isinstance(x, Scalar)}
    return kept[::-1], scalars


def _scalar_source(memory: _Memory, operands: list[str], slot_texts: list[str]) -> str:
    """The text of the function that computes the scalars, without unused lines."""
    texts = {name: text for text, name in memory.names.items()}
    needed: set[str] = set()

    def need(expression: str) -> None:
        for name in texts:
            if name not in needed and _mentions(expression, name):
                needed.add(name)
                need(texts[name])

    for expression in (*operands, *slot_texts):
        need(expression)
    lines = [f"    {name} = {text}" for name, text in texts.items() if name in needed]
    first, second = (f"({''.join(x + ', ' for x in part)})" for part in (operands, slot_texts))
    return "\n".join(["def scalars(h, t, n):", *lines, f"    return {first}, {second}"])


@lru_cache(maxsize=4096)
def _words_of(expression: str) -> frozenset[str]:
    text = "".join(c if c.isalnum() or c == "_" else " " for c in expression)
    return frozenset(text.split())


def _mentions(expression: str, name: str) -> bool:
    return name in _words_of(expression)


def _compile_scalars(source: str, name_rule: Callable[..., None]) -> ScalarFunction:
    """Compile this source to a function whose errors name the rule."""
    head, *body = source.splitlines()
    lines = [head, "    try:", *(f"    {line}" for line in body)]
    lines += ["    except Exception as error:", "        name_rule(error)", "        raise"]
    scope: dict[str, Any] = {**SCALAR_WORDS, "name_rule": name_rule}
    exec(compile("\n".join(lines), "<scalars of a step rule>", "exec"), scope)
    return scope["scalars"]
