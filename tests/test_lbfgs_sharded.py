"""LBFGS on sharded parameters: any number of processes and any layout get the bits of one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import in_processes, layouts, whole
from rules import assert_same, flat, numbers
from torch import Tensor, nn

import steprule

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)
# Parts of unequal size, parts that are empty, and a single number.
SHAPES = ((101, 8), (7, 3), (1, 5), (300,), ())
OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"max_iter": 4, "lr": torch.tensor(0.1), "maximize": True},
    "searched": {"max_iter": 4, "line_search_fn": "strong_wolfe"},
    "short": {"max_iter": 5, "line_search_fn": "strong_wolfe", "history_size": 2},
}


def parameters(put: Any, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(put(numbers(shape, dtype, 10 + i))) for i, shape in enumerate(SHAPES)]


def closure_of(optimizer: Any, put: Any) -> Callable[[], Tensor]:
    """A loss that all processes compute from whole parameters; their gradients are sharded afterwards."""

    def closure() -> Tensor:
        params = flat(optimizer)
        own = [whole(p.detach()).clone().requires_grad_() for p in params]
        total = torch.zeros((), dtype=torch.float64)
        for place, x in enumerate(own):
            away = x - numbers(tuple(x.shape), x.dtype, 50 + place)
            away = torch.view_as_real(away) if away.is_complex() else away
            total = total + (away**2).sum() + 0.1 * (away**4).sum() + (away.sum() / 10) ** 2
        total = -total if optimizer.param_groups[0]["maximize"] else total
        total.backward()
        for p, x in zip(params, own, strict=True):
            p.grad = put(x.grad)
        return total.detach()

    return closure


def run(put: Any, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    optimizer = steprule.LBFGS(parameters(put, dtype), **options)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, put))
    return optimizer


def results(optimizer: Any) -> list[Any]:
    """Parameters and state, as one process would have them."""
    params = flat(optimizer)
    states = [optimizer.state[p] for p in params]
    return [
        [whole(p.detach()) for p in params],
        [{key: whole(x) if isinstance(x, Tensor) else x for key, x in state.items()} for state in states],
    ]


def every_layout(rank: int, file: str) -> None:
    """The same as in one process, which runs first and writes what it gets."""
    known = torch.load(file) if Path(file).exists() else {}
    found: dict[str, Any] = {}
    dtypes = {"searched": torch.float64, "short": torch.complex64}
    for name, options in OPTIONS.items():
        dtype = dtypes.get(name, torch.float32)
        for layout, put in layouts().items():
            if dtype == torch.float64 and layout in ("columns", "grid"):
                continue  # a sum of doubles shows where blocks are cut
            own = results(run(put, options, dtype))
            assert_same(own, known.get(name, found.setdefault(name, own)), f"{name}, {layout}")
        plain = run(lambda x: x, options, dtype)
        for p, q in zip(flat(plain), own[0], strict=True):
            torch.testing.assert_close(q, p.detach(), rtol=1e-4, atol=1e-4)
    if not known:
        torch.save(found, file)


def small_checks(rank: int) -> None:
    checkpoints(rank)
    different_losses(rank)
    not_finite_in_one(rank)
    gradient_in_one(rank)
    less_room(rank)
    half_precision(rank)
    what_it_says(rank)


def checkpoints(rank: int) -> None:
    """The forms of torch's functions for optimizer states, before the first step and after."""
    import torch.distributed.checkpoint.state_dict as torchs

    for put in (layouts()["rows"], layouts()["columns"]):
        for first in (0, 2):
            straight, resumed = (steprule.LBFGS(parameters(put), **OPTIONS["short"]) for _ in range(2))
            for _ in range(first):
                straight.step(closure_of(straight, put))
            for options in (
                torchs.StateDictOptions(),
                torchs.StateDictOptions(full_state_dict=True),
                torchs.StateDictOptions(flatten_optimizer_state_dict=True),
            ):
                one, other = (nn.ParameterList(flat(x)) for x in (straight, resumed))
                saved = torchs.get_optimizer_state_dict(one, straight, options=options)
                torchs.set_optimizer_state_dict(other, resumed, saved, options=options)
                assert_same(results(resumed)[1], results(straight)[1])
            for p, q in zip(flat(resumed), flat(straight), strict=True):
                p.data.copy_(q.data)
            for optimizer in (straight, resumed):
                optimizer.step(closure_of(optimizer, put))
            assert_same(results(resumed), results(straight))
    plain = run(lambda x: x, OPTIONS["short"])
    with pytest.raises(ValueError, match=r"parameter 0 has .*al, d, .*must have .*pairs.*Was it sharded"):
        resumed.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"only the first keeps any|'pairs' is not part"):
        plain.load_state_dict(resumed.state_dict())


