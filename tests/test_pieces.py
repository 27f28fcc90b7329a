"""Matrices of unequal sizes in one weight: each steps as if it were stored apart."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from kernels import DEFAULT, LOOP, assert_same_numbers
from rules import assert_same, numbers
from torch import Tensor, nn

import steprule
from steprule.matrix.words import matrix_word

ROWS = (300, 20, 200)
RULES: list[Any] = [steprule.Muon, steprule.AdaMuon, steprule.NorMuon, steprule.Scion]
RUNNERS = [DEFAULT, LOOP]


def give(params: Any, number: int) -> None:
    for place, param in enumerate(params):
        param.grad = numbers(tuple(param.shape), param.dtype, 10 * number + place)


def fused_and_apart(dtype: torch.dtype = torch.float32) -> tuple[list[Any], list[Any]]:
    """A weight with three matrices and another one; and the same matrices, each in a parameter."""
    weight = nn.Parameter(numbers((sum(ROWS), 64), dtype, 1))
    other = nn.Parameter(numbers((33, 50), dtype, 2))
    apart = [nn.Parameter(x.clone()) for x in weight.detach().split(ROWS)]
    return [weight, other], [*apart, nn.Parameter(other.detach().clone())]


def step(fused: list[Any], apart: list[Any], optimizers: Any, steps: int = 3) -> None:
    for number in range(steps):
        give(fused, number)
        for param, gradient in zip(apart, [*fused[0].grad.split(ROWS), fused[1].grad], strict=True):
            param.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "modifiers",
    [
        [steprule.GlobalNormClip(0.1), steprule.EMA(0.9)],
        [steprule.Cautious(), steprule.NormClip(0.1), steprule.Centralize()],
    ],
    ids=["sums over all", "sums over each"],
)
def test_each_matrix_steps_as_if_it_were_stored_apart(
    rule: Any, runner: dict[str, Any], modifiers: Any
) -> None:
    fused, apart = fused_and_apart()
    options: dict[str, Any] = {**runner, "modifiers": modifiers}
    one = rule([{"params": fused, "views": [{"split": ROWS}, None]}], **options)
    many = rule(apart, **options)
    step(fused, apart, (one, many))
    assert_same(torch.cat([x.detach() for x in apart[:3]]), fused[0].detach())
    assert_same(apart[3].detach(), fused[1].detach())
    for key, value in one.state[fused[0]].items():
        kept: list[Tensor] = [many.state[x][key] for x in apart[:3]]
        wanted = torch.cat(kept) if value.dim() else kept[0]
        assert_same(wanted.reshape(value.shape), value, key)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"state_dtype": "int8"}),
        (torch.bfloat16, {"low_precision": "kahan", "state_dtype": "bf16"}),
        (torch.bfloat16, {"low_precision": "stochastic"}),
        (torch.bfloat16, {"low_precision": "master"}),
    ],
)
def test_every_storage_and_checkpoint(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The kernel is the loop, and a run that is resumed goes on to the bit."""

    def made(params: Any, runner: dict[str, Any]) -> Any:
        views = [{"split": list(ROWS)}, None]
        return steprule.Muon([{"params": params, "views": views}], **options, **runner)

    optimizers: list[Any] = []
    for runner in RUNNERS:
        params, _ = fused_and_apart(dtype)
        optimizer = made(params, runner)
        for number in range(3):
            give(params, number)
            optimizer.step()
            saved = optimizer.state_dict()
            optimizer = made(params, runner)
            optimizer.load_state_dict(saved)
        optimizers.append(optimizer)
    assert_same_numbers(*optimizers)


def test_a_gradient_that_is_missing_and_what_explain_says() -> None:
    fused, _ = fused_and_apart()
    optimizer = steprule.Muon([{"params": fused, "views": [{"split": ROWS}, None]}])
    give(fused[1:], 0)
    optimizer.step()
    assert fused[0] not in optimizer.state
    give(fused, 0)
    optimizer.step()
    text = optimizer.explain()
    assert "matrices of 300, 20 and 200 rows: parameter 0" in text
    assert "reference" not in text
    assert "kernel: " in text


def test_an_error_names_the_rows() -> None:
    @matrix_word
    def breaks(x: Tensor) -> Tensor:
        raise RuntimeError("out of luck")

    class Breaks(steprule.Matrix):
        lr: float = steprule.hyper(0.1)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
            return -h.lr * breaks(g)

    fused, _ = fused_and_apart()
    before = fused[0].detach().clone()
    optimizer = Breaks([{"params": fused[:1], "views": [{"split": ROWS}]}])
    give(fused, 0)
    with pytest.raises(RuntimeError, match=r"parameter 0, rows \d+ to \d+"):
        optimizer.step()
    assert_same(before, fused[0].detach())


@pytest.mark.parametrize(
    ("rule", "modifiers", "reason"),
    [
        (steprule.SOAP, [], "its state 'left' is one for the whole weight"),
        (steprule.Kron, [], "its state 'left' is one for the whole weight"),
        (steprule.Muon, [steprule.Metrics()], "its state 'metrics.gradient_norm' is one for the whole weight"),
    ],
)
def test_rules_that_need_the_whole_weight_refuse(rule: Any, modifiers: Any, reason: str) -> None:
    fused, _ = fused_and_apart()
    with pytest.raises(ValueError, match=f"{reason} .*Give `split` as one number"):
        rule([{"params": fused[:1], "views": [{"split": ROWS}]}], modifiers=modifiers)


def test_every_rule_on_matrices_steps_pieces_or_refuses() -> None:
    """What is refused keeps a matrix for the whole weight; all others are compared above."""
    taken: set[Any] = set()
    refused: dict[str, str] = {}
    for rule in steprule.catalogue().values():
        if not getattr(rule, "on_matrices", False):
            continue
        fused, _ = fused_and_apart()
        try:
            rule([{"params": fused[:1], "views": [{"split": ROWS}]}])
            taken.add(rule)
        except ValueError as error:
            refused[rule.__name__] = str(error)
    assert taken == set(RULES)
    assert all("is one for the whole weight" in x for x in refused.values()), refused


def test_rows_of_transposed_matrices_are_shared() -> None:
    fused, _ = fused_and_apart()
    view = {"split": ROWS, "transpose": True}
    with pytest.raises(ValueError, match="is one per row, and transposed matrices share"):
        steprule.NorMuon([{"params": fused[:1], "views": [view]}])


def test_a_weight_that_gets_its_shape_late() -> None:
    """Nothing moves if the sizes do not fit."""
    layer = nn.LazyLinear(80, bias=False)
    optimizer = steprule.Muon([{"params": [layer.weight], "views": [{"split": (30, 10, 25)}]}])
    layer(numbers((3, 24), torch.float32, 1)).square().sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"65 together, must be 80 together, the rows of parameter 0"):
        optimizer.step()
    assert_same(before, layer.weight.detach())


def test_equal_sizes_are_a_number_of_matrices() -> None:
    weight = nn.Parameter(torch.ones(12, 4))
    optimizer = steprule.Muon([{"params": [weight], "views": [{"split": (4, 4, 4)}]}])
    assert optimizer.param_groups[0]["views"][0]["split"] == 3


def test_nothing_outlives_the_optimizer() -> None:
    fused, _ = fused_and_apart()
    optimizer = steprule.Muon([{"params": fused, "views": [{"split": ROWS}, None]}])
    give(fused, 0)
    optimizer.step()
    gone = [weakref.ref(fused[0].grad), weakref.ref(optimizer)]
    fused[0].grad = None
    assert gone[0]() is None
    del optimizer
    gc.collect()
    assert gone[1]() is None
