"""What the words of CPU kernels are made of: kinds of values, words, and functions written in other words.

The text of a kernel is a small part of Python: whole numbers, floats, truth and pointers, words, loops over
`range`, `while`, `if`, and functions of these. `translator` says what it becomes.
"""
# llvmlite has no type annotations.
# pyright: basic

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir


@dataclass(frozen=True)
class Whole:
    """Whole numbers of so many bits."""

    bits: int
    signed: bool = True

    @property
    def type(self) -> ir.Type:
        """What LLVM calls them."""
        return ir.IntType(self.bits)


@dataclass(frozen=True)
class Real:
    """Floats of so many bits."""

    bits: int

    @property
    def type(self) -> ir.Type:
        """What LLVM calls them."""
        return ir.FloatType() if self.bits == 32 else ir.DoubleType()


@dataclass(frozen=True)
class Truth:
    """What comparisons give."""

    @property
    def type(self) -> ir.Type:
        """What LLVM calls it."""
        return ir.IntType(1)


@dataclass(frozen=True)
class Pointer:
    """Where elements of a kind are in memory."""

    to: Whole | Real

    @property
    def type(self) -> ir.Type:
        """What LLVM calls it."""
        return self.to.type.as_pointer()


@dataclass(frozen=True)
class Nothing:
    """What a word without a result gives."""

    @property
    def type(self) -> ir.Type:
        """What LLVM calls it."""
        return ir.VoidType()


Kind = Whole | Real | Truth | Pointer | Nothing

int8, int16, int32, int64 = (Whole(bits) for bits in (8, 16, 32, 64))
uint8, uint16, uint64 = (Whole(bits, signed=False) for bits in (8, 16, 64))
float32, float64 = Real(32), Real(64)
truth, nothing = Truth(), Nothing()

Build = Callable[..., Any]


@dataclass(frozen=True)
class Word:
    """One word: from the kinds of its operands, the kind of its result and what builds its instructions."""

    of: Callable[..., tuple[Kind, Build]]


@dataclass(frozen=True)
class Function:
    """A function in the language of kernels, and what kind of value it returns."""

    python: Any
    result: Kind


def function(result: Kind) -> Callable[[Any], Function]:
    """A function that returns this kind of value."""
    return lambda python: Function(python, result)


def word(result: Kind) -> Callable[[Build], Word]:
    """A word whose result is always of this kind, from the function that builds its instructions."""
    return lambda build: Word(lambda *kinds: (result, build))


def unary(build: Build) -> Word:
    """A word on one value, from the function that builds its instructions; the result is of the same kind."""
    return Word(lambda x: (x, build))


def binary(build: Build) -> Word:
    """A word on two values, with a result of the first one's kind."""
    return Word(lambda x, y: (x, build))


def ternary(build: Build) -> Word:
    """A word on three values, with a result of the last one's kind."""
    return Word(lambda x, y, z: (z, build))
