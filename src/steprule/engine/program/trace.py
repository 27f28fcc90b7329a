"""A composition, traced once into a straight list of words.

`trace` runs `update` on numbers that record what is done to them. The result does not depend on shapes, dtypes,
devices or the values of the hyper-parameters, so that a schedule never builds a new program. Only a rule that
asks whether a parameter is a matrix has two, one of them for vectors. A program has:

* `instructions`: one word each, over registers (one number per element, row or column of the parameter);
* `reductions`: the sums and maxima that make one plain number of many elements, or one value per row or column;
* `scalars`: everything made only of plain numbers, such as hyper-parameters, `t` and reductions: Python
  functions that compute it in double precision, the first before the first sweep over memory, each further one
  when a sweep has finished the reductions that it reads;
* `passes`: the sweeps, between which the reductions cut the instructions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from numbers import Real
from typing import Any, cast

from steprule import matrix_errors, rule_errors
from steprule.engine.composition import Composition, Hyper, Slots, one_step
from steprule.engine.fields import Field, Slot
from steprule.engine.program.program import (
    Decision,
    Instruction,
    Matrices,
    Operand,
    Program,
    Reduction,
    Register,
    Scalar,
    Scalars,
    Step,
    WholeInstruction,
    live,
)
from steprule.engine.written import name_in
from steprule.levels import finest, reduced
from steprule.plain import DOUBLE_WORDS, SCALAR_WORDS
from steprule.values import Number, Symbol, spell
from steprule.whole import MatrixWord

COMPARISONS = frozenset({"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"})


class _Memory:
    """Gives every distinct scalar expression one name."""

    def __init__(self, rule: str, path: tuple[bool, ...] | None = None):
        self.rule = rule
        self.names: dict[str, str] = {}
        # How the conditions of an `if` turn out, one after the other; None if there must be no such `if`.
        self.path = path
        self.conditions: list[Symbol] = []
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

    def decide(self, condition: Symbol) -> bool:
        """How a condition turns out on this path; a rule that asks for more takes the first way."""
        if self.path is None or condition.stage:
            raise rule_errors.truth_of_a_symbol(self.rule, self.spelt(condition.text))
        known = [x.text for x in self.conditions]
        if condition.text not in known:
            self.conditions.append(condition)
            known.append(condition.text)
        place = known.index(condition.text)
        return self.path[place] if place < len(self.path) else True

    def symbol(self, text: str, level: str = "all", stage: int = 0) -> Symbol:
        return Symbol(self, self.name(text, stage), level=level, stage=stage)


class _Tracer:
    """The machine that records words.

    matrix: whether the parameter is one. stacked: whether the rule that is asked sees a stack of them. seeded:
    the rule and the modifiers that may draw random numbers. path: of a rule on matrices, how the conditions of
    its `if`s turn out.
    """

    def __init__(
        self, rule: str, matrix: bool, stacked: bool, seeded: Container[str], path: tuple[bool, ...] | None
    ):
        self.rule = rule
        self.stacked = stacked
        self.matrix = matrix
        self.seeded = seeded
        self.draws = 0
        self.on_matrices = path is not None
        self.memory = _Memory(rule, path)
        self.count = 0
        self.instructions: list[Instruction | WholeInstruction] = []
        self.scalars: dict[str, Scalar] = {}
        self.stages: dict[Operand, int] = {}
        self.reductions: dict[Any, Reduction] = {}
        # What each call of a reduction over more than one tensor asks for, in order.
        self.calls: list[Reduction] = []
        # Whether the parameter's kind or its stacks were asked for, and the facts about it.
        self.asks_kind = False
        self.stacks = False
        self.facts: dict[str, str] = {}
        self._seen: dict[Any, Register] = {}
        # What is computed with whole matrices, and what is made only of that; see `Program`.
        self.gradient: Register | None = None
        self._whole: set[Register] = set()

    def given(self, slots: Mapping[str, Slot]) -> dict[str, Register]:
        """The registers of the parameter, the gradient and the slots with elements."""
        inputs = {name: self.register() for name in ("p", "g")}
        inputs |= {letter: self.register(level=slot.per) for letter, slot in slots.items()}
        self.gradient = inputs["g"]
        self._whole = {x for name, x in inputs.items() if name == "g" or x.level != "element"}
        return inputs

    def register(self, mask: bool = False, level: str = "element") -> Register:
        self.count += 1
        return Register(self.count - 1, mask, level)

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
            level = finest(x.level for x in resolved if isinstance(x, Register))
            out = self.register(word in COMPARISONS, level)
            self.instructions.append(Instruction(word, resolved, out))
            self._seen[key] = out
            self._stage(self.instructions[-1])
        return self._seen[key]

    def whole(self, word: MatrixWord, operands: Sequence[Any], form: str) -> Register:
        """Record a word on whole matrices."""
        if not self.matrix:
            raise matrix_errors.whole_matrices_in(self.rule, word.name, vectors=True)
        resolved = tuple(map(self._option, operands))
        key = (word, repr(resolved))
        if key not in self._seen:
            out = self.register(level=form)
            self.instructions.append(WholeInstruction(word, resolved, out))
            self._seen[key] = out
            self._stage(self.instructions[-1])
        return self._seen[key]

    def _stage(self, step: Step, after: bool = False) -> None:
        """Note how many sweeps must be finished before a step can be taken.

        Whole matrices are worked on between sweeps, and wait for the one that makes what they are given; the
        gradient is there. after: the step is finished only after a sweep.
        """
        out = cast(Register, step.out)
        whole = isinstance(step, WholeInstruction) or any(x.level != "element" for x in (out, *step.reads))
        waits = self.on_matrices and whole
        reads = {x: waits and x not in self._whole for x in step.reads}
        found = [self.stages.get(x, 0) + wait for x, wait in reads.items()]
        found += [self.stages.get(x, 0) for x in step.scalars]
        self.stages[out] = max(found, default=0) + (after and not self.on_matrices)
        if waits or (step.reads and self._whole.difference([self.gradient]).issuperset(step.reads)):
            self._whole.add(out)

    def _option(self, value: Any) -> Any:
        """An operand of a word on whole matrices."""
        if isinstance(value, tuple):
            return tuple(map(self._option, cast("tuple[Any, ...]", value)))
        return self.operand(value) if isinstance(value, Symbol) else value

    def reduce(self, word: str, operand: Register, over: str) -> Any:
        """What a reduction comes to; the same one is taken once."""
        level = reduced(operand.level, over) or over
        stage = self.stages.get(operand, 0)
        known = self.reductions.get((word, operand, over))
        if known is None:
            before = sum(x.shared and x.key[0] == self.rule for x in self.reductions.values())
            filled = ("row", "column", "matrix") if self.on_matrices else ("row", "column")
            out = self.register(level=level) if level in filled else None
            known = Reduction(len(self.reductions), word, operand, over, (self.rule, before), out)
            self.reductions[word, operand, over] = known
        if known.shared:
            self.calls.append(known)
        self.stacks |= self.stacked and over in ("row", "column")
        if known.out is not None:
            # A row is finished within a sweep, a column after it.
            self._stage(known, after=over == "column")
            return Number(self, known.out)
        level = "tensor" if level == "matrix" and not self.stacked else level
        return self.memory.symbol(f"r[{known.index}]", level, stage + 1)

    def level_of(self, handle: Register) -> str:
        """What has one value each."""
        return handle.level

    def draw(self, word: str) -> Register:
        """Record a random number for every element: which draw of the step it is."""
        if self.rule not in self.seeded:
            raise rule_errors.drawn_without_seed(self.rule, word)
        out = self.register()
        self.stages[out] = 0
        self.instructions.append(Instruction(word, (float(self.draws),), out))
        self.draws += 1
        return out

    def fact(self, name: str) -> Symbol:
        """A plain number that is known of the parameter before it is read."""
        stacked = self.stacked and name in ("rows", "columns")
        self.stacks |= stacked
        key = f"{name}(p) of stacked" if stacked else f"{name}(p)"
        self.facts[key] = name
        return self.memory.symbol(f"n[{key!r}]", "tensor")

    def is_matrix(self) -> bool:
        """Whether the parameter is a matrix."""
        self.asks_kind = True
        return self.matrix


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
        program, by_kind = _trace_twice(composition, group, matrix=True)
        of_vectors = _of_vectors(composition, group) if by_kind else None
        if by_kind and of_vectors is None:
            program = replace(program, only_matrices=True)
        if of_vectors is not None:
            if _asked(program) != _asked(of_vectors):
                raise rule_errors.sums_by_kind(composition.name)
            common = program.common | of_vectors.common
            program = replace(program, of_vectors=of_vectors, common=common)
        composition.programs[key] = program
    return program


def _of_vectors(composition: Composition, group: Mapping[str, Any]) -> Program | None:
    """The program of vectors, or None if the rule only says what matrices do."""
    try:
        return _trace_twice(composition, group, matrix=False)[0]
    except matrix_errors.NoMatrices:
        return None


def _trace_twice(composition: Composition, group: Mapping[str, Any], matrix: bool) -> tuple[Program, bool]:
    """The program of matrices or vectors, and whether there is a difference."""
    if composition.rule.on_matrices:
        return _every_way(composition, group, matrix, ())
    program, by_kind, _ = _trace(composition, group, matrix, None)
    if str(_trace(composition, group, matrix, None)[0]) != str(program):
        where = composition.method if composition.estimates else f"{composition.name}.update"
        raise rule_errors.changes_by_itself(where)
    return program, by_kind


def _every_way(
    composition: Composition, group: Mapping[str, Any], matrix: bool, path: tuple[bool, ...]
) -> tuple[Program, bool]:
    """The program of a rule on matrices whose first conditions turn out in this way.

    If there are more conditions, its `decision` has a program for either way in which the next turns out.
    """
    program, by_kind, tracer = _trace(composition, group, matrix, path)
    conditions = tracer.memory.conditions
    if len(path) < len(conditions):
        yes, by_kind_if = _every_way(composition, group, matrix, (*path, True))
        no, by_kind_else = _every_way(composition, group, matrix, (*path, False))
        if _asked(yes) != _asked(no):
            raise rule_errors.sums_by_kind(composition.name)
        text = spell(conditions[len(path)])
        lines = [f"    {name} = {value}" for name, value in _lines(tracer.memory, [text])]
        source = "\n".join(["def scalars(h, t, n):", *lines, f"    return bool({text})"])
        name_rule = partial(name_in, who=composition.method, written=composition.update)
        function = cast(Callable[..., bool], _compile_scalars(source, name_rule, SCALAR_WORDS))
        decision = Decision(source, tuple(tracer.facts), yes, no, function)
        return replace(yes, decision=decision), by_kind_if or by_kind_else
    again, _, _ = _trace(composition, group, matrix, path)
    if str(again) != str(program):
        raise rule_errors.changes_by_itself(f"{composition.name}.update")
    return program, by_kind


def _asked(program: Program) -> list[Any]:
    """The sums over several tensors."""
    return [(x.word, x.over, x.key) for x in program.calls]


def _trace(
    composition: Composition, group: Mapping[str, Any], matrix: bool, path: tuple[bool, ...] | None
) -> tuple[Program, bool, _Tracer]:
    rule = composition.rule
    tracer = _Tracer(rule.__name__, matrix, rule.matrices == "stacked", composition.seeds, path)
    memory = tracer.memory
    fields = {name: fld for name, fld in composition.fields.items() if name in group and not fld.free}
    values = {name: _symbolic(memory, name, fld, group[name]) for name, fld in fields.items()}
    h = Hyper(tracer.rule, composition.rule.fields, values)
    exists = {letter: slot for letter, slot in composition.slots.items() if slot.exists(dict(group))}
    by_kind = any(slot.only is not None for slot in exists.values())
    exists = {letter: slot for letter, slot in exists.items() if slot.fits(matrix)}
    slots = {letter: slot for letter, slot in exists.items() if slot.has_elements}
    scalar_slots = {letter: slot for letter, slot in exists.items() if not slot.has_elements}
    inputs = tracer.given(slots)
    numbers: dict[str, Any] = {letter: Number(tracer, inputs[letter]) for letter in slots}
    numbers |= {letter: memory.symbol(f"n[{letter!r}]", slot.per) for letter, slot in scalar_slots.items()}
    s = Slots(tracer, composition.slots, numbers)
    t = memory.symbol("t", "tensor")
    new = one_step(composition, h, Number(tracer, inputs["p"]), Number(tracer, inputs["g"]), s, t)

    outputs = {} if composition.estimates else {"p": _as_register(tracer, new, inputs["p"])}
    like = {x: inputs["p" if slot.per == "element" else x] for x, slot in slots.items()}
    outputs |= {x: _as_register(tracer, s.numbers[x], like[x]) for x in slots if x in s.written}
    written = {letter: s.numbers[letter] for letter in scalar_slots if letter in s.written}
    made, reductions, used = _needed(tracer, outputs, written)
    matrices = _matrices(made, slots, inputs, outputs) if path is not None and matrix else None
    if matrices is not None:
        inputs = {x: r for x, r in inputs.items() if r.level == "element"}
        outputs = {x: r for x, r in outputs.items() if x not in matrices.outputs}
        slots = {x: slot for x, slot in slots.items() if slot.per == "element"}
    name_rule = partial(name_in, who=composition.method, written=composition.update)
    scalars, renumber = _scalars(tracer, used, written, name_rule)
    program = Program(
        rule=composition.name,
        inputs=inputs,
        instructions=tuple(
            Instruction(
                x.word,
                tuple(renumber[y] if isinstance(y, Scalar) else y for y in x.operands),
                x.out,
            )
            for x in made
            if isinstance(x, Instruction)
        ),
        outputs=outputs,
        slots=slots,
        scalar_slots=scalar_slots,
        reductions=tuple(reductions),
        calls=tuple(tracer.calls),
        scalars=scalars,
        counts=not composition.estimates,
        common=frozenset(_hyperparameters_in(memory, written, scalar_slots)),
        facts=tuple(tracer.facts),
        stacked=tracer.stacks or any(x.stacked and x.per in ("row", "column") for x in slots.values()),
        matrices=matrices and matrices.renumbered(renumber),
    )
    return program, by_kind or tracer.asks_kind, tracer


def _matrices(
    made: Iterable[Step],
    slots: Mapping[str, Slot],
    inputs: Mapping[str, Register],
    outputs: Mapping[str, Register],
) -> Matrices:
    """What a step does with whole matrices."""
    own = {letter: slot for letter, slot in slots.items() if slot.per != "element"}
    instructions = tuple(x for x in made if isinstance(x, WholeInstruction))
    read = {x for step in made for x in step.reads} | set(outputs.values())
    return Matrices(
        {x: slot for x, slot in own.items() if inputs[x] in read or x in outputs},
        {x: inputs[x] for x in own if inputs[x] in read},
        {x: outputs[x] for x in own if x in outputs},
        instructions,
    )


def _hyperparameters_in(
    memory: _Memory, written: Mapping[str, Any], slots: Mapping[str, Slot]
) -> Iterable[str]:
    texts = [spell(value) for letter, value in written.items() if slots[letter].per == "all"]
    for _, text in _lines(memory, texts):
        yield from re.findall(r"h\['([\w.]+)'\]", text)


def _as_register(tracer: _Tracer, value: Any, like: Register) -> Register:
    """The register of a value, at the level of another register."""
    if isinstance(value, Number) and value.handle.level == like.level:
        return value.handle
    return tracer.emit("where", 1.0, value.handle if isinstance(value, Number) else value, like)


def _needed(
    tracer: _Tracer, outputs: Mapping[str, Register], written: Mapping[str, Any]
) -> tuple[list[Step], list[Reduction], set[Scalar]]:
    """What the outputs and the new values of coarse slots depend on."""
    texts = {scalar: text for text, scalar in tracer.scalars.items()}
    wanted = list(outputs.values())
    ending: list[Reduction] = []
    filling = [x for x in tracer.reductions.values() if x.out is not None]
    steps: list[Step] = [*tracer.instructions, *filling]
    made = sorted(steps, key=lambda x: x.out.index if x.out is not None else -1)
    while True:
        steps, used = live(made, wanted)
        asked = [*(texts[scalar] for scalar in used), *map(spell, written.values())]
        asked = {text for _, text in _lines(tracer.memory, asked)}
        more = [x for x in tracer.reductions.values() if f"r[{x.index}]" in asked and x not in ending]
        if not more:
            reductions = [*ending, *(x for x in steps if isinstance(x, Reduction))]
            return steps, sorted(reductions, key=lambda x: x.index), used
        ending += more
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
