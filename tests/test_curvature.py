"""Curvature: how rules take it in between steps, and what they make of it."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from kernels import FUSED, LOOP, assert_same_numbers, exact_roots
from papers import adahessian, sophiah
from rules import assert_same, flat, numbers, snapshot
from torch import Tensor, nn

import steprule
from steprule import AdaHessian, Elementwise, SophiaH, hutchinson, hyper, scalar_slot, slot
from steprule.declare import Matrix
from steprule.engine import storage
from steprule.engine.runners import reference
from steprule.words import mean, norm, total

LISTS = {"fused": None, "foreach": True}
RUNNERS = {"loop": LOOP, "lists": LISTS, "kernel": FUSED}
SHAPES = ((70, 90), (5,), (3, 4))


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Any]:
    return [nn.Parameter(numbers(shape, dtype, seed=i)) for i, shape in enumerate(shapes)]


def curvature(params: Any, number: int = 0, dtype: torch.dtype | None = None) -> dict[Any, Tensor]:
    """A curvature of both signs for each of them."""
    return {p: numbers(tuple(p.shape), dtype or p.dtype, 900 + 10 * number + i) for i, p in enumerate(params)}


def give(optimizer: Any, number: int) -> None:
    for place, param in enumerate(flat(optimizer)):
        param.grad = numbers(tuple(param.shape), param.dtype, 1000 * number + place)


def advance(optimizer: Any, first: int, last: int) -> None:
    """Steps with an estimate before every second one."""
    for number in range(first, last):
        give(optimizer, number)
        if number % 2 == 0:
            optimizer.update_hessian(curvature(flat(optimizer), number))
        optimizer.step()


# What rules make of it


@pytest.mark.parametrize(("rule", "paper"), [(AdaHessian, adahessian), (SophiaH, sophiah)])
@pytest.mark.parametrize("runner", RUNNERS)
def test_before_the_first_estimate(rule: Any, paper: Any, runner: str) -> None:
    """AdaHessian stays where it is, SophiaH moves by lr; it is said once."""
    (param,) = parameters(torch.float64, shapes=((4, 3),))
    optimizer = rule([("w", param)], weight_decay=0.1, **RUNNERS[runner])
    theta = param.detach().numpy().copy()
    state = paper.init(theta)
    for t in range(1, 5):
        if t == 3:
            (diagonal,) = curvature([param]).values()
            optimizer.update_hessian({param: diagonal})
            paper.update_hessian(diagonal.numpy(), state)
        give(optimizer, t)
        if t == 1:
            with pytest.warns(UserWarning, match=rf"^{rule.__name__}: update_hessian was never called for 'w'"):
                optimizer.step()
        else:
            optimizer.step()
        theta = paper.step(theta, param.grad.numpy(), state, t, weight_decay=0.1)
        np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-12)
        if t == 2 and rule is AdaHessian:
            start = numbers((4, 3), torch.float64, 0)
            torch.testing.assert_close(param.detach(), start * (1 - 0.15 * 0.1) ** 2)


def test_nothing_is_said_where_there_is_nothing_to_see() -> None:
    empty, frozen, param = (
        nn.Parameter(torch.ones(0, 2)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(3)),
    )
    optimizer = AdaHessian([empty, frozen, param])
    empty.grad, param.grad = torch.ones(0, 2), torch.zeros(3)
    optimizer.step()
    optimizer.update_hessian({param: torch.ones(3)})
    param.grad = torch.ones(3)
    optimizer.step()


def test_sophia_h_takes_negative_curvature_for_none() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = SophiaH([param], lr=0.5, betas=(0.5, 0.5), rho=0.5)
    optimizer.update_hessian({param: torch.tensor([-8.0, 8.0, 8.0])})
    param.grad = torch.tensor([1e-3, 1.0, -8.0])
    optimizer.step()
    # m = g/2, h = D/2:  m/(ρ·h) = 0.5e-3/(-2) → 1;  0.5/2;  -4/2 → -1
    torch.testing.assert_close(param.detach(), torch.tensor([-0.5, -0.125, 0.5]))


@pytest.mark.parametrize("rule", [AdaHessian, SophiaH])
def test_an_estimate_moves_nothing_and_counts_no_step(rule: Any) -> None:
    for flags in (LOOP, FUSED):
        optimizer = rule(parameters(torch.bfloat16), low_precision="kahan", state_dtype="fp32", **flags)
        advance(optimizer, 0, 2)
        params, state, _ = (*snapshot(optimizer), None)
        versions = [p._version for p in flat(optimizer)]
        optimizer.update_hessian(curvature(flat(optimizer), 7))
        assert [p._version for p in flat(optimizer)] == versions
        assert_same([p.detach() for p in flat(optimizer)], params)
        written = {"exp_hessian_diag_sq", "estimates", "hessian"}
        for place, entries in state["state"].items():
            for key, value in optimizer.state_dict()["state"][place].items():
                assert torch.equal(value, entries[key]) == (key not in written), key


# How it is kept

STORAGES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "double": (torch.float64, {}),
    "half": (torch.float16, {"low_precision": "none", "state_dtype": "fp32"}),
    "bf16": (torch.float32, {"state_dtype": "bf16"}),
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "master": (torch.bfloat16, {"low_precision": "master", "state_dtype": "int8"}),
    "stochastic": (torch.bfloat16, {"low_precision": "stochastic", "state_dtype": "bf16"}),
}


def compared(rule: Any, flags: dict[str, Any], dtype: torch.dtype, **options: Any) -> None:
    """The loop and another runner take the same in."""
    made = [rule(parameters(dtype), **options, **x) for x in (flags, LOOP)]
    for optimizer in made:
        advance(optimizer, 0, 4)
        # Of another dtype than the parameters, as hutchinson gives it.
        if dtype in storage.HALF:
            optimizer.update_hessian(curvature(flat(optimizer), 5, torch.float32))
    assert_same_numbers(*made)


@exact_roots()
@pytest.mark.parametrize("modifiers", [[], [steprule.GrokFast(), steprule.EMA()]], ids=["alone", "modified"])
@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("rule", [AdaHessian, SophiaH])
def test_the_kernel_takes_in_what_the_loop_takes_in(rule: Any, name: str, modifiers: Any) -> None:
    dtype, options = STORAGES[name]
    compared(rule, FUSED, dtype, modifiers=modifiers, **options)


@pytest.mark.parametrize("name", ["double", "half"])
@pytest.mark.parametrize("rule", [AdaHessian, SophiaH])
def test_lists_take_in_what_the_loop_takes_in(rule: Any, name: str) -> None:
    dtype, options = STORAGES[name]
    compared(rule, LISTS, dtype, modifiers=[steprule.EMA()], **options)


def test_a_kernel_takes_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = AdaHessian(parameters(), fused=True)
    advance(optimizer, 0, 1)
    monkeypatch.setattr(reference, "run", None)
    advance(optimizer, 2, 3)
    assert float(optimizer.state[flat(optimizer)[0]]["estimates"]) == 2


def test_the_kernel_leaves_to_the_loop_what_it_cannot_take() -> None:
    (param, *_) = parameters()
    optimizer, twin = AdaHessian([param]), AdaHessian([nn.Parameter(param.detach().clone())], foreach=False)
    diagonal = numbers((90, 70), torch.float32, 1).T
    for x in (optimizer, twin):
        x.update_hessian({flat(x)[0]: diagonal})
    assert_same(dict(optimizer.state[param]), dict(twin.state[flat(twin)[0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("runner", RUNNERS)
def test_half_precision_is_computed_in_single_and_rounded_once(dtype: torch.dtype, runner: str) -> None:
    half = SophiaH(parameters(dtype), low_precision="none", **RUNNERS[runner])
    half.init_state()
    wide = SophiaH([nn.Parameter(p.detach().float()) for p in flat(half)], foreach=False)
    wide.init_state()
    for number in range(2):
        given = curvature(flat(half), number)
        for p, q in zip(flat(half), flat(wide), strict=True):
            wide.state[q]["hessian"].copy_(half.state[p]["hessian"])
        half.update_hessian(given)
        wide.update_hessian(dict(zip(flat(wide), [x.float() for x in given.values()], strict=True)))
        for p, q in zip(flat(half), flat(wide), strict=True):
            assert_same(half.state[p]["hessian"], wide.state[q]["hessian"].to(dtype))


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=["fp32", "int8"])
@pytest.mark.parametrize("rule", [AdaHessian, SophiaH, steprule.Sophia])
def test_a_checkpoint_between_estimate_and_step(rule: Any, options: dict[str, Any]) -> None:
    def estimated(optimizer: Any, number: int) -> None:
        if rule is steprule.Sophia:
            optimizer.update_hessian(4)
        else:
            optimizer.update_hessian(curvature(flat(optimizer), number))

    optimizer = rule(parameters(), **options)
    optimizer.init_state()
    assert not any(float(x.get("estimates", 0)) for x in optimizer.state.values())
    give(optimizer, 0)
    estimated(optimizer, 0)
    other = rule(copy.deepcopy(flat(optimizer)), **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in (optimizer, other):
        for number in range(3):
            give(x, number)
            x.step()
            estimated(x, number)
    assert_same(snapshot(other)[0], snapshot(optimizer)[0])
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_state_that_is_away_comes_back() -> None:
    optimizer, twin = AdaHessian(parameters()), AdaHessian(parameters())
    for x in (optimizer, twin):
        advance(x, 0, 1)
    optimizer.offload_state()
    for x in (optimizer, twin):
        x.update_hessian(curvature(flat(x), 3))
    assert not optimizer._state_is_away
    assert_same(snapshot(optimizer), snapshot(twin))


# Which parameters take part


def test_only_rules_that_use_the_curvature_take_it_in() -> None:
    params = parameters(shapes=((3,), (4,), (5,), (2, 2)))
    groups = [
        {"params": [params[0]]},
        {"params": [params[1]], "rule": AdaHessian, "betas": (0.5, 0.5)},
        {"params": [params[2]], "rule": SophiaH, "betas": (0.5, 0.75)},
        {"params": [params[3]], "rule": steprule.Muon},
    ]
    optimizer = steprule.AdamW(groups)
    given = curvature(params)
    optimizer.update_hessian(given)
    assert set(optimizer.state) == {params[1], params[2]}
    torch.testing.assert_close(optimizer.state[params[1]]["exp_hessian_diag_sq"], given[params[1]] ** 2 / 2)
    torch.testing.assert_close(optimizer.state[params[2]]["hessian"], given[params[2]] / 4)
    give(optimizer, 0)
    optimizer.step()


def test_what_is_left_out_or_none_stays_as_it_is() -> None:
    optimizer = AdaHessian(parameters())
    first, second, third = flat(optimizer)
    optimizer.update_hessian({first: torch.ones_like(first), second: None})
    assert set(optimizer.state) == {first}
    optimizer.update_hessian({third: torch.ones_like(third)})
    assert float(optimizer.state[first]["estimates"]) == float(optimizer.state[third]["estimates"]) == 1
    optimizer.update_hessian({})


def test_what_hutchinson_gives_is_taken() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs, wanted = torch.randn(32, 5), torch.randn(32, 1)
    optimizer = AdaHessian(model)
    losses: list[float] = []
    for _ in range(80):
        loss = (model(inputs) - wanted).square().mean()
        diagonal = hutchinson(loss, model.parameters())
        optimizer.zero_grad()
        loss.backward()
        optimizer.update_hessian(diagonal)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Errors


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda p: [torch.ones(3)], TypeError, "takes a dict .*got a list. Write dict"),
        (lambda p: {"a": torch.ones(3)}, TypeError, "got one with the key 'a'"),
        (lambda p: {p: 3.0}, TypeError, "got one with a float for 'a'"),
        (lambda p: {torch.ones(3): torch.ones(3)}, ValueError, r"shape \(3,\) that is not a parameter of this"),
        (
            lambda p: {p: torch.ones(1, 3)},
            ValueError,
            r"the curvature of 'a' has the shape \(1, 3\), must have \(3,\)",
        ),
        (lambda p: {p: torch.ones(3, device="meta")}, ValueError, "of 'a' is on meta, must be on cpu"),
        (
            lambda p: {p: torch.ones(3, dtype=torch.complex64)},
            ValueError,
            "of 'a' is torch.complex64, must be of",
        ),
        (lambda p: {p: torch.ones(3, dtype=torch.int64)}, ValueError, "of 'a' is torch.int64, must be of"),
        (
            lambda p: {p: torch.ones(3).to_sparse()},
            ValueError,
            "of 'a' has the layout torch.sparse_coo, must be",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(given: Any, error: Any, message: str) -> None:
    first, last = parameters(shapes=((4,), (3,)))
    optimizer = AdaHessian([("b", first), ("a", last)])
    diagonal = given(last)
    if isinstance(diagonal, dict):
        diagonal = {first: torch.ones(4), **diagonal}
    with pytest.raises(error, match=rf"^AdaHessian.update_hessian.*{message}"):
        optimizer.update_hessian(diagonal)
    assert not optimizer.state


def test_an_optimizer_that_uses_no_curvature_says_so() -> None:
    params = parameters()
    with pytest.raises(
        RuntimeError, match=r"^AdamW.update_hessian: no group has a rule that uses the curvature"
    ):
        steprule.AdamW(params).update_hessian(curvature(params))


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_and_infinity_are_guarded(runner: str) -> None:
    for choice in ("raise", "skip", "ignore"):
        params = parameters()
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        optimizer = SophiaH(named, nonfinite=choice, **RUNNERS[runner])
        advance(optimizer, 0, 1)
        gradient, params[0].grad = params[0].grad, torch.full_like(params[0], math.nan)
        before = snapshot(optimizer)
        given = curvature(params)
        optimizer.update_hessian(given)  # with which gradients have nothing to do
        assert not torch.equal(before[1]["state"][0]["hessian"], optimizer.state[params[0]]["hessian"])
        params[0].grad = gradient
        before = snapshot(optimizer)
        given[params[1]][2] = math.inf
        if choice == "raise":
            with pytest.raises(
                RuntimeError, match=r"^SophiaH: the curvature of 'p1' is NaN or infinite; nothing was"
            ):
                optimizer.update_hessian(given)
        else:
            optimizer.update_hessian(given)
        if choice == "ignore":
            assert optimizer.state[params[1]]["hessian"].isinf().any()
        else:
            assert_same(snapshot(optimizer), before)


def test_an_error_in_one_group_leaves_all_as_they_are() -> None:
    first, second = parameters(shapes=((4,), (3,)))
    optimizer = AdaHessian([{"params": [("a", first)]}, {"params": [("b", second)]}])
    optimizer.init_state()
    optimizer.state[second]["exp_hessian_diag_sq"] = torch.zeros(2)
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match="AdaHessian: 'b' cannot be stepped"):
        optimizer.update_hessian(curvature([first, second]))
    assert_same(optimizer.state_dict()["state"], kept)


def test_it_is_refused_while_the_model_has_averages() -> None:
    optimizer = AdaHessian(parameters(), modifiers=[steprule.EMA()])
    advance(optimizer, 0, 1)
    with optimizer.averaged_weights(), pytest.raises(RuntimeError, match=r"Call optimizer.train\(\)"):
        optimizer.update_hessian(curvature(flat(optimizer)))
    advance(optimizer, 2, 3)


# Rules of one's own


class Counting(Elementwise):
    """Slots of all levels, made in an estimate."""

    lr: float = hyper(default=1.0)

    last = slot("last")
    when = scalar_slot("when")
    sums = slot("sums", per="group")
    size = slot("size", per="all")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return -h.lr * g * s.last

    @staticmethod
    def estimate(h: Any, p: Any, d: Any, s: Any, t: Any) -> None:
        s.last = d * p
        s.when = t
        s.sums = s.sums + total(d, over="group")
        s.size = norm(d, over="all")


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_rule_of_ones_own(runner: str) -> None:
    params = parameters(shapes=((3, 2), (4,), (5,)))
    groups = [{"params": params[:2]}, {"params": params[2:], "rule": Counting}]
    optimizer = Counting(groups, **RUNNERS[runner])
    optimizer.param_groups[1].update(RUNNERS[runner])
    give(optimizer, 0)
    for number in (1, 2):
        given = curvature(params, number)
        optimizer.update_hessian(given)
        torch.testing.assert_close(optimizer.state[params[1]]["last"], given[params[1]] * params[1].detach())
        assert float(optimizer.state[params[1]]["when"]) == number
        optimizer.step()
    for group in optimizer.param_groups:
        sums = [float(curvature(params, i)[p].sum()) for i in (1, 2) for p in group["params"]]
        assert group["sums"] == pytest.approx(sum(sums), rel=1e-5)
        whole = torch.cat([x.reshape(-1) for x in given.values()])
        assert group["size"] == pytest.approx(float(whole.double().norm()), rel=1e-6)


def test_an_estimate_may_set_only_plain_numbers() -> None:
    class Largest(Elementwise):
        size = slot("size", per="all")

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return -g

        @staticmethod
        def estimate(h: Any, p: Any, d: Any, s: Any, t: Any) -> None:
            s.size = s.size + 2

    for flags in RUNNERS.values():
        optimizer = Largest(parameters(), **flags)
        optimizer.update_hessian(curvature(flat(optimizer)))
        assert optimizer.param_groups[0]["size"] == 2


class Rows(Elementwise):
    """A slot per row and one per column, made in an estimate."""

    lr: float = hyper(default=1.0)

    r = slot("rows", per="row")
    c = slot("columns", per="column")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return -h.lr * g / (1 + s.r + s.c)

    @staticmethod
    def estimate(h: Any, p: Any, d: Any, s: Any, t: Any) -> None:
        s.r = s.r + mean(d * d, over="row")
        s.c = s.c + mean(d * d, over="column")


@pytest.mark.parametrize("flags", [LOOP, {}], ids=["loop", "default"])
def test_an_estimate_may_set_rows_and_columns(flags: dict[str, Any]) -> None:
    params = parameters(shapes=((40, 30), (5,)))
    optimizer = Rows(params, **flags)
    for number in (1, 2):
        optimizer.update_hessian(curvature(params, number))
    squares = sum(curvature(params, number)[params[0]] ** 2 for number in (1, 2))
    state = optimizer.state[params[0]]
    torch.testing.assert_close(state["rows"].reshape(-1), squares.mean(1))
    torch.testing.assert_close(state["columns"].reshape(-1), squares.mean(0))
    give(optimizer, 0)
    optimizer.step()


def test_a_rule_on_matrices_may_use_it() -> None:
    class Whitened(Matrix):
        """Rows divided by their curvature."""

        lr: float = hyper(default=1.0)
        rows = slot("rows", per="row")

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return -h.lr * g / (s.rows + 1)

        @staticmethod
        def estimate(h: Any, p: Any, d: Any, s: Any, t: Any) -> None:
            s.rows = s.rows + 2

    (param,) = parameters(shapes=((3, 2),))
    optimizer = Whitened([param])
    optimizer.update_hessian({param: torch.ones(3, 2)})
    assert_same(optimizer.state[param]["rows"], torch.full((3, 1), 2.0))
    give(optimizer, 0)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1


def test_what_the_writer_of_an_estimate_does_wrong() -> None:
    def made(estimate: Any) -> Any:
        body = {"h": slot("h"), "update": staticmethod(lambda h, p, g, s, t: -g), "estimate": estimate}
        return type("Wrong", (Elementwise,), {**body, "__module__": __name__})

    def returns(h: Any, p: Any, d: Any, s: Any, t: Any) -> Any:
        s.h = d
        return p

    def misspells(h: Any, p: Any, d: Any, s: Any, t: Any) -> None:
        s.hh = d

    def few(h: Any, p: Any, d: Any, s: Any) -> None:
        s.h = d

    with pytest.raises(TypeError, match=r"Wrong: estimate takes 4 arguments .*estimate\(h, p, d, s, t\)"):
        made(staticmethod(few))
    with pytest.raises(TypeError, match="estimate must be a static method"):
        made(few)
    for flags in RUNNERS.values():
        for estimate, error, message in (
            (returns, TypeError, "Wrong.estimate returned a value. It only sets slots"),
            (misspells, AttributeError, "Wrong.estimate: no slot 'hh'. Did you mean 'h'"),
        ):
            optimizer = made(staticmethod(estimate))(parameters(), **flags)
            with pytest.raises(error, match=message):
                optimizer.update_hessian(curvature(flat(optimizer)))
            assert not any(x["h"].any() for x in optimizer.state.values() if x)


@pytest.mark.parametrize("rule", [AdaHessian, steprule.Sophia])
def test_estimates_make_their_plan_once_and_keep_nothing_alive(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llvmlite")
    from steprule.engine.runners.kernels import fused

    made: list[Any] = []
    real = fused.Plan
    monkeypatch.setattr(fused, "Plan", lambda *x: made.append(x[1]["params"][0].shape) or real(*x))
    params = parameters()
    optimizer = rule([{"params": params[:2]}, {"params": params[2:]}], **FUSED)
    for number in range(4):
        give(optimizer, number)
        optimizer.update_hessian(3 if rule is steprule.Sophia else curvature(params))
        optimizer.step()
    assert made == [params[0].shape, params[2].shape] * 2  # for estimates, and for steps
    gone = weakref.ref(params.pop())
    del optimizer.param_groups[1]
    optimizer.state.clear()
    gc.collect()
    assert gone() is None
    optimizer.init_state()
    optimizer.update_hessian(3 if rule is steprule.Sophia else {})


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_choice_among_numbers_may_change_between_steps(runner: str) -> None:
    """It decides the program, unlike numbers of which the program is made."""
    ends: list[Tensor] = []
    for flags in (LOOP, RUNNERS[runner]):
        (param,) = parameters(torch.float64, shapes=((4, 3),))
        optimizer = AdaHessian([param], hessian_power=1.0, **flags)
        advance(optimizer, 0, 2)
        optimizer.param_groups[0]["hessian_power"] = 0.5
        advance(optimizer, 2, 4)
        ends.append(param.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
