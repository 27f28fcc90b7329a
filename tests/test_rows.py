"""Values per row and per column, and facts about shapes: every runner comes to what is meant."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rules import assert_same, assert_same_run, flat, numbers
from torch import nn

from steprule import Elementwise, Modifier, explain, hyper, slot
from steprule.engine.program import sums
from steprule.words import (
    columns,
    ema,
    ema_sq,
    is_matrix,
    larger,
    largest,
    mean,
    norm,
    rows,
    size,
    sqrt,
    total,
    where,
)

SHAPES: tuple[tuple[int, ...], ...] = ((5, 7), (36, 20), (2, 3, 4), (3, 1), (1, 33), (17,), ())
RUNNERS = {"loop": {"foreach": False, "fused": False}, "default": {}}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


class RowWise(Elementwise):
    """A second moment of each row; all four words; values per row that change what elements do."""

    lr: float = hyper(default=0.1, at_least=0)
    m = slot("exp_avg")
    v = slot("row_sq", per="row", never_negative=True)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        g = g - mean(g, over="row")
        s.v = ema(s.v, norm(g, over="row") ** 2 / columns(p), 0.5)
        u = g / (sqrt(s.v / (1 - 0.5**t)) + 1e-8)
        top = largest(abs(u), over="row")
        s.m = ema(s.m, where(top > 2, u / top, u), 0.9)
        return -h.lr * s.m / larger(1.0, mean(top, over="column")) - 1e-3 * total(p, over="row")


def row_wise(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    rows = len(p) if p.ndim > 1 else 1
    flat_p, g = p.reshape(rows, -1), g.reshape(rows, -1)
    g = g - g.mean(1, keepdims=True)
    s["v"] = 0.5 * s.get("v", 0.0) + 0.5 * (g**2).sum(1, keepdims=True) / g.shape[1]
    u = g / (np.sqrt(s["v"] / (1 - 0.5**t)) + 1e-8)
    top = abs(u).max(1, keepdims=True)
    s["m"] = 0.9 * s.get("m", 0.0) + 0.1 * np.where(top > 2, u / np.where(top > 0, top, 1), u)
    change = -0.1 * s["m"] / max(1.0, top.mean()) - 1e-3 * flat_p.sum(1, keepdims=True)
    return (flat_p + change).reshape(p.shape)


class ColumnWise(Elementwise):
    """A second moment of each column, a sum that is made of it, and a second look at columns."""

    lr: float = hyper(default=0.1, at_least=0)
    c = slot("column_sq", per="column", never_negative=True)
    top = slot("column_top", per="column")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.c = ema_sq(s.c, norm(g, over="column"), 0.5)
        u = g / sqrt(s.c / mean(s.c, over="row") + 1e-3)
        centred = u - mean(u, over="column")
        s.top = largest(abs(centred), over="column")
        return -h.lr * centred / larger(1.0, total(p * p, over="column"))


def column_wise(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    rows = len(p) if p.ndim > 1 else 1
    flat_p, g = p.reshape(rows, -1), g.reshape(rows, -1)
    s["c"] = 0.5 * s.get("c", 0.0) + 0.5 * (g**2).sum(0)
    u = g / np.sqrt(s["c"] / s["c"].mean() + 1e-3)
    centred = u - u.mean(0)
    s["top"] = abs(centred).max(0)
    return (flat_p - 0.1 * centred / np.maximum(1.0, (flat_p**2).sum(0))).reshape(p.shape)


class Both(Elementwise):
    """Rows with columns, as in Adafactor, in parameters of every shape; vectors step in another way."""

    lr: float = hyper(default=0.1, at_least=0)
    r = slot("row_var", per="row", only="matrices")
    c = slot("col_var", per="column", only="matrices")
    v = slot("variance", only="vectors")
    size = slot("size", per="tensor")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.size = size(p) + rows(p) + columns(p)
        if is_matrix(p):
            s.r = ema(s.r, mean(g * g, over="row"), 0.5)
            s.c = ema(s.c, mean(g * g, over="column"), 0.5)
            v = s.r * s.c / mean(s.r, over="column")
        else:
            s.v = v = ema_sq(s.v, g, 0.5)
        u = g / sqrt(v + 1e-6)
        return -h.lr / larger(1.0, norm(u) / sqrt(size(p))) * u


def both(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    if p.ndim > 1:
        g = g.reshape(len(p), -1)
        s["r"] = 0.5 * s.get("r", 0.0) + 0.5 * (g**2).mean(1, keepdims=True)
        s["c"] = 0.5 * s.get("c", 0.0) + 0.5 * (g**2).mean(0, keepdims=True)
        v = s["r"] * s["c"] / s["r"].mean()
    else:
        s["v"] = v = 0.5 * s.get("v", 0.0) + 0.5 * g**2
    u = g / np.sqrt(v + 1e-6)
    return p - (0.1 / max(1.0, np.sqrt(np.mean(u**2))) * u).reshape(p.shape)


class Stacked(Elementwise):
    """More than two dimensions are a stack of matrices."""

    matrices = "stacked"
    lr: float = hyper(default=0.1, at_least=0)
    r = slot("row_var", per="row", only="matrices")
    c = slot("col_var", per="column", only="matrices")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        if not is_matrix(p):
            return -h.lr * g
        s.r = ema(s.r, norm(g, over="row") ** 2 / columns(p), 0.5)
        s.c = ema(s.c, norm(g, over="column") ** 2 / rows(p), 0.5)
        return -h.lr * g / sqrt(s.r / larger(mean(s.r, over="column"), 1e-9) * s.c + 1e-6)


def stacked(p: Any, g: Any, s: dict[str, Any], t: int) -> Any:
    if p.ndim < 2:
        return p - 0.1 * g
    s["r"] = 0.5 * s.get("r", 0.0) + 0.5 * (g**2).mean(-1, keepdims=True)
    s["c"] = 0.5 * s.get("c", 0.0) + 0.5 * (g**2).mean(-2, keepdims=True)
    return p - 0.1 * g / np.sqrt(s["r"] / s["r"].mean(-2, keepdims=True) * s["c"] + 1e-6)


MEANING: dict[Any, Callable[..., Any]] = {
    RowWise: row_wise,
    ColumnWise: column_wise,
    Both: both,
    Stacked: stacked,
}


class RowClip(Modifier):
    """A modifier with a value per row as its whole result, and state of its own."""

    seen = slot("seen", per="row")

    @staticmethod
    def gradient(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.seen = norm(g, over="row")
        return s.seen


def made(rule: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return rule([nn.Parameter(numbers(x, dtype, 7 + i)) for i, x in enumerate(SHAPES)], **options)


def advance(optimizer: Any, first: int = 0, last: int = 4) -> Any:
    for step in range(first, last):
        for place, param in enumerate(flat(optimizer)):
            param.grad = numbers(tuple(param.shape), param.dtype, 100 * step + place)
        optimizer.step()
    return optimizer


def meant(rule: Any, dtype: torch.dtype) -> list[Any]:
    found: list[Any] = []
    for place, shape in enumerate(SHAPES):
        p, state = numbers(shape, dtype, 7 + place).double().numpy(), dict[str, Any]()
        for step in range(4):
            g = numbers(shape, dtype, 100 * step + place).double().numpy()
            p = MEANING[rule](p, g, state, step + 1)
        found.append(p)
    return found


@pytest.fixture(params=[*RUNNERS, "gpu"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return RUNNERS[request.param] if request.param in RUNNERS else request.getfixturevalue("on_a_gpu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", MEANING)
def test_every_runner_comes_to_what_is_meant(rule: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    low = {"low_precision": "none", "state_dtype": "fp32"} if dtype == torch.bfloat16 else {}
    optimizer = advance(made(rule, dtype, **options, **low))
    for given, wanted in zip(flat(optimizer), meant(rule, dtype), strict=True):
        scale = max(1.0, abs(wanted).max(initial=0))
        np.testing.assert_allclose(given.detach().double(), wanted, rtol=0, atol=4 * scale * TOLERANCE[dtype])


def test_state_has_the_shape_that_broadcasts(options: dict[str, Any]) -> None:
    shapes = {
        RowWise: {(2, 3, 4): {"row_sq": (2, 1, 1)}, (17,): {"row_sq": (1,)}, (): {"row_sq": ()}},
        ColumnWise: {(2, 3, 4): {"column_sq": (1, 3, 4)}, (17,): {"column_sq": (17,)}, (): {"column_sq": ()}},
        Both: {(2, 3, 4): {"row_var": (2, 1, 1), "col_var": (1, 3, 4)}, (17,): {"variance": (17,)}},
        Stacked: {(2, 3, 4): {"row_var": (2, 3, 1), "col_var": (2, 1, 4)}},
    }
    for rule, wanted in shapes.items():
        optimizer = made(rule, **options)
        optimizer.init_state()
        state = {tuple(p.shape): optimizer.state[p] for p in flat(optimizer)}
        for shape, entries in wanted.items():
            assert {key: tuple(state[shape][key].shape) for key in entries} == entries
    vectors = [optimizer.state[p] for p in flat(made(Both)) if p.dim() < 2]
    assert not any("row_var" in state for state in vectors)


@pytest.mark.parametrize("options", RUNNERS.values(), ids=RUNNERS)
@pytest.mark.parametrize("rule", MEANING)
def test_a_checkpoint_goes_on_with_the_same_bits(rule: Any, options: dict[str, Any]) -> None:
    whole = advance(made(rule, **options), 0, 4)
    first = advance(made(rule, **options), 0, 2)
    second = made(rule, **options)
    for here, there in zip(flat(second), flat(first), strict=True):
        here.data.copy_(there.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same_run(advance(second, 2, 4), whole)


def test_facts_are_plain_numbers(options: dict[str, Any]) -> None:
    optimizer = advance(made(Both, **options), 0, 1)
    for p in flat(optimizer):
        rows = p.shape[0] if p.dim() > 1 else 1
        wanted = p.numel() + rows + p.numel() // rows
        assert optimizer.state[p]["size"].item() == wanted


def test_parameters_without_elements_are_stepped(options: dict[str, Any]) -> None:
    for rule in MEANING:
        params = [nn.Parameter(torch.zeros(shape)) for shape in ((0, 3), (3, 0), (0,), (2, 0, 2), (2, 2))]
        advance(rule(params, **options), 0, 2)


def test_lists_of_tensors_have_no_rows() -> None:
    with pytest.raises(RuntimeError, match=r"foreach=True.*torch's lists of tensors have no rows and columns"):
        made(RowWise, foreach=True).step()
    assert "not foreach: torch's lists of tensors have no rows and columns" in explain(
        made(RowWise, fused=False)
    )


def test_gradients_of_parts_of_a_parameter_are_refused() -> None:
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = RowWise([param])
    param.grad = torch.ones(4, 3).to_sparse(1)
    with pytest.raises(RuntimeError, match="RowWise"):
        optimizer.step()


def test_complex_parameters_have_no_state_per_row() -> None:
    optimizer = RowWise([nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))])
    flat(optimizer)[0].grad = torch.ones(4, 3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="RowWise does not support complex parameters"):
        optimizer.step()


def test_a_value_per_row_becomes_one_per_element(options: dict[str, Any]) -> None:
    """What a modifier returns, and what a rule returns as its change."""

    class Plain(Elementwise):
        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return -0.1 * g * total(g)

    param = nn.Parameter(torch.zeros(2, 3))
    optimizer = Plain([param], modifiers=[RowClip()], **options)
    param.grad = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    optimizer.step()
    norms = torch.tensor([[5.0], [1.0]])
    torch.testing.assert_close(param.detach(), (-0.1 * norms * 18).expand(2, 3))
    assert_same(optimizer.state[param]["row_clip.seen"], norms)


def rule_of(body: str, **slots: Any) -> Any:
    scope: dict[str, Any] = dict(globals())
    exec(f"def update(h, p, g, s, t):\n    {body}", scope)
    members = {"__annotations__": {"lr": "float"}, "lr": hyper(default=0.1), **slots}
    return type("Mine", (Elementwise,), {**members, "update": staticmethod(scope["update"])})


@pytest.mark.parametrize(
    ("body", "slots", "message"),
    [
        ("s.r = g; return g", {"r": slot("r", per="row")}, r"one per row \(per='row'\) .* one per element"),
        (
            "s.r = norm(g, over='column'); return g",
            {"r": slot("r", per="row")},
            "one per row .* one per column",
        ),
        ("s.d = norm(g, over='row'); return g", {"d": slot("d", per="all")}, "one for all .* one per row"),
        (
            "s.d = norm(g, over='row'); return g",
            {"d": slot("d", per="tensor")},
            "one per tensor .* one per row",
        ),
        ("return g * norm(norm(g, over='row'))", {}, r"one per row\. Write over='column'"),
        ("return g * norm(norm(g, over='row'), over='row')", {}, "one per row already"),
        ("return g * mean(mean(g, over='column'), over='all')", {}, r"one per column\. Write over='row'"),
        ("return g * s.r", {"r": slot("r", per="row", only="vectors")}, "only for vectors.*not is_matrix"),
        ("return g * size(3)", {}, r"write size\(p\)"),
        ("return g if norm(g, over='row') > 1 else p", {}, "'if' on a value"),
        (
            "return g * norm(g, over='all') if is_matrix(p) else g",
            {},
            "other sums over several parameters for matrices than for vectors",
        ),
    ],
)
def test_a_level_that_does_not_fit_is_named(body: str, slots: Any, message: str) -> None:
    with pytest.raises((TypeError, AttributeError), match=message):
        rule_of(body, **slots)([nn.Parameter(torch.ones(3))])


def test_one_per_matrix_of_a_stack_is_not_one_per_tensor() -> None:
    rule = rule_of("s.d = mean(norm(g, over='row'), over='column'); return g", d=slot("d", per="tensor"))
    rule([nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match=r"one per tensor .* one per matrix of a stack"):
        type("Mine", (rule,), {"matrices": "stacked"})([nn.Parameter(torch.ones(3))])


def test_a_step_can_be_recorded_for_autograd() -> None:
    start = numbers((3, 4), torch.float64, 1)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    param = (start * scale).clone()
    optimizer = RowWise([param], differentiable=True)
    param.grad = numbers((3, 4), torch.float64, 2) * scale
    optimizer.step()
    param.sum().backward()
    assert scale.grad is not None
    assert math.isfinite(scale.grad.item())


class RowScaled(Elementwise):
    """A value per row times an element, in one word with lr."""

    lr: float = hyper(default=0.1, at_least=0)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * mean(g, over="row") * g


def test_a_tensor_lr_meets_values_per_row(options: dict[str, Any]) -> None:
    moved: list[Any] = []
    for lr in (0.5, torch.tensor(0.5)):
        param = nn.Parameter(numbers((4, 3), torch.float64, 1))
        param.grad = numbers((4, 3), torch.float64, 2)
        RowScaled([param], lr=lr, **options).step()
        moved.append(param.detach())
    assert_same(moved[0], moved[1])


@pytest.mark.parametrize("shape", [(40, 30, 3, 3), (900, 3, 7), (50, 40, 5, 2), (70, 60, 1, 9)], ids=str)
def test_norms_of_many_short_columns_are_those_of_torch(shape: tuple[int, ...]) -> None:
    """torch.norm goes through them one by one, which took most of Adafactor's step on convolutions."""
    x = numbers(shape, torch.float32, 3).exp() * numbers(shape, torch.float32, 4)
    assert sums._many_short_columns(x, (-2,))
    assert not sums._many_short_columns(x, (-1,))
    assert_same(sums.as_torch("norm", x, (-2,)), torch.norm(x, dim=-2, keepdim=True))
