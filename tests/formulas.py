"""Random formulas in the language of rules, and their values in float64 by NumPy alone.

A formula is a tuple: a word and its operands, or a leaf. `said` reads it in the words of a rule, `meant` in
NumPy, with a bound on how far rounding may take any runner from the exact value. A comparison of what rounding
cannot tell apart, or a division by what may be zero, has an infinite bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from kernels import with_one_nan
from rules import flat, numbers
from torch import nn

from steprule import Elementwise, hyper, scalar_slot, slot, words
from steprule.words import becomes, clamp, ema, larger, largest, lerp, mean, norm, smaller, where

Formula = tuple[Any, ...]

ELEMENTS = ("p", "g", "m", "n")
PLAIN = ("lr", "pair0", "pair1", "t", "u")
CONSTANTS = (0.0, 1.0, -1.0, 0.5, 2, 3.0, -0.25, 10)


def _power(x: Any, y: Any) -> Any:
    return (abs(x) + 0.25) ** words.clamp(y, -3.0, 3.0)


def _power_meant(x: Any, y: Any) -> Any:
    return (abs(x) + 0.25) ** np.clip(y, -3.0, 3.0)


def _operands(function: Any) -> int:
    return function.nin if isinstance(function, np.ufunc) else function.__code__.co_argcount


# Each word: how a rule says it, what it means, and whether every runner rounds it alike.
WORDS: dict[str, tuple[Callable[..., Any], Callable[..., Any], bool]] = {
    "add": (lambda x, y: x + y, np.add, True),
    "sub": (lambda x, y: x - y, np.subtract, True),
    "mul": (lambda x, y: x * y, np.multiply, True),
    "fused": (lambda x, y, z: x + y * z, lambda x, y, z: x + y * z, True),
    "div": (lambda x, y: x / (abs(y) + 0.5), lambda x, y: x / (abs(y) + 0.5), True),
    "neg": (lambda x: -x, np.negative, True),
    "abs": (abs, np.abs, True),
    "sign": (words.sign, np.sign, True),
    "square": (lambda x: x**2, np.square, True),
    "less": (lambda x, y: x < y, np.less, True),
    "at_most": (lambda x, y: x <= y, np.less_equal, True),
    "greater": (lambda x, y: x > y, np.greater, True),
    "equal": (lambda x, y: x == y, np.equal, True),
    "different": (lambda x, y: x != y, np.not_equal, True),
    "larger": (words.larger, np.maximum, True),
    "smaller": (words.smaller, np.minimum, True),
    "clamp": (words.clamp, lambda x, low, high: np.minimum(np.maximum(x, low), high), True),
    "where": (where, lambda x, y, z: np.where(x != 0, y, z), True),
    "lerp": (words.lerp, lambda x, y, z: x + z * (y - x), True),
    "ema": (words.ema, lambda x, y, z: z * x + (1 - z) * y, True),
    "ema_sq": (words.ema_sq, lambda x, y, z: z * x + (1 - z) * y * y, True),
    "sqrt": (lambda x: words.sqrt(abs(x)), lambda x: np.sqrt(abs(x)), False),
    "exp": (lambda x: words.exp(-abs(x)), lambda x: np.exp(-abs(x)), False),
    "log": (lambda x: words.log(abs(x) + 0.5), lambda x: np.log(abs(x) + 0.5), False),
    "atan2": (
        lambda x, y: words.atan2(x, abs(y) + 0.5),
        lambda x, y: np.arctan2(x, abs(y) + 0.5),
        False,
    ),
    "power": (_power, _power_meant, False),
    "root": (lambda x: (abs(x) + 1) ** 0.5, lambda x: (abs(x) + 1) ** 0.5, False),
}
ARITY = {name: _operands(meaning) for name, (_, meaning, _) in WORDS.items()}
REDUCTIONS = {"mean": words.mean, "norm": words.norm, "largest": words.largest}


def formulas(words: tuple[str, ...], depth: int = 3) -> Any:
    """Formulas over all leaves, made of these words and of reductions."""
    leaf = st.sampled_from(
        [*((x,) for x in (*ELEMENTS, *ELEMENTS, *PLAIN)), *(("const", x) for x in CONSTANTS)]
    )
    formula = leaf
    for _ in range(depth):
        inner = formula
        made = [st.tuples(st.just(name), *(inner for _ in range(ARITY[name]))) for name in words]
        reduced = st.tuples(st.sampled_from(sorted(REDUCTIONS)), inner).map(_at_most_once)
        formula = leaf | st.one_of(made) | st.one_of(made) | reduced
    return formula


def level(formula: Formula) -> int:
    """2 for a value per element, 1 for one per tensor, 0 for a plain number."""
    if formula[0] in ELEMENTS:
        return 2
    if formula[0] in REDUCTIONS:
        return 1
    return max((level(x) for x in formula[1:] if isinstance(x, tuple)), default=0)


def _at_most_once(formula: Formula) -> Formula:
    return formula if level(formula[1]) == 2 else formula[1]


def words_in(formula: Formula) -> set[str]:
    return {formula[0]}.union(*(words_in(x) for x in formula[1:] if isinstance(x, tuple)))


def said(formula: Formula, values: dict[str, Any]) -> Any:
    """The formula in the words of a rule."""
    name, *operands = formula
    if name == "const":
        return operands[0]
    if not operands:
        return values[name]
    carry_out = REDUCTIONS[name] if name in REDUCTIONS else WORDS[name][0]
    return carry_out(*(said(x, values) for x in operands))


Bounded = tuple[Any, Any]

# One rounding of a runner's float32 or float64, relative; and what is next to 0 in it.
SINGLE, DOUBLE = 2.0**-24, 2.0**-53
SMALLEST = {SINGLE: 1e-35, DOUBLE: 1e-300}


def meant(formula: Formula, values: dict[str, Bounded], unit: float) -> Bounded:
    """The exact value, and how far rounding may take it. unit: the relative error of one rounding."""
    name, *operands = formula
    if name == "const":
        return float(operands[0]), 0.0
    if not operands:
        return values[name]
    given = [meant(x, values, unit) for x in operands]
    if name in REDUCTIONS:
        return _reduced(name, *given[0], unit)
    carry_out = WORDS[name][1]
    exact = np.asarray(carry_out(*(x for x, _ in given)), dtype=np.float64)
    bound = np.zeros_like(exact)
    for signs in itertools.product((-1, 1), repeat=len(given)):
        corner = carry_out(*(x + sign * e for sign, (x, e) in zip(signs, given, strict=True)))
        bound = np.maximum(bound, abs(np.asarray(corner, dtype=np.float64) - exact))
    # An intermediate result may be larger than the last one.
    size = sum(abs(x) for x, _ in given) if name in ("fused", "lerp", "ema", "ema_sq") else 0.0
    size = size + size * size if name in ("fused", "ema_sq") else size
    size = 1.0 if name == "log" else size
    bound = bound + unit * (8 * abs(exact) + 8 * size) + SMALLEST[unit]
    return exact, np.where(abs(exact) < 1 / SMALLEST[unit], bound, np.inf)


def _reduced(name: str, x: Any, bound: Any, unit: float) -> Bounded:
    bound = np.broadcast_to(bound, np.shape(x))
    if name == "mean":
        return np.mean(x), np.mean(bound) + unit * np.mean(abs(x))
    if name == "norm":
        return np.sqrt(np.sum(x * x)), np.sqrt(np.sum(bound * bound)) + 4 * unit * np.sqrt(np.sum(x * x))
    return np.max(x), np.max(bound)


# Rules of such formulas, and their results

SHAPES = ((3, 2), (), (7,))
STEPS = 2
EXACT = tuple(name for name, (_, _, exact) in WORDS.items() if exact)
FLOATS = [torch.float32, torch.float64, torch.bfloat16]
RETURNS = ("change", "two changes", "becomes")


def rule_of(m: Formula, n: Formula, u: Formula, result: Formula, returns: str) -> Any:
    """A rule of these formulas."""

    class Drawn(Elementwise):
        lr: float = hyper(0.1)
        pair: tuple[float, float] = hyper((0.5, 1.5))

        m = slot("m", starts=0.25)
        n = slot("n")
        u = scalar_slot("u", starts=1.0)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
            values = {"p": p, "g": g, "m": s.m, "n": s.n, "u": s.u, "t": t, "lr": h.lr}
            values |= {"pair0": h.pair[0], "pair1": h.pair[1]}
            s.m, s.n, s.u = (said(x, values) for x in (m, n, u))
            change = said(result, values)
            change = float(change) if isinstance(change, bool) else change
            # Drawn formulas may be p or a comparison, which a rule is otherwise refused to return.
            change = words.Number.of(change) if isinstance(change, words.Number) else change
            if returns == "becomes":
                return becomes(change)
            return (change, g) if returns == "two changes" else change

    return Drawn


@st.composite
def drawn(draw: Any, words: tuple[str, ...] = tuple(WORDS), depth: int = 3) -> Any:
    """The formulas of a rule, and what it returns."""
    parts = [draw(formulas(words, depth)) for _ in range(3)]
    plain = draw(st.sampled_from([("u",), ("t",), ("mul", ("u",), ("pair0",)), ("less", ("t",), ("const", 2))]))
    return (*parts[:2], plain, parts[2], draw(st.sampled_from(RETURNS)))


def make(rule: Any, dtype: torch.dtype, shapes: Any = SHAPES, device: Any = "cpu", **options: Any) -> Any:
    starts = (numbers(shape, dtype, 100 + i).to(device) for i, shape in enumerate(shapes))
    return rule([nn.Parameter(start) for start in starts], **options)


def give(optimizer: Any, step: int) -> None:
    for place, param in enumerate(flat(optimizer)):
        param.grad = numbers(tuple(param.shape), param.dtype, 1000 * step + place).to(param.device)


def advance(optimizer: Any) -> Any:
    for step in range(STEPS):
        give(optimizer, step)
        optimizer.step()
    return optimizer


def results(optimizer: Any) -> list[Any]:
    """Parameters and slots, any NaN as good as another."""
    slots = [{x: with_one_nan(optimizer.state[p][x]) for x in ("m", "n", "u")} for p in flat(optimizer)]
    return [{"p": with_one_nan(p.detach()), **s} for p, s in zip(flat(optimizer), slots, strict=True)]


def meaning(parts: Any, dtype: torch.dtype, shapes: Any = SHAPES) -> list[dict[str, Any]]:
    """The exact parameters and slots after the steps, and how far rounding may take them."""
    m, n, u, result, returns = parts
    unit = DOUBLE if dtype in (torch.float64, torch.complex128) else SINGLE
    rounding = 2.0**-8 if dtype == torch.bfloat16 else unit

    def array(tensor: torch.Tensor) -> Any:
        return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().numpy()

    found: list[dict[str, Any]] = []
    for place, shape in enumerate(shapes):
        start = array(numbers(shape, dtype, 100 + place))
        state: dict[str, Any] = {
            "p": (start, 0.0),
            "m": (start * 0 + 0.25, 0.0),
            "n": (start * 0, 0.0),
            "u": (1.0, 0.0),
        }
        for step in range(STEPS):
            g = array(numbers(shape, dtype, 1000 * step + place))
            plain = {
                "g": (g, 0.0),
                "t": (step + 1.0, 0.0),
                "lr": (0.1, 0.0),
                "pair0": (0.5, 0.0),
                "pair1": (1.5, 0.0),
            }
            values = state | plain
            change = meant(result, values, unit)
            if returns != "becomes":
                change = meant(("add", ("p",), ("change",)), values | {"change": change}, unit)
            if returns == "two changes":
                change = meant(("add", ("change",), ("g",)), values | {"change": change}, unit)
            state = {
                "p": change,
                "m": meant(m, values, unit),
                "n": meant(n, values, unit),
                "u": meant(u, values, unit),
            }
            shapes_of = {x: () if x == "u" else start.shape for x in state}
            state = {
                x: (np.broadcast_to(v, shapes_of[x]), np.broadcast_to(e + rounding * abs(v), shapes_of[x]))
                for x, (v, e) in state.items()
            }
        found.append(state)
    return found


def assert_meant(parts: Any, optimizer: Any, dtype: torch.dtype, shapes: Any = SHAPES) -> None:
    for place, (one, other) in enumerate(zip(results(optimizer), meaning(parts, dtype, shapes), strict=True)):
        for name, (exact, bound) in other.items():
            given = one[name]
            given = (torch.view_as_real(given) if given.is_complex() else given).double().cpu().numpy()
            fine = ~np.isfinite(bound + exact) | (abs(given - exact) <= 2 * bound)
            assert fine.all(), f"{name} {place}: {given}, meant {exact} within {bound}"


# Single formulas and their values: cases that random ones rarely find

# ‖p‖ = 3, ‖g‖ = 5, mean(g > 0) = 1/3
FORMULAS: dict[str, tuple[Any, list[float]]] = {
    "a reduced value on the left": (lambda h, p, g, s, t: norm(p) * g, [9, 0, -12]),
    "it plus": (lambda h, p, g, s, t: norm(p) + g, [6, 3, -1]),
    "it minus a product": (lambda h, p, g, s, t: norm(p) - h.lr * g, [1.5, 3, 5]),
    "one over another": (lambda h, p, g, s, t: norm(p) / norm(g) * p, [0.6, 1.2, 1.2]),
    "1 over it": (lambda h, p, g, s, t: 1 / norm(g) + 0 * p, [0.2] * 3),
    "it alone": (lambda h, p, g, s, t: norm(p), [3] * 3),
    "a choice by it": (lambda h, p, g, s, t: where(norm(g) > 4, p, g), [1, 2, 2]),
    "a choice of it": (lambda h, p, g, s, t: where(g > 0, norm(g), mean(p)), [5, 5 / 3, 5 / 3]),
    "a choice of plain numbers by it": (lambda h, p, g, s, t: where(norm(g) > 4, h.lr, 7.0), [0.5] * 3),
    "a choice of plain numbers": (lambda h, p, g, s, t: where(g > 0, 1.0, h.lr), [1, 0.5, 0.5]),
    "a choice by t": (lambda h, p, g, s, t: where(t == 1, 0.0, g), [0] * 3),
    "an average from 0": (lambda h, p, g, s, t: ema(where(t == 1, 0.0, p), g, 0.5), [1.5, 0, -2]),
    "a choice by h": (lambda h, p, g, s, t: where(h.lr, p, g), [1, 2, 2]),
    "a choice by a value": (lambda h, p, g, s, t: where(g, p, 9.0), [1, 9, 2]),
    "the mean of a mask": (lambda h, p, g, s, t: mean(g > 0), [1 / 3] * 3),
    "the norm of a mask": (lambda h, p, g, s, t: norm(g == 0), [1] * 3),
    "a mask as a number": (lambda h, p, g, s, t: (g > 0) + 2 * (p > 1), [1, 2, 2]),
    "a mask alone": (lambda h, p, g, s, t: g >= 0, [1, 1, 0]),
    "minus a mask": (lambda h, p, g, s, t: -(g > 0) - (p > 1), [-1, -1, -1]),
    "a truth as a number": (lambda h, p, g, s, t: (t == 1) * g + (1 - (t > 1)), [4, 1, -3]),
    "the larger of it": (lambda h, p, g, s, t: larger(mean(p), g), [3, 5 / 3, 5 / 3]),
    "the smaller of it and a number": (lambda h, p, g, s, t: smaller(norm(g), 4.0) + 0 * g, [4] * 3),
    "between two of them": (lambda h, p, g, s, t: clamp(g, -norm(p), mean(p)), [5 / 3, 0, -3]),
    "between one and a number": (lambda h, p, g, s, t: clamp(g, -1, norm(p)), [3, 0, -1]),
    "its power": (lambda h, p, g, s, t: norm(p) ** 2 + 0 * p, [9] * 3),
    "to its power": (lambda h, p, g, s, t: p ** norm(p), [1, 8, 8]),
    "a number to its power": (lambda h, p, g, s, t: 2 ** norm(p) + 0 * p, [8] * 3),
    "lerp of plain numbers": (lambda h, p, g, s, t: lerp(0.0, 2.0, g > 0), [2, 0, 0]),
    "lerp towards it": (lambda h, p, g, s, t: lerp(norm(p), g, h.lr), [3, 1.5, -0.5]),
    "the largest of it times": (lambda h, p, g, s, t: largest(norm(p) * g), [9] * 3),
    "a plain number": (lambda h, p, g, s, t: h.lr, [0.5] * 3),
    "NaN": (lambda h, p, g, s, t: where(g > 0, float("nan"), g), [float("nan"), 0, -4]),
}


def rule_of_all() -> Any:
    """One rule that keeps the value of every formula of FORMULAS, each in its own slot."""

    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        for place, (formula, _) in enumerate(FORMULAS.values()):
            setattr(s, f"m{place}", formula(h, p, g, s, t))
        return becomes(norm(p))

    slots = {f"m{place}": slot(kind) for place, kind in enumerate(FORMULAS)}
    body = {"__module__": __name__, "lr": hyper(0.5), "__annotations__": {"lr": "float"}}
    return type("Mine", (Elementwise,), {**body, "update": staticmethod(update), **slots})


def assert_all_right(optimizer: Any, step: Any) -> None:
    """After a step of the rule above from p = (1, 2, 2) and g = (3, 0, -4)."""
    (param,) = flat(optimizer)
    param.grad = torch.tensor([3.0, 0.0, -4.0], dtype=param.dtype, device=param.device)
    step()
    given = {kind: optimizer.state[param][kind].tolist() for kind in FORMULAS}
    assert given == {
        kind: pytest.approx(wanted, rel=1e-5, nan_ok=True) for kind, (_, wanted) in FORMULAS.items()
    }
    assert param.tolist() == pytest.approx([3] * 3, rel=1e-5)


def parameter_of_all(dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Any:
    return nn.Parameter(torch.tensor([1.0, 2.0, 2.0], dtype=dtype, device=device))
