"""What a stranger may try that no other test does: odd rules, odd states, swapped tensors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from rules import Case, each, flat, numbers
from torch import nn

import steprule
from steprule import Elementwise, hyper, slot
from steprule.words import as_stored, ema


@pytest.mark.parametrize("letter", ["p", "g"])
def test_a_slot_is_not_called_as_the_parameter_or_the_gradient(letter: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine: slot '{letter}' has the name of the"):
        type("Mine", (Elementwise,), {letter: slot("avg")})


class Random(Elementwise):
    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return -random.random() * g


def test_a_rule_that_changes_by_itself_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Random\.update does not say the same each time"):
        Random([nn.Parameter(torch.ones(3))])


class Stored(Elementwise):
    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return as_stored(g)


def test_only_plain_numbers_are_rounded_as_stored() -> None:
    with pytest.raises(TypeError, match=r"Stored\.update: as_stored\(…\) takes a plain number"):
        Stored([nn.Parameter(torch.ones(3))])


class OwnConstructor(Elementwise):
    """With a constructor as torch's optimizers have one."""

    lr: float = hyper(default=1e-3, at_least=0)
    m = slot("exp_avg")

    def __init__(self, params: Any, lr: float = 0.5):
        super().__init__(params, lr=lr)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.m = ema(s.m, g, 0.9)
        return -h.lr * s.m


def test_a_rule_may_write_its_own_constructor() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = OwnConstructor([param], lr=0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 1 - 0.25 * 0.1))


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}], ids=str)
def test_states_that_share_a_tensor_are_stepped_one_after_the_other(options: dict[str, Any]) -> None:
    """As an in-place restore can leave them."""
    results: list[list[torch.Tensor]] = []
    # torch's lists step both at once.
    for make, runner in ((steprule.AdamW, options), (torch.optim.AdamW, {"foreach": False})):
        params = [nn.Parameter(numbers((5,), torch.float32, seed)) for seed in (1, 2)]
        optimizer = make(params, lr=0.1, **runner)
        for step in range(3):
            for place, param in enumerate(params):
                param.grad = numbers((5,), torch.float32, 10 * step + place)
            optimizer.step()
            if step == 0:
                optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
        results.append([*(p.detach() for p in params), optimizer.state[params[0]]["step"]])
    for given, wanted in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted)


@each()
def test_tensors_can_be_swapped_after_a_step(case: Case) -> None:
    optimizer = case.make([nn.Parameter(numbers((4, 3), torch.float32, 1))])
    (param,) = flat(optimizer)
    case.advance(optimizer)
    torch.utils.swap_tensors(param, nn.Parameter(numbers((4, 3), torch.float32, 3)))
    before = param.detach().clone()
    case.advance(optimizer)
    assert not torch.equal(param, before)
