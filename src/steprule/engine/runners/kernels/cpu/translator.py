"""Translates the text of a kernel to LLVM's language.

Every variable has one kind, that of what is assigned to it first. Arithmetic is that of Python on int64 and of
IEEE 754 on floats, each operation rounded on its own; a quotient of whole numbers by 0 is 0.
"""
# llvmlite has no type annotations.
# pyright: basic

from __future__ import annotations

import ast
import builtins
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from llvmlite import ir

from steprule.engine.runners.kernels.cpu.language import (
    Function,
    Kind,
    Pointer,
    Real,
    Whole,
    Word,
    float32,
    float64,
    int64,
    nothing,
    truth,
)


class Value(NamedTuple):
    """What an expression becomes."""

    kind: Kind
    code: Any


# What kernels call the kinds that they convert numbers to.
CASTS: dict[Any, Whole | Real] = {numpy.float32: float32, numpy.float64: float64}

FLOATS: dict[type, str] = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
WHOLES: dict[type, str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.LShift: "shl",
    ast.BitAnd: "and_",
    ast.BitOr: "or_",
    ast.BitXor: "xor",
}
COMPARISONS: dict[type, str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}


def module_of(text: str, file: str, entry: str) -> ir.Module:
    """A module with one C function void(int64) of this name, from a text that defines `kernel(job)`."""
    tree = ast.parse(text, file)
    names: dict[str, Any] = {}
    exec(compile(tree, file, "exec"), names)
    (kernel,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "kernel")
    module = _Module()
    module.define(entry, kernel, names, [int64], nothing)
    return module.ir


class _Module:
    """The functions that a kernel consists of."""

    def __init__(self) -> None:
        # Not the context that all modules share by default: it keeps what it has seen.
        self.ir = ir.Module(context=ir.Context())
        self._known: dict[tuple[Function, tuple[Kind, ...]], ir.Function] = {}

    def define(
        self, name: str, node: ast.FunctionDef, names: Mapping[str, Any], kinds: list[Kind], result: Kind
    ) -> ir.Function:
        """A function of values of these kinds."""
        made = ir.Function(self.ir, ir.FunctionType(result.type, [x.type for x in kinds]), name)
        operands = [Value(*pair) for pair in zip(kinds, made.args, strict=True)]
        _Body(self, made, names, result).translate(node, operands)
        return made

    def function(self, given: Function, kinds: list[Kind]) -> ir.Function:
        """The function for operands of these kinds, which is made once."""
        key = given, tuple(kinds)
        if key not in self._known:
            node, names = _definition(given.python)
            made = self.define(f"{node.name}.{len(self._known)}", node, names, kinds, given.result)
            made.linkage = "internal"
            self._known[key] = made
        return self._known[key]


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


@cache
def _definition(python: Any) -> tuple[ast.FunctionDef, Mapping[str, Any]]:
    """The text of a function, and what the names in it mean."""
    code = python.__code__
    found = (x for x in ast.walk(_tree(code.co_filename)) if isinstance(x, ast.FunctionDef))
    # A decorated function begins at its decorator.
    (node,) = (x for x in found if x.decorator_list and x.decorator_list[0].lineno == code.co_firstlineno)
    closure = zip(code.co_freevars, python.__closure__ or (), strict=True)
    return node, {**python.__globals__, **{name: cell.cell_contents for name, cell in closure}}


