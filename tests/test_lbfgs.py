"""L-BFGS: torch's results to the last bit, without torch's failures on NaN and infinity."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from rules import assert_same, same_bits
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import optim_db

from steprule.closure.lbfgs import LBFGS
from steprule.schedules import Warmup

Problem = tuple[list[nn.Parameter], Callable[[], Tensor]]

WOLFE = {"line_search_fn": "strong_wolfe"}
BOTH = pytest.mark.parametrize("options", [{}, WOLFE], ids=["fixed", "searched"])
LISTED = [
    pytest.param(entry.kwargs, id=entry.desc)
    for info in optim_db
    if info.optim_cls is torch.optim.LBFGS
    for entry in info.optim_inputs_func(device="cpu")
]
MORE = [
    {**WOLFE, "history_size": 3},
    {**WOLFE, "max_iter": 1},
    {**WOLFE, "max_eval": 3},
    {**WOLFE, "lr": torch.tensor([0.3])},
    {**WOLFE, "tolerance_change": 0.0, "tolerance_grad": 0},
    {"max_iter": 5, "history_size": 2, "lr": 0.1},
    {"max_iter": 7, "max_eval": 4},
    {"max_iter": 1},
]


def network(dtype: torch.dtype = torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.sin(x.sum(1, keepdim=True))
    return list(model.parameters()), lambda: ((model(x) - y) ** 2).mean()


def valley(dtype: torch.dtype = torch.float64) -> Problem:
    """Rosenbrock's."""
    p = nn.Parameter(torch.tensor([-1.2, 1.0, -1.5, 2.0], dtype=dtype))
    return [p], lambda: (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum()


def one_number(start: float, function: Callable[[Tensor], Tensor]) -> Problem:
    p = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    return [p], lambda: function(p)


def advance(optimizer: Any, loss: Callable[[], Tensor], steps: int = 1) -> list[float]:
    """The losses that the steps report."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    return [optimizer.step(closure).item() for _ in range(steps)]


def pair(problem: Callable[[torch.dtype], Problem], dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Ours and torch's on equal problems: (optimizer, loss), (optimizer, loss)."""
    ours, theirs = problem(dtype), problem(dtype)
    return (
        (LBFGS(ours[0], **copy.deepcopy(options)), ours[1]),
        (torch.optim.LBFGS(theirs[0], **copy.deepcopy(options)), theirs[1]),
    )


def values(optimizer: Any) -> list[Tensor]:
    return [p.detach() for p in optimizer.param_groups[0]["params"]]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Parameters, state and groups, key for key and bit for bit."""
    assert_same(values(ours), values(theirs), "parameters")
    saved = ours.state_dict()
    if "maximize" not in theirs.param_groups[0]:
        assert saved["param_groups"][0].pop("maximize") is False
    assert_same(saved, theirs.state_dict(), "checkpoint")


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# torch's numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("problem", [network, valley])
@pytest.mark.parametrize("options", LISTED)
def test_equals_torch_bit_for_bit(problem: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_equal_runs(problem, dtype, options)


@pytest.mark.parametrize("problem", [network, valley])
@pytest.mark.parametrize("options", MORE, ids=str)
def test_more_options_equal_torch_bit_for_bit(problem: Any, options: dict[str, Any]) -> None:
    assert_equal_runs(problem, torch.float32, options)


def assert_equal_runs(problem: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    (ours, our_loss), (theirs, their_loss) = pair(problem, dtype, options)
    # Maximizing needs a maximum to end at.
    sign = -1 if options.get("maximize") else 1
    for _ in range(10):
        assert advance(ours, lambda: sign * our_loss()) == advance(theirs, lambda: sign * their_loss())
        assert_equal(ours, theirs)
    assert all(torch.isfinite(p).all() for p in values(theirs))


@pytest.mark.parametrize("options", [{"max_iter": 4}, {**WOLFE, "max_iter": 4, "history_size": 5}])
def test_checkpoints_go_both_ways_and_continue(options: dict[str, Any]) -> None:
    (ours, our_loss), (theirs, their_loss) = pair(network, torch.float32, options)
    advance(ours, our_loss, 3)
    advance(theirs, their_loss, 3)
    (ours_again, loss_1), (theirs_again, loss_2) = pair(network, torch.float32, options)
    for new, source in ((ours_again, theirs), (theirs_again, ours)):
        new.load_state_dict(through_a_file(source.state_dict()))
        with torch.no_grad():
            for p, q in zip(values(new), values(source), strict=True):
                p.copy_(q)
    wanted = advance(ours, our_loss, 3)
    assert advance(ours_again, loss_1, 3) == wanted
    assert advance(theirs_again, loss_2, 3) == wanted
    assert_equal(ours_again, ours)
    assert_equal(theirs_again, ours)


@BOTH
def test_complex_parameters_equal_torch(options: dict[str, Any]) -> None:
    def problem(dtype: torch.dtype) -> Problem:
        p = nn.Parameter(torch.tensor([1 + 2j, -1.5j, 0.3 - 1j], dtype=torch.complex128))
        q = nn.Parameter(torch.tensor([2.0, -1.0, 0.5], dtype=dtype))
        return [p, q], lambda: ((p - (0.5 - 0.5j)).abs() ** 4 + (p * q).abs() ** 2).sum()

    (ours, our_loss), (theirs, their_loss) = pair(problem, torch.float64, {**options, "lr": 0.2})
    assert advance(ours, our_loss, 4) == advance(theirs, their_loss, 4)
    assert_equal(ours, theirs)


@BOTH
def test_sparse_and_missing_gradients_equal_torch(options: dict[str, Any]) -> None:
    def problem(dtype: torch.dtype) -> Problem:
        rows = nn.Embedding(5, 3, sparse=True, dtype=dtype)
        with torch.no_grad():
            rows.weight.copy_(torch.arange(15.0).reshape(5, 3).cos())
        idle = nn.Parameter(torch.ones(4, dtype=dtype))
        places = torch.tensor([1, 3, 3])
        return [idle, rows.weight], lambda: ((rows(places) - 2) ** 4).sum()

    (ours, our_loss), (theirs, their_loss) = pair(problem, torch.float64, options)
    assert advance(ours, our_loss, 3) == advance(theirs, their_loss, 3)
    assert_equal(ours, theirs)
    idle, rows = values(ours)
    assert same_bits(idle, torch.ones(4, dtype=torch.float64))
    assert not torch.equal(rows[1], torch.arange(3.0, 6.0, dtype=torch.float64).cos())


def test_signature_and_groups_are_torchs() -> None:
    ours, theirs = (inspect.signature(c).parameters for c in (LBFGS, torch.optim.LBFGS))
    newest = [(p.name, p.kind, p.default) for p in theirs.values()]
    if "maximize" not in theirs:
        newest.append(("maximize", inspect.Parameter.KEYWORD_ONLY, False))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == newest
    assert {f.name: f.default for f in LBFGS.fields.values()} == {
        name: p.default for name, p in ours.items() if name != "params"
    }


# Climbing


@pytest.mark.parametrize("problem", [network, valley])
@BOTH
def test_maximize_goes_up_the_hill_as_down_the_valley(problem: Any, options: dict[str, Any]) -> None:
    """Bit for bit, since a sign rounds nothing; the loss that is returned keeps its own."""
    (params, loss), (others, negated) = problem(), problem()
    climbing, descending = LBFGS(params, maximize=True, **options), LBFGS(others, **options)
    for _ in range(4):
        assert advance(climbing, lambda: -loss()) == [-x for x in advance(descending, negated)]
        assert_same(values(climbing), values(descending))
        assert_same(climbing.state_dict()["state"], descending.state_dict()["state"])


@pytest.mark.skipif("maximize" not in inspect.signature(torch.optim.LBFGS).parameters, reason="torch < 2.14")
@BOTH
def test_maximize_equals_torch(options: dict[str, Any]) -> None:
    (ours, our_loss), (theirs, their_loss) = pair(network, torch.float32, {**options, "maximize": True})
    for _ in range(4):
        assert advance(ours, lambda: -our_loss()) == advance(theirs, lambda: -their_loss())
        assert_equal(ours, theirs)


@BOTH
def test_maximize_turns_back_from_nan_too(options: dict[str, Any]) -> None:
    params, loss = one_number(0.5, lambda p: torch.log(p) - p**2)
    optimizer = LBFGS(params, lr=4.0, maximize=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        advance(optimizer, loss)
    assert params[0].isfinite()
    assert loss().isfinite()


def test_maximize_is_asked_for_by_name_and_saved() -> None:
    params, loss = valley()
    with pytest.raises(TypeError):
        LBFGS(params, 1, 20, None, 1e-7, 1e-9, 100, None, True)  # type: ignore[misc]
    with pytest.raises(TypeError, match="LBFGS: maximize = 'no', must be True or False"):
        LBFGS(params, maximize="no")  # type: ignore[arg-type]
    climbing, loaded = LBFGS(params, maximize=True), LBFGS(params)
    advance(climbing, lambda: -loss())
    loaded.load_state_dict(climbing.state_dict())
    assert loaded.param_groups[0]["maximize"] is True
    del (saved := climbing.state_dict())["param_groups"][0]["maximize"]  # as torch 2.13 writes it
    plain = LBFGS(params)
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["maximize"] is False


@BOTH
def test_without_parameters_the_closure_is_called_once(options: dict[str, Any]) -> None:
    optimizer = LBFGS([{"params": []}], **options)
    calls: list[bool] = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        return 2.5

    with torch.no_grad():
        assert optimizer.step(closure) == 2.5
    assert calls == [True]
    optimizer.init_state()
    assert "0 parameters" in optimizer.explain()
    assert optimizer.load_state_dict(optimizer.state_dict()).matched == ()
    assert not optimizer.state


# Where torch's own fails


@BOTH
def test_strides_of_gradients_do_not_matter(options: dict[str, Any]) -> None:
    start = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    plain = nn.Parameter(start.clone())
    strided = nn.Parameter(start.clone().to(memory_format=torch.channels_last))
    optimizers = [LBFGS([p], **options) for p in (plain, strided)]
    reports = [
        advance(optimizer, lambda p=p: (p.cos() * torch.linspace(1, 2, 5)).sum(), 2)
        for optimizer, p in zip(optimizers, (plain, strided), strict=True)
    ]
    assert strided.grad is not None
    assert not strided.grad.is_contiguous()
    assert torch.allclose(plain, strided, rtol=1e-9)
    assert reports[0] == pytest.approx(reports[1], rel=1e-9)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@BOTH
def test_copies_continue(copier: Any, options: dict[str, Any]) -> None:
    params, loss = valley()
    optimizer = LBFGS(params, **options, max_iter=3)
    advance(optimizer, loss, 2)
    twin = copier(optimizer)
    (p,) = twin.param_groups[0]["params"]
    assert p is not params[0]

    def twin_loss() -> Tensor:
        return (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum()

    assert advance(twin, twin_loss, 4) == advance(optimizer, loss, 4)
    assert_equal(twin, optimizer)


@BOTH
def test_a_tensor_lr_may_be_changed_in_place(options: dict[str, Any]) -> None:
    lr = torch.tensor(0.5)
    (one, one_loss), (other, other_loss) = (
        (LBFGS(p, lr=given, max_iter=3, **options), loss)
        for given in (lr, 0.5)
        for p, loss in [network(torch.float32)]
    )
    for _ in range(4):
        # A search rounds its distances, to the precision of a tensor or of a float.
        assert advance(one, one_loss) == pytest.approx(advance(other, other_loss), rel=1e-5)
        lr.mul_(0.5)
        other.param_groups[0]["lr"] *= 0.5
    assert one.param_groups[0]["lr"] is lr


def test_a_schedule_does_not_reach_into_the_history() -> None:
    params, loss = valley()
    optimizer = LBFGS(params, lr=torch.tensor(0.01), max_iter=3)
    schedule = Warmup(optimizer, 10)
    advance(optimizer, loss)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    schedule.step()
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.002)
    assert_same(optimizer.state_dict()["state"], before)


@BOTH
def test_the_history_follows_a_model_that_becomes_double(options: dict[str, Any]) -> None:
    params, loss = valley(torch.float32)
    optimizer = LBFGS(params, max_iter=3, **options)
    first = advance(optimizer, loss)[0]
    params[0].data = params[0].data.double()
    params[0].grad = None
    assert advance(optimizer, loss, 5)[-1] < first
    assert optimizer.state[params[0]]["old_dirs"][0].dtype is torch.float64


# Losses that are NaN or infinite


def wall(p: Tensor) -> Tensor:
    """Lowest at 0; NaN from 1 on."""
    return -torch.log(1 - p) - p


def test_the_search_turns_back_from_nan() -> None:
    params, loss = one_number(-0.9, wall)
    seen: list[float] = []

    def watched() -> Tensor:
        seen.append(loss().item())
        return loss()

    optimizer = LBFGS(params, lr=30, **WOLFE)
    advance(optimizer, watched, 2)
    assert any(math.isnan(value) for value in seen)
    assert params[0].item() == pytest.approx(0, abs=1e-4)


def test_without_a_search_nan_puts_the_parameters_back() -> None:
    params, loss = one_number(-0.9, wall)
    optimizer = LBFGS(params, lr=30)
    with pytest.warns(RuntimeWarning, match=r"LBFGS: the loss .* NaN .* back where the iteration began"):
        advance(optimizer, loss)
    assert params[0].item() == -0.9
    state = optimizer.state_dict()["state"][0]
    assert state == {"func_evals": 2, "n_iter": 0}
    optimizer.param_groups[0]["lr"] = 0.5
    advance(optimizer, loss, 3)
    assert abs(params[0].item()) < 0.1


def test_the_iteration_is_undone_not_the_step() -> None:
    params, _ = one_number(8.0, wall)
    places: list[float] = []

    def loss() -> Tensor:
        places.append(params[0].item())
        value = (params[0] ** 4).sum()
        return value * math.nan if len(places) == 4 else value

    optimizer = LBFGS(params)
    with pytest.warns(RuntimeWarning):
        advance(optimizer, loss)
    assert len(places) == 4
    assert params[0].item() == places[2] != places[0]


@BOTH
def test_a_loss_without_a_number_at_the_start_moves_nothing(options: dict[str, Any]) -> None:
    params, loss = one_number(-0.9, wall)
    optimizer = LBFGS(params, **options)
    with pytest.warns(RuntimeWarning, match="nothing moved"):
        advance(optimizer, lambda: loss() * math.inf)
    assert params[0].item() == -0.9


def test_a_search_that_finds_no_number_says_so() -> None:
    params, loss = one_number(0.5, wall)
    optimizer = LBFGS(params, **WOLFE)
    with pytest.warns(RuntimeWarning, match="back where the iteration began"):
        advance(optimizer, lambda: loss() if params[0].item() == 0.5 else loss() * math.nan)
    assert params[0].item() == 0.5
    assert advance(optimizer, loss, 2)[1] < 0.2


def test_a_gradient_without_a_number_counts_too() -> None:
    params, loss = one_number(0.5, wall)
    optimizer = LBFGS(params)

    def closure() -> float:
        optimizer.zero_grad()
        loss().backward()
        if params[0].item() != 0.5:
            params[0].grad = torch.full_like(params[0], math.nan)
        return loss().item()

    with pytest.warns(RuntimeWarning, match="or its gradient"):
        optimizer.step(closure)
    assert params[0].item() == 0.5


@BOTH
def test_a_direction_that_overflows_is_not_taken(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.full((3,), 4.0))
    optimizer = LBFGS([p], max_iter=1, **options)
    advance(optimizer, lambda: 10 * p.sum())
    optimizer.state[p]["H_diag"] = torch.tensor(1e38)
    begun = p.detach().clone()
    with pytest.warns(RuntimeWarning):
        advance(optimizer, lambda: 10 * p.sum())
    assert same_bits(p.detach(), begun)


def test_a_closure_that_fails_in_a_search_leaves_the_parameters_where_they_were() -> None:
    params, loss = valley()
    optimizer = LBFGS(params, **WOLFE)
    begun = params[0].detach().clone()
    calls = iter(range(100))

    def closure() -> Tensor:
        if next(calls) == 1:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with suppress(KeyboardInterrupt):
        optimizer.step(closure)
    assert same_bits(params[0].detach(), begun)
    for _ in range(3):
        optimizer.step(closure)
    assert params[0].detach() == pytest.approx(torch.ones(4), abs=0.1)


# Refusals


def two_groups() -> Iterator[dict[str, Any]]:
    for _ in range(2):
        yield {"params": [nn.Parameter(torch.ones(2))]}


def test_one_group_only() -> None:
    with pytest.raises(ValueError, match=r"LBFGS doesn't support per-parameter options.*in one list"):
        LBFGS(two_groups())
    first, second = two_groups()
    optimizer = LBFGS([first])
    with pytest.raises(ValueError, match="in one list"):
        optimizer.add_param_group(second)
    assert len(optimizer.param_groups) == 1


def test_a_misspelt_name_gets_the_right_one() -> None:
    with pytest.raises(TypeError, match=r"LBFGS has no hyper-parameter 'max_iters'.*'max_iter'"):
        LBFGS(valley()[0], **{"max_iters": 3})


def test_a_closure_is_needed() -> None:
    optimizer = LBFGS(valley()[0])
    with pytest.raises(TypeError, match=r"LBFGS\.step needs a closure"):
        optimizer.step()


@pytest.mark.parametrize("returned", [None, torch.zeros(3), "low"], ids=str)
def test_the_closure_must_return_a_number(returned: Any) -> None:
    optimizer = LBFGS(valley()[0])
    with pytest.raises(TypeError, match=r"LBFGS\.step: the closure returned .* `return loss`"):
        optimizer.step(lambda: returned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr = -1, must be at least 0"),
        ({"max_iter": 0}, "max_iter = 0, must be at least 1"),
        ({"max_eval": 0}, "max_eval = 0, must be at least 1"),
        ({"history_size": 0}, "history_size = 0, must be at least 1"),
        ({"tolerance_grad": -1.0}, "tolerance_grad = -1.0, must be at least 0"),
        ({"tolerance_change": math.nan}, "tolerance_change = nan, must be at least 0"),
    ],
)
def test_ranges(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LBFGS: {message}"):
        LBFGS(valley()[0], **options)


def test_an_unknown_search_gets_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="line_search_fn = 'wolfe', must be one of None, 'strong_wolfe'"):
        LBFGS(valley()[0], line_search_fn="wolfe")


def test_whole_numbers() -> None:
    for name in ("max_iter", "max_eval", "history_size"):
        with pytest.raises(TypeError, match=f"LBFGS: {name} = 2.5"):
            LBFGS(valley()[0], **{name: 2.5})
    assert advance(LBFGS(valley()[0], max_iter=3.0, max_eval=3.0, history_size=2.0), valley()[1])


def test_a_checkpoint_of_another_model_is_refused() -> None:
    params, loss = valley()
    saved = LBFGS(params)
    advance(saved, loss)
    optimizer = LBFGS([nn.Parameter(torch.ones(5))])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="4 elements, the parameters have 5"):
        optimizer.load_state_dict(saved.state_dict())
    assert_same(optimizer.state_dict(), before)


# Edges


@BOTH
def test_parameters_without_numbers_are_left_alone(options: dict[str, Any]) -> None:
    nothing = nn.Parameter(torch.ones(0))
    optimizer = LBFGS([nothing], **options)
    assert optimizer.step(lambda: 1.5) == 1.5
    beside = nn.Parameter(torch.tensor(3.0))
    advance(LBFGS([nothing, beside], **options), lambda: (beside - 1) ** 2 + nothing.sum(), 3)
    assert beside.item() == pytest.approx(1)


def test_an_lr_of_zero_moves_nothing() -> None:
    for options in ({}, WOLFE):
        params, loss = valley()
        begun = params[0].detach().clone()
        advance(LBFGS(params, lr=0, **options), loss, 2)
        assert same_bits(params[0].detach(), begun)


def test_explain_counts_the_history() -> None:
    params, loss = valley()
    optimizer = LBFGS(params, max_iter=3, max_eval=50, **WOLFE)
    assert " 0 bytes of state" in optimizer.explain()
    advance(optimizer, loss)
    assert "direction: 2 of 100 pairs kept; search: strong_wolfe" in optimizer.explain()
    vectors = 2 + 2 + 2  # (s, y) twice, d, g
    numbers = 2 + 2 + 1  # ρ and α twice, H₀; t is the plain 1
    assert f" {8 * (4 * vectors + numbers)} bytes of state" in optimizer.explain()