def different_losses(rank: int) -> None:
    put = layouts()["rows"]
    optimizer = steprule.LBFGS(parameters(put))
    same = closure_of(optimizer, put)
    with pytest.raises(ValueError, match=r"LBFGS: the closure returns .* in one process and .* in another"):
        optimizer.step(lambda: same() + rank)
    assert_same(results(optimizer)[0], [numbers(s, torch.float32, 10 + i) for i, s in enumerate(SHAPES)])


def not_finite_in_one(rank: int) -> None:
    """A loss, or an element of a gradient, that is NaN in one process stops all."""
    put = layouts()["rows"]
    for kind in ("loss", "gradient"):
        optimizer = steprule.LBFGS(parameters(put))
        same = closure_of(optimizer, put)

        def closure(kind: str = kind, same: Any = same, optimizer: Any = optimizer) -> Any:
            value = same()
            if kind == "gradient":
                flat(optimizer)[0].grad._local_tensor[0, 0] = math.nan if rank else 1.0
            return math.nan if kind == "loss" and rank else value

        with pytest.warns(RuntimeWarning, match="nothing moved"):
            optimizer.step(closure)
        assert_same(results(optimizer)[0], [numbers(s, torch.float32, 10 + i) for i, s in enumerate(SHAPES)])


def gradient_in_one(rank: int) -> None:
    """What is None in all counts as zeros, as without shards; what is None in one is an error in all."""
    put = layouts()["rows"]
    made = [steprule.LBFGS(named(parameters(x))) for x in (put, lambda x: x)]
    for optimizer, own in zip(made, (put, lambda x: x), strict=True):
        same = closure_of(optimizer, own)

        def closure(same: Any = same, optimizer: Any = optimizer) -> Any:
            value = same()
            flat(optimizer)[1].grad = None
            return value

        optimizer.step(closure)
    first, second = (results(x)[0] for x in made)
    assert_same(first[1], numbers(SHAPES[1], torch.float32, 11))
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)

    def different() -> Any:
        value = closure_of(made[0], put)()
        if rank:
            flat(made[0])[2].grad = None
        return value

    with pytest.raises(ValueError, match=r"LBFGS: 'two' has a gradient in some processes and none in others"):
        made[0].step(different)
    assert_same(results(made[0])[0], first)


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return list(zip(("zero", "one", "two", "three", "four"), params, strict=True))


def less_room(rank: int) -> None:
    """Of a history that has become too long the newest pairs stay, even if the next step adds none."""
    put = layouts()["rows"]
    optimizer = run(put, {"max_iter": 4, "history_size": 5})
    first = optimizer.state[flat(optimizer)[0]]
    rows, ratios = whole(first["old_stps"]), first["ro"].clone()
    assert first["pairs"] == 5
    optimizer.param_groups[0].update(history_size=2, tolerance_grad=1e9)
    optimizer.step(closure_of(optimizer, put))
    assert first["pairs"] == 2
    assert_same([whole(first["old_stps"]), first["ro"]], [rows[3:], ratios[3:]])


def half_precision(rank: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        found = [results(run(put, {"max_iter": 4, "lr": 0.01}, dtype)) for put in layouts().values()]
        for own in found[1:]:
            assert_same(own, found[0], str(dtype))


def what_it_says(rank: int) -> None:
    put = layouts()["rows"]
    optimizer = steprule.LBFGS(parameters(put), max_iter=3, max_eval=50, history_size=7)
    stale = whole_sum(optimizer)
    optimizer.step(closure_of(optimizer, put))
    said = optimizer.explain()
    assert "direction: 2 of 7 pairs kept" in said
    assert "every process moves its parts" in said
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def whole_sum(optimizer: Any) -> Any:
    return (flat(optimizer)[0] ** 2).sum().full_tensor()


def test_one_two_and_four_processes(tmp_path: Path) -> None:
    for count in (1, 2, 4):
        own = tmp_path / str(count)
        own.mkdir()
        in_processes(count, "every_layout", own, "test_lbfgs_sharded", str(tmp_path / "of one"))


def test_two_processes(tmp_path: Path) -> None:
    in_processes(2, "small_checks", tmp_path, "test_lbfgs_sharded")