def _constant_of(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """What an expression of names that are known beforehand is."""
    if isinstance(node, ast.Attribute):
        return getattr(_constant_of(node.value, names), node.attr)
    assert isinstance(node, ast.Name)
    return names[node.id] if node.id in names else getattr(builtins, node.id)


class _Body:
    """The body of one function. A method with the name of a kind of node in Python's `ast` translates it."""

    def __init__(self, module: _Module, made: ir.Function, names: Mapping[str, Any], result: Kind) -> None:
        self.module, self.names, self.result = module, names, result
        self.builder: Any = ir.IRBuilder(made.append_basic_block("entry"))
        self.variables: dict[str, Value] = {}

    def translate(self, node: ast.FunctionDef, operands: list[Value]) -> None:
        """Translate all of it. node: its definition."""
        for parameter, operand in zip(node.args.args, operands, strict=True):
            self._set(parameter.arg, operand)
        self._statements(node.body)
        if not self.builder.block.is_terminated:
            # A function with a result returns it on every way through it.
            self.builder.ret_void() if self.result == nothing else self.builder.unreachable()

    # Statements

    def _statements(self, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            getattr(self, type(node).__name__)(node)

    def Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.value(node.value)

    def Return(self, node: ast.Return) -> None:
        if node.value is None:
            self.builder.ret_void()
            return
        value = self.value(node.value)
        _same(value.kind, self.result)
        self.builder.ret(value.code)

    def Assign(self, node: ast.Assign) -> None:
        (target,) = node.targets
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        sources = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        # All of them are computed before the first is stored.
        for one, value in zip(targets, [self.value(x) for x in sources], strict=True):
            self._store(one, value)

    def AugAssign(self, node: ast.AugAssign) -> None:
        value = self.value(node.value)
        if isinstance(node.target, ast.Subscript):
            array, place = self._element(node.target)
            before = Value(array.to, self.builder.load(place))
            self.builder.store(self._arithmetic(node.op, before, value).code, place)
        else:
            self._store(node.target, self._arithmetic(node.op, self.value(node.target), value))

    def _store(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self._set(target.id, value)
            return
        assert isinstance(target, ast.Subscript)
        array, place = self._element(target)
        _same(value.kind, array.to)
        self.builder.store(value.code, place)

    def _set(self, name: str, value: Value) -> None:
        if name not in self.variables:
            with self.builder.goto_entry_block():
                room = self.builder.alloca(value.kind.type, name=name)
            self.variables[name] = Value(value.kind, room)
        known = self.variables[name]
        _same(value.kind, known.kind)
        self.builder.store(value.code, known.code)

    def If(self, node: ast.If) -> None:
        yes, no = (self.builder.append_basic_block(x) for x in ("then", "else"))
        end = self.builder.append_basic_block("end")
        self._choose(node.test, yes, no)
        for block, statements in ((yes, node.body), (no, node.orelse)):
            self.builder.position_at_end(block)
            self._statements(statements)
            self._go(end)
        self.builder.position_at_end(end)

    def While(self, node: ast.While) -> None:
        head, body, end = (self.builder.append_basic_block(x) for x in ("while", "body", "end"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self._choose(node.test, body, end)
        self.builder.position_at_end(body)
        self._statements(node.body)
        self._go(head)
        self.builder.position_at_end(end)

    def For(self, node: ast.For) -> None:
        """A loop over `range`, whose step is positive."""
        assert isinstance(node.iter, ast.Call)
        assert isinstance(node.target, ast.Name)
        given = [self.value(x).code for x in node.iter.args]
        first, stop = given[:2] if len(given) > 1 else (ir.Constant(int64.type, 0), *given)
        step = given[2] if len(given) > 2 else ir.Constant(int64.type, 1)
        before = self.builder.block
        head, body, end = (self.builder.append_basic_block(x) for x in ("for", "body", "end"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        here = self.builder.phi(int64.type)
        here.add_incoming(first, before)
        self.builder.cbranch(self.builder.icmp_signed("<", here, stop), body, end)
        self.builder.position_at_end(body)
        self._set(node.target.id, Value(int64, here))
        self._statements(node.body)
        here.add_incoming(self.builder.add(here, step, flags=("nsw",)), self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(end)

    def _go(self, block: ir.Block) -> None:
        if not self.builder.block.is_terminated:
            self.builder.branch(block)

    def _choose(self, test: ast.expr, yes: ir.Block, no: ir.Block) -> None:
        """Go to one of two blocks. What decides nothing any more is not computed."""
        if not isinstance(test, ast.BoolOp):
            value = self.value(test)
            _same(value.kind, truth)
            self.builder.cbranch(value.code, yes, no)
            return
        *others, last = test.values
        for one in others:
            following = self.builder.append_basic_block("test")
            self._choose(one, *((following, no) if isinstance(test.op, ast.And) else (yes, following)))
            self.builder.position_at_end(following)
        self._choose(last, yes, no)

    # Expressions

    def value(self, node: ast.expr) -> Value:
        """What an expression becomes."""
        return getattr(self, type(node).__name__)(node)

    def Constant(self, node: ast.Constant) -> Value:
        return _number(node.value)

    def Name(self, node: ast.Name) -> Value:
        known = self.variables.get(node.id)
        if known is None:
            return _number(_constant_of(node, self.names))
        return Value(known.kind, self.builder.load(known.code))

    def Attribute(self, node: ast.Attribute) -> Value:
        return _number(_constant_of(node, self.names))

    def Subscript(self, node: ast.Subscript) -> Value:
        array, place = self._element(node)
        return Value(array.to, self.builder.load(place))

    def _element(self, node: ast.Subscript) -> tuple[Pointer, Any]:
        array = self.value(node.value)
        assert isinstance(array.kind, Pointer)
        return array.kind, self.builder.gep(array.code, [self.value(node.slice).code])

    def UnaryOp(self, node: ast.UnaryOp) -> Value:
        value = self.value(node.operand)
        assert isinstance(node.op, ast.USub)
        build = self.builder.fneg if isinstance(value.kind, Real) else self.builder.neg
        return Value(value.kind, build(value.code))

    def BinOp(self, node: ast.BinOp) -> Value:
        return self._arithmetic(node.op, self.value(node.left), self.value(node.right))

    def _arithmetic(self, op: ast.operator, a: Value, b: Value) -> Value:
        _same(a.kind, b.kind)
        if isinstance(a.kind, Real):
            return Value(a.kind, getattr(self.builder, FLOATS[type(op)])(a.code, b.code))
        assert isinstance(a.kind, Whole)
        if isinstance(op, (ast.FloorDiv, ast.Mod)):
            return self._divided(op, a, b)
        name = WHOLES.get(type(op)) or ("ashr" if a.kind.signed else "lshr")
        return Value(a.kind, getattr(self.builder, name)(a.code, b.code))

    def _divided(self, op: ast.operator, a: Value, b: Value) -> Value:
        """The quotient, rounded down, or what is left over; by 0 both are 0."""
        builder, zero = self.builder, ir.Constant(int64.type, 0)
        _same(a.kind, int64)
        none = builder.icmp_signed("==", b.code, zero)
        by = builder.select(none, ir.Constant(int64.type, 1), b.code)
        quotient, rest = builder.sdiv(a.code, by), builder.srem(a.code, by)
        other_sign = builder.icmp_signed("<", builder.xor(rest, by), zero)
        off = builder.and_(builder.icmp_signed("!=", rest, zero), other_sign)
        if isinstance(op, ast.Mod):
            result = builder.add(rest, builder.select(off, by, zero))
        else:
            result = builder.add(quotient, builder.sext(off, int64.type))
        return Value(int64, builder.select(none, zero, result))

    def Compare(self, node: ast.Compare) -> Value:
        (op,), (right,) = node.ops, node.comparators
        a, b, name = self.value(node.left), self.value(right), COMPARISONS[type(op)]
        _same(a.kind, b.kind)
        if isinstance(a.kind, Real):
            # Nothing equals NaN, and nothing is less or greater.
            build = self.builder.fcmp_unordered if name == "!=" else self.builder.fcmp_ordered
        else:
            assert isinstance(a.kind, Whole)
            build = self.builder.icmp_signed if a.kind.signed else self.builder.icmp_unsigned
        return Value(truth, build(name, a.code, b.code))

    def IfExp(self, node: ast.IfExp) -> Value:
        yes, no, end = (self.builder.append_basic_block(x) for x in ("then", "else", "end"))
        self._choose(node.test, yes, no)
        found: list[tuple[Value, ir.Block]] = []
        for block, expression in ((yes, node.body), (no, node.orelse)):
            self.builder.position_at_end(block)
            found.append((self.value(expression), self.builder.block))
            self.builder.branch(end)
        self.builder.position_at_end(end)
        kind = found[0][0].kind
        result = self.builder.phi(kind.type)
        for value, block in found:
            _same(value.kind, kind)
            result.add_incoming(value.code, block)
        return Value(kind, result)

    def Call(self, node: ast.Call) -> Value:
        called, operands = _constant_of(node.func, self.names), [self.value(x) for x in node.args]
        kinds, codes = [x.kind for x in operands], [x.code for x in operands]
        if isinstance(called, Word):
            kind, build = called.of(*kinds)
            return Value(kind, build(self.builder, *codes))
        if isinstance(called, Function):
            return Value(called.result, self.builder.call(self.module.function(called, kinds), codes))
        if called in (max, min):
            _same(*kinds)
            larger = self.builder.icmp_signed(">" if called is max else "<", *codes)
            return Value(kinds[0], self.builder.select(larger, *codes))
        (operand,) = operands
        kind: Any = CASTS.get(called, called)
        return Value(kind, self._cast(operand, kind))

    def _cast(self, value: Value, kind: Whole | Real) -> Any:
        """A number in another kind."""
        given, builder = value.kind, self.builder
        if given == kind:
            return value.code
        if isinstance(given, Real):
            assert isinstance(kind, Real)
            return (builder.fpext if kind.bits > given.bits else builder.fptrunc)(value.code, kind.type)
        assert isinstance(given, Whole)
        if isinstance(kind, Real):
            return (builder.sitofp if given.signed else builder.uitofp)(value.code, kind.type)
        assert kind.bits == given.bits
        return value.code


def _number(x: Any) -> Value:
    if isinstance(x, float):
        return Value(float64, ir.Constant(float64.type, x))
    assert type(x) is int
    return Value(int64, ir.Constant(int64.type, x))


def _same(a: Kind, b: Kind) -> None:
    if a != b:
        raise TypeError(f"{a} where {b} is needed")
