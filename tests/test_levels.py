"""Values per tensor, per group and for all parameters: every runner computes what the formula says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rules import assert_same, assert_same_run, flat, numbers, snapshot
from torch import nn

from steprule import Elementwise, decay, hyper, slot
from steprule.declare import parameter
from steprule.words import ema, larger, largest, mean, norm, smaller, sqrt, total, where

SHAPES = [[(3, 4), (50, 7)], [(17,), ()]]
RUNNERS = {"loop": {"foreach": False, "fused": False}, "lists": {"foreach": True}, "kernel": {"fused": True}}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


class Prodigy(Elementwise):
    """Adam that finds its own learning rate: a sum over all parameters feeds back."""

    lr: float = hyper(default=1.0, at_least=0)
    betas: tuple[float, float] = hyper(default=(0.9, 0.999), at_least=0, below=1)
    eps: float = hyper(default=1e-8, at_least=0)
    d0: float = hyper(default=1e-3, above=0)
    weight_decay: float = decay(default=0.0, mode="decoupled")

    d = slot("d", per="all", starts="d0")
    d_num = slot("d_numerator", per="all")
    start = slot("p0", starts=parameter)
    m, v, r = slot("exp_avg"), slot("exp_avg_sq", never_negative=True), slot("s")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        beta1, beta2 = h.betas
        beta3, d, step = sqrt(beta2), s.d, s.d * h.lr
        s.m = beta1 * s.m + (d * (1 - beta1)) * g
        s.v = beta2 * s.v + (d * d * (1 - beta2)) * g * g
        s.r = beta3 * s.r + (d / h.d0 * step) * g
        s.d_num = beta3 * s.d_num + (d / h.d0) * step * total(g * (s.start - p), over="all")
        s.d = larger(d, s.d_num / total(abs(s.r), over="all"))
        return -step * s.m / (sqrt(s.v) + s.d * h.eps)


def prodigy(groups: Any, gradients: Any, lrs: Any) -> Any:
    d, numerator, beta3 = 1e-3, 0.0, math.sqrt(0.999)
    start = copy.deepcopy(groups)
    m, v, r = ([[np.zeros_like(p) for p in group] for group in groups] for _ in range(3))
    for step in gradients:
        moved, size = 0.0, 0.0
        for i, group in enumerate(groups):
            for j, p in enumerate(group):
                g = step[i][j]
                m[i][j] = 0.9 * m[i][j] + d * 0.1 * g
                v[i][j] = 0.999 * v[i][j] + d**2 * 0.001 * g**2
                r[i][j] = beta3 * r[i][j] + d / 1e-3 * d * lrs[i] * g
                moved += np.sum(g * (start[i][j] - p))
                size += np.sum(abs(r[i][j]))
        numerator = beta3 * numerator + d / 1e-3 * d * lrs[0] * moved
        new = max(d, numerator / size)
        for i, group in enumerate(groups):
            for j in range(len(group)):
                group[j] = group[j] - d * lrs[i] * m[i][j] / (np.sqrt(v[i][j]) + new * 1e-8)
        d = new
    return d


class Lamb(Elementwise):
    """A ratio of norms of each tensor."""

    lr: float = hyper(default=0.1, at_least=0)
    m = slot("exp_avg")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.m = ema(s.m, g, 0.9)
        u = s.m / (1 - 0.9**t)
        return -h.lr * where(norm(p) > 0, norm(p) / norm(u), 1.0) * u


def lamb(groups: Any, gradients: Any, lrs: Any) -> None:
    m = [[np.zeros_like(p) for p in group] for group in groups]
    for t, step in enumerate(gradients, 1):
        for i, group in enumerate(groups):
            for j, p in enumerate(group):
                m[i][j] = 0.9 * m[i][j] + 0.1 * step[i][j]
                u = m[i][j] / (1 - 0.9**t)
                group[j] = p - lrs[i] * np.linalg.norm(p) / np.linalg.norm(u) * u


class Novo(Elementwise):
    """A second moment of one number per tensor, made of a norm."""

    lr: float = hyper(default=0.1, at_least=0)
    v = slot("exp_avg_sq", per="tensor")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.v = where(t == 1, norm(g) ** 2, 0.5 * s.v + 0.5 * norm(g) ** 2)
        return -h.lr * g / (sqrt(s.v) + 1e-8)


def novo(groups: Any, gradients: Any, lrs: Any) -> None:
    v: dict[Any, Any] = {}
    for step in gradients:
        for i, group in enumerate(groups):
            for j, p in enumerate(group):
                square = np.sum(step[i][j] ** 2)
                new = 0.5 * v[i, j] + 0.5 * square if (i, j) in v else square
                group[j] = p - lrs[i] * step[i][j] / (np.sqrt(new) + 1e-8)
                v[i, j] = float(np.float32(new))  # as it is stored


class Clipped(Elementwise):
    """All words over a group and over all, one made of the other, and a count per group."""

    lr: float = hyper(default=0.1, at_least=0)
    k = slot("k", per="group")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.k = s.k + 1
        g = g * smaller(1.0, 2.0 / norm(g, over="group"))
        g = g - mean(g, over="all")
        return -h.lr * where(s.k % 2 == 0, 0.5, 1.0) * g / largest(abs(g), over="all")


def clipped(groups: Any, gradients: Any, lrs: Any) -> None:
    for k, step in enumerate(gradients, 1):
        size = [math.sqrt(sum(np.sum(g**2) for g in group)) for group in step]
        clip = [[g * min(1.0, 2.0 / size[i]) for g in group] for i, group in enumerate(step)]
        everything = np.concatenate([np.ravel(g) for group in clip for g in group])
        for i, group in enumerate(groups):
            for j, p in enumerate(group):
                g = clip[i][j] - everything.mean()
                scale = abs(everything - everything.mean()).max()
                group[j] = p - lrs[i] * (0.5 if k % 2 == 0 else 1.0) * g / scale


MEANING: dict[Any, Callable[..., Any]] = {Prodigy: prodigy, Lamb: lamb, Novo: novo, Clipped: clipped}


def parameters(dtype: torch.dtype) -> list[list[nn.Parameter]]:
    return [[nn.Parameter(numbers(shape, dtype, 7)) for shape in group] for group in SHAPES]


def made(rule: Any, dtype: torch.dtype = torch.float32, lrs: Any = (0.5, 0.5), **options: Any) -> Any:
    groups = [{"params": group, "lr": lr} for group, lr in zip(parameters(dtype), lrs, strict=True)]
    return rule(groups, **options)


def advance(optimizer: Any, first: int = 0, last: int = 5) -> Any:
    for step in range(first, last):
        for place, param in enumerate(flat(optimizer)):
            param.grad = numbers(tuple(param.shape), param.dtype, 100 * step + place)
        optimizer.step()
    return optimizer


def meant(rule: Any, dtype: torch.dtype, lrs: Any = (0.5, 0.5)) -> list[Any]:
    """What five steps come to in float64."""

    def exact(tensor: Any) -> Any:
        return tensor.detach().double().numpy()

    groups = [[exact(p) for p in group] for group in parameters(dtype)]
    gradients: list[Any] = []
    for step in range(5):
        places = iter(range(10))
        gradients.append([[exact(numbers(s, dtype, 100 * step + next(places))) for s in x] for x in SHAPES])
    MEANING[rule](groups, gradients, lrs)
    return [p for group in groups for p in group]


@pytest.fixture(params=[*RUNNERS, "gpu"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return RUNNERS[request.param] if request.param in RUNNERS else request.getfixturevalue("on_a_gpu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", MEANING)
def test_every_runner_comes_to_what_is_meant(rule: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    low = {"low_precision": "none"} if dtype == torch.bfloat16 else {}
    optimizer = advance(made(rule, dtype, **options, **low))
    for given, wanted in zip(flat(optimizer), meant(rule, dtype), strict=True):
        np.testing.assert_allclose(
            given.detach().double(), wanted, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype]
        )


@pytest.mark.parametrize("rule", [Lamb, Novo, Clipped])
def test_groups_keep_their_own_hyper_parameters(rule: Any, options: dict[str, Any]) -> None:
    optimizer = advance(made(rule, lrs=(0.5, 0.0), **options))
    for given, wanted in zip(flat(optimizer), meant(rule, torch.float32, (0.5, 0.0)), strict=True):
        np.testing.assert_allclose(given.detach().double(), wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("rule", MEANING)
def test_a_checkpoint_goes_on_with_the_same_bits(rule: Any, options: dict[str, Any]) -> None:
    whole = advance(made(rule, **options), 0, 4)
    first = advance(made(rule, **options), 0, 2)
    second = made(rule, **options)
    for here, there in zip(flat(second), flat(first), strict=True):
        here.data.copy_(there.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same_run(advance(second, 2, 4), whole)
    keys = {x.key for x in rule.slots.values() if x.shared}
    assert [[g[k] for k in keys] for g in second.param_groups] == [
        [g[k] for k in keys] for g in whole.param_groups
    ]


def test_runners_side_by_side_share_their_sums() -> None:
    """One group by the kernel, one by the loop: what they share is the same as if all were by one."""
    optimizer = made(Clipped)
    optimizer.param_groups[1]["fused"] = False
    optimizer.param_groups[1]["foreach"] = False
    advance(optimizer)
    for given, wanted in zip(flat(optimizer), meant(Clipped, torch.float32), strict=True):
        np.testing.assert_allclose(given.detach().double(), wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("rule", [Lamb, Clipped])
def test_gradients_live_until_every_batch_has_read_them(rule: Any) -> None:
    """Copies of lazily negated gradients, of two batches: no one else holds them."""
    results: list[Any] = []
    for options in RUNNERS["loop"], RUNNERS["kernel"]:
        dtypes = (torch.float32, torch.bfloat16)
        params = [nn.Parameter(numbers((600, 50), dtype, place)) for place, dtype in enumerate(dtypes)]
        optimizer = rule(params, **options, low_precision="none")
        for param in params:
            param.grad = torch._neg_view(numbers((600, 50), param.dtype, 9))
        optimizer.step()
        results.append([param.detach().float() for param in params])
    for given, wanted in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)


def test_the_state_is_there_before_the_first_step() -> None:
    optimizer = made(Prodigy, torch.bfloat16)
    optimizer.init_state()
    for param in flat(optimizer):
        start = optimizer.state[param]["p0"]
        assert start.dtype == torch.float32
        assert_same(start, param.detach().float())
    assert [group["d"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    assert "p0" not in {key.removesuffix("_codes") for key in made(Lamb).state}


def test_a_group_that_joins_later_takes_what_all_share(options: dict[str, Any]) -> None:
    optimizer = advance(made(Prodigy, **options))
    for group in optimizer.param_groups:
        group["d"] = 0.5
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.5})
    assert [group["d"] for group in optimizer.param_groups] == [0.5] * 3
    advance(optimizer, 5, 6)
    assert len({group["d_numerator"] for group in optimizer.param_groups}) == 1


def test_parameters_without_gradients_take_no_part(options: dict[str, Any]) -> None:
    whole, part = made(Clipped, **options), made(Clipped, **options)
    del whole.param_groups[1]
    advance(whole, 0, 1)
    for place, param in enumerate(flat(part)):
        param.grad = numbers(tuple(param.shape), param.dtype, place) if place < 2 else None
    part.step()
    for one, other in zip(flat(whole), flat(part)[:2], strict=True):
        assert_same(one.detach(), other.detach())
    assert [group["k"] for group in part.param_groups] == [1.0, 0.0]
    kept = snapshot(part)
    part.zero_grad()
    part.step()
    assert_same(snapshot(part), kept)


def test_groups_agree_on_what_all_share(options: dict[str, Any]) -> None:
    optimizer = advance(made(Prodigy, **options), 0, 1)
    optimizer.param_groups[1]["lr"] = 0.25
    kept = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"Prodigy: lr is 0\.5 in parameter group 0 and 0\.25 in another"):
        optimizer.step()
    assert_same(snapshot(optimizer), kept)


def test_the_learning_rate_is_found() -> None:
    """From a thousandth of what is needed: the distance from the start to the optimum is 10."""
    param = nn.Parameter(torch.zeros(4))
    optimizer = Prodigy([param], d0=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        (param - 5).square().sum().backward()
        optimizer.step()
    assert 0.5 < optimizer.param_groups[0]["d"] < 10
    torch.testing.assert_close(param.detach(), torch.full((4,), 5.0), atol=0.5, rtol=0)


def test_a_skipped_step_leaves_what_is_shared(options: dict[str, Any]) -> None:
    optimizer = made(Prodigy, nonfinite="skip", **options)
    advance(optimizer, 0, 2)
    kept = [group["d_numerator"] for group in optimizer.param_groups]
    flat(optimizer)[0].grad.fill_(math.nan)
    optimizer.step()
    assert [group["d_numerator"] for group in optimizer.param_groups] == kept


@pytest.mark.parametrize("rule", [Lamb, Novo])
def test_sums_over_a_tensor_stay_on_the_device(
    rule: Any, on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import NoLooking

    optimizer = advance(made(rule, capturable=True), 0, 2)
    with monkeypatch.context() as looking, NoLooking():
        looking.setattr(torch.Tensor, "numpy", None)
        optimizer.step()


def test_a_graph_refuses_sums_over_parameters(on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from steprule.engine.runners.kernels.gpu import launch as gpu_launch

    optimizer = advance(made(Clipped, capturable=True), 0, 1)
    kept = snapshot(optimizer)
    monkeypatch.setattr(gpu_launch, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"Clipped: a CUDA graph is being captured.*sum over several"):
        optimizer.step()
    assert_same(snapshot(optimizer), kept)


def wrong(body: str, per: str = "all") -> Any:
    scope: dict[str, Any] = {}
    text = f"def update(h, p, g, s, t):\n    {body}"
    words = {"norm": norm, "total": total, "mean": mean, "where": where}
    exec(text, words, scope)
    members = {"__annotations__": {"lr": "float"}, "lr": hyper(default=0.1), "d": slot("d", per=per)}
    return type("Mine", (Elementwise,), {**members, "update": staticmethod(scope["update"])})


@pytest.mark.parametrize(
    ("body", "per", "message"),
    [
        (
            "s.d = norm(g); return g",
            "all",
            r"slot 'd' is one for all parameters \(per='all'\).* is one per tensor",
        ),
        ("s.d = norm(g, over='group'); return g", "all", r"given a value that is one per parameter group"),
        ("s.d = t; return g", "group", r"t, the count of a tensor's own steps, is one per tensor"),
        ("s.d = g; return g", "all", r"slot 'd' .*one plain number"),
        (
            "return g * norm(g, over='rows')",
            "all",
            r"over='rows'\): over must be one of 'tensor', 'row', 'column', 'group', 'all'",
        ),
        ("return g * total(norm(g), over='all')", "all", r"total\(…\) of a value that is one per tensor"),
        ("return g * total(h.lr, over='all')", "all", r"Drop total"),
    ],
)
def test_a_level_that_does_not_fit_is_named(body: str, per: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        wrong(body, per)([nn.Parameter(torch.ones(3))])


def test_a_start_at_the_parameter_is_for_elements() -> None:
    with pytest.raises(TypeError, match="starts at parameter"):
        type("Mine", (Elementwise,), {"d": slot("d", per="tensor", starts=parameter)})
    with pytest.raises(ValueError, match="'p0' cannot be kept in int8"):
        made(Prodigy, state_dtype={"p0": "int8"})
    made(Prodigy, state_dtype={"p0": "fp32"})


def test_nothing_is_on_a_tape_where_sums_are_shared() -> None:
    with pytest.raises((RuntimeError, ValueError), match="differentiable"):
        made(Prodigy, differentiable=True)
