"""Slots that have one value per pair of rows or columns, and the words that decompose them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rules import assert_same, numbers
from torch import Tensor, nn

import steprule
from steprule import hyper, slot
from steprule.declare import Matrix
from steprule.matrix import words

RUNNERS: list[dict[str, Any]] = [{}, {"fused": False}]
DTYPES = [torch.float32, torch.float64]


def matrices(rows: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Two symmetric matrices of this rank, without negative eigenvalues."""
    factor = numbers((2, rows, rank), dtype, seed=3)
    return factor @ factor.mT


def made(rule: Any, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    named = [(f"w{i}", nn.Parameter(numbers(shape, dtype, seed=i))) for i, shape in enumerate(shapes)]
    return rule(named, **options)


def advance(optimizer: Any, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        for place, param in enumerate(optimizer.param_groups[0]["params"]):
            param.grad = numbers(tuple(param.shape), param.dtype, seed=100 * step + place)
        optimizer.step()


# Words


@pytest.mark.parametrize("rank", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eigenvectors(rank: int, dtype: torch.dtype) -> None:
    a = matrices(6, rank, dtype)
    q = words.eigenvectors.function(a)
    torch.testing.assert_close(q.mT @ q, torch.eye(6, dtype=dtype).expand_as(q))
    diagonal = (q.mT @ a @ q).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(q @ (diagonal.unsqueeze(-1) * q.mT), a)
    assert (diagonal.diff() <= 1e-4).all()


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_eigenvectors_do_not_depend_on_rounding(rank: int) -> None:
    a = matrices(40, rank, torch.float64)
    noise = numbers((2, 40, 40), torch.float64, seed=9) * 1e-16 * a.abs().max()
    one, other = (words.eigenvectors.function(x) for x in (a, a + noise + noise.mT))
    torch.testing.assert_close((one.mT @ other).abs(), torch.eye(40).double().expand_as(a), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("root", "eps"), [(4, 1e-6), (2, 0.5)])
def test_inverse_root(root: int, eps: float) -> None:
    a = matrices(6, 8, torch.float64)
    x = words.inverse_root.function(a, root, eps)
    identity = torch.eye(6).double()
    torch.testing.assert_close(torch.linalg.matrix_power(x, root) @ (a + eps * identity), identity.expand_as(a))


def test_inverse_roots_do_not_blow_up_what_is_only_rounding() -> None:
    a = matrices(40, 3, torch.float32)
    x = words.inverse_root.function(a, 4, 1e-30)
    assert x.isfinite().all()
    assert x.abs().max() < 100


def test_qr() -> None:
    a = matrices(6, 8, torch.float64)
    q = words.qr.function(a)
    torch.testing.assert_close((q.mT @ a).tril(-1), torch.zeros_like(a))


@pytest.mark.parametrize("alone", [True, False])
def test_by_diagonal(alone: bool) -> None:
    a, x = matrices(6, 8, torch.float64), numbers((2, 4, 6), torch.float64, seed=1)
    a[:, 3, 3] = a[:, 1, 1]  # of equal elements the first comes first
    a, x = (a[0], x[0]) if alone else (a, x)
    columns = torch.arange(6.0).double().expand_as(x)
    places = words.by_diagonal.function(columns, a)
    assert_same(words.by_diagonal.function(x, a), x.gather(-1, places.long()))
    diagonal = a.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).expand_as(x)
    assert_same(words.by_diagonal.function(diagonal, a), diagonal.sort(-1, descending=True).values)
    assert (places[..., 0, :].argsort()[..., 1] < places[..., 0, :].argsort()[..., 3]).all()


@pytest.mark.parametrize("alone", [True, False])
def test_add_product(alone: bool) -> None:
    c, a, b = (numbers((2, *x), torch.float64, seed=i) for i, x in enumerate(((4, 6), (4, 5), (5, 6))))
    c, a, b = (x[0] if alone else x for x in (c, a, b))
    torch.testing.assert_close(words.add_product.function(c, a, b, 0.5, 0.25), 0.5 * c + 0.25 * (a @ b))


class Misfit(Matrix):
    """Words with matrices that do not fit each other."""

    lr: float = hyper(default=0.1)
    sorted: bool = hyper(default=False)

    gram = slot("gram", per="left")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        if h.sorted:
            return words.by_diagonal(g, s.gram)
        s.gram = words.add_product(s.gram, words.transpose(g), g, 1.0, 1.0)
        return -h.lr * g


@pytest.mark.parametrize(("own", "word"), [({"sorted": True}, "by_diagonal"), ({}, "add_product")])
def test_matrices_that_do_not_fit(own: dict[str, Any], word: str) -> None:
    with pytest.raises(TypeError, match=rf"^Misfit\.update: {word} of matrices that do not fit"):
        made(Misfit, (4, 2), **own)


def test_a_decomposition_that_fails_is_tried_again_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    a, eigh = matrices(6, 8, torch.float32), torch.linalg.eigh

    def fails_in_single(x: Tensor) -> Any:
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(x)

    wanted = words.inverse_root.function(a, 2, 1e-3)
    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    given = words.inverse_root.function(a, 2, 1e-3)
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("rule", [steprule.SOAP, steprule.Shampoo])
def test_a_word_that_fails_names_the_parameters_and_nothing_moves(rule: Any, runner: dict[str, Any]) -> None:
    optimizer = made(rule, (3, 4), (5, 5), (3, 4), (4,), every=1, **runner)
    params = optimizer.param_groups[0]["params"]
    before = copy.deepcopy([p.detach() for p in params])
    for place, param in enumerate(params):
        param.grad = numbers(tuple(param.shape), param.dtype, seed=place)
    params[2].grad[0, 0] = float("nan")
    # The loop works on one matrix at a time, kernels on all that are equal.
    whose = "'w2'" if runner else "'w0', 'w2'"
    word = "eigenvectors" if rule is steprule.SOAP else "inverse_root"
    problem = "NaN or infinite elements; nonfinite='skip' skips .* No parameter has moved"
    wanted = rf"^{rule.__name__}: {word} of the matrices of {whose} failed: {problem}"
    with pytest.raises(RuntimeError, match=wanted):
        optimizer.step()
    assert_same([p.detach() for p in params], before)
    advance(optimizer, 0, 1)
    assert not params[0].detach().isnan().any()


# Slots


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_long_side_has_no_slots(runner: dict[str, Any]) -> None:
    optimizer = made(steprule.SOAP, (4, 9), (9, 4), (9, 9), (2, 4, 4), (4,), max_side=8, **runner)
    advance(optimizer, 0, 3)
    keys = [set(state) - {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values()]
    left, right = {"left", "left_basis"}, {"right", "right_basis"}
    assert keys == [left, right, set(), left | right, set()]
    assert optimizer.state[optimizer.param_groups[0]["params"][3]]["left"].shape == (2, 4, 4)


def test_a_limit_that_changes_takes_effect_at_once() -> None:
    """With a basis that starts as the identity, the next step is that of before."""
    options: dict[str, Any] = {"every": 100, "fused": False}
    first, second = (made(steprule.SOAP, (4, 6), max_side=side, **options) for side in (4, 4))
    for optimizer in (first, second):
        advance(optimizer, 0, 4)
    second.param_groups[0]["max_side"] = 6
    for optimizer in (first, second):
        advance(optimizer, 4, 3)
    (one,), (other,) = (x.param_groups[0]["params"] for x in (first, second))
    torch.testing.assert_close(one, other)
    assert torch.equal(second.state[other]["right_basis"], torch.eye(6))
    second.param_groups[0]["max_side"] = 4
    advance(first, 7, 1)
    advance(second, 7, 1)
    torch.testing.assert_close(one, other)


def test_a_checkpoint_of_another_limit() -> None:
    long, short = (made(steprule.SOAP, (4, 6), max_side=side) for side in (6, 4))
    advance(long, 0, 2)
    report = short.load_state_dict(long.state_dict(), hyperparams="current")
    assert sorted(report.unexpected) == ["w0: right", "w0: right_basis"]
    advance(short, 2, 2)
    with pytest.raises(ValueError, match="the state of 'w0' has no 'right'"):
        made(steprule.SOAP, (4, 6), max_side=6).load_state_dict(short.state_dict(), hyperparams="current")


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("options", [{}, {"state_dtype": "bf16"}, {"state_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_keep_pairs_in_32_bits(
    dtype: torch.dtype, options: dict[str, Any], runner: dict[str, Any]
) -> None:
    optimizer = made(steprule.SOAP, (4, 6), dtype=dtype, low_precision="none", every=2, **options, **runner)
    advance(optimizer, 0, 4)
    (state,) = optimizer.state.values()
    pairs = ("left", "left_basis", "right", "right_basis")
    assert {state[key].dtype for key in pairs} == {torch.float32}
    again = made(steprule.SOAP, (4, 6), dtype=dtype, low_precision="none", every=2, **options, **runner)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (loaded,) = again.state.values()
    assert_same({key: loaded[key] for key in pairs}, {key: state[key] for key in pairs})


@pytest.mark.parametrize("rule", [steprule.Kron, steprule.NorMuon])
def test_16_bit_parameters_keep_what_a_row_has_one_of_in_32_bits(rule: Any) -> None:
    ran: list[Any] = []
    for runner in RUNNERS:
        optimizer = made(rule, (64, 80), dtype=torch.bfloat16, low_precision="none", lr=0.1, **runner)
        optimizer.param_groups[0]["state_dtype"] = "bf16"
        advance(optimizer, 0, 4)
        (state,) = optimizer.state.values()
        assert {x.dtype for key, x in state.items() if "row" in key or "second" in key} == {torch.float32}
        ran.append([optimizer.param_groups[0]["params"][0].detach(), state])
    assert_same(*ran)


def test_the_memory_report_knows_them_before_the_first_step() -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "low_precision": "none"}
    optimizer = made(steprule.SOAP, (4, 9), (6, 6), (6,), max_side=8, **options)
    rows = {row.entry: row.bytes for row in steprule.memory_report(optimizer).rows}
    assert rows["left"] == rows["left_basis"] == 4 * (4 * 4 + 6 * 6)
    assert rows["right"] == rows["right_basis"] == 4 * 6 * 6
    advance(optimizer, 0, 2)
    after = {row.entry: row.bytes for row in steprule.memory_report(optimizer).rows}
    assert {key: after[key] for key in rows} == rows


class Forgetful(Matrix):
    """Uses a slot without asking whether the side is short enough."""

    lr: float = hyper(default=0.1)
    longest: int = hyper(default=3, at_least=0)

    gram = slot("gram", per="left", up_to="longest")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.gram = s.gram + g @ words.transpose(g)
        return -h.lr * (s.gram @ g)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_slot_of_a_long_side_is_used_in_vain(runner: dict[str, Any]) -> None:
    optimizer = made(Forgetful, (4, 2), **runner)
    wanted = r"^Forgetful\.update: slot 'gram' exists only for sides up to longest; use it inside"
    with pytest.raises(AttributeError, match=wanted):
        advance(optimizer, 0, 1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"up_to": "longest"}, "slot 's' is limited by 'longest', which is for sides"),
        ({"up_to": "largest", "per": "left"}, "slot 's' refers to 'largest', which is not a hyper-parameter"),
        ({"starts": steprule.declare.identity}, "slot 's' starts at identity"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):

        class Refused(Matrix):
            lr: float = hyper(default=0.1)
            longest: int = hyper(default=3)

            s = slot("s", **options)

            @staticmethod
            def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
                return -h.lr * g


# Other libraries

# Parameters that start as zeros, after six steps of SOAP of pytorch-optimizer 4.1.0 in float64 (its qr is in
# fp32) with precondition_frequency=2 and max_precondition_dim=3. SOAP of heavyball 3.2.1 in fp32 ends within
# 2e-5 of them if it refreshes in the same steps.
SOAP_ELSEWHERE = [
    [[2.83604, 2.2005, -1.607], [2.34586, 4.34786, -1.0544], [-2.64957, 4.02528, 0.47487]],
    [[2.57549, 2.86268], [-2.03653, -0.103], [3.24244, -1.74204], [-2.67998, 1.46075], [-0.74421, 5.65957]],
    [[2.23379, 2.61484, -0.92663, 0.87726], [5.79416, -0.72648, -2.73863, 3.13192]],
]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_soap_ends_where_other_libraries_do(dtype: torch.dtype, runner: dict[str, Any]) -> None:
    wanted = [torch.tensor(x, dtype=dtype) for x in SOAP_ELSEWHERE]
    params = [nn.Parameter(torch.zeros_like(x)) for x in wanted]
    options = {"lr": 1.0, "betas": (0.9, 0.8), "eps": 1e-8, "weight_decay": 0.0, "every": 2, "max_side": 3}
    optimizer = steprule.SOAP(params, **options, **runner)
    for t in range(1, 7):
        for param in params:
            k = torch.arange(1, 1 + param.numel(), dtype=torch.float64)
            param.grad = torch.sin(k**2 * (t + 1)).reshape(param.shape).to(dtype)
        optimizer.step()
    for param, x in zip(params, wanted, strict=True):
        torch.testing.assert_close(param.detach(), x, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-5)
