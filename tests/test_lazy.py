"""Lazy parameters, which have no shape before their module has seen an input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rules import Case, assert_same, each, numbers
from torch import nn

import steprule


def lazy_model() -> nn.Module:
    """Its weights have no shape before it has seen an input."""
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(4, bias=False), nn.Tanh(), nn.LazyLinear(2, bias=False))


def train(case: Case, model: nn.Module, optimizer: Any, steps: int) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model(numbers((3, 5), torch.float32, 1)) ** 2).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        if not case.closure:
            closure()
        case.prepare(optimizer)
        optimizer.step(closure)


@each(lambda case: not case.sparse_only and case.runner != "lists")
@pytest.mark.parametrize("named", [True, False])
def test_a_lazy_model_resumes_before_it_has_seen_an_input(case: Case, named: bool) -> None:
    def fresh() -> tuple[nn.Module, Any]:
        model = lazy_model()
        return model, case.make(model.named_parameters() if named else model.parameters())

    model, optimizer = fresh()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.explain()
    train(case, model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(case, model, optimizer, 2)
    wanted = copy.deepcopy(list(model.state_dict().values()))
    model, optimizer = fresh()
    if case.name == "Adafactor" and not named:
        # Rows and columns do not tell the shape.
        with pytest.raises(ValueError, match=r"^Adafactor.* parameter 0 has no shape yet.*Run the model once"):
            optimizer.load_state_dict(saved[1])
        return
    optimizer.load_state_dict(saved[1])
    model.load_state_dict(saved[0])
    train(case, model, optimizer, 2)
    torch.testing.assert_close(list(model.state_dict().values()), wanted)


def test_the_state_of_a_lazy_model_is_converted_as_that_of_any_other() -> None:
    ran: list[Any] = []
    for lazy in (False, True):
        model = nn.Sequential(nn.LazyLinear(80, bias=False), nn.LazyLinear(70, bias=False))
        torch.manual_seed(0)
        model(torch.ones(2, 90))
        donor = steprule.AdamW(model)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        donor.step()
        other = nn.Sequential(nn.LazyLinear(80, bias=False), nn.LazyLinear(70, bias=False))
        if not lazy:
            other(torch.ones(2, 90))
        optimizer = steprule.AdamW(other, state_dtype="int8")
        assert optimizer.explain()
        report = optimizer.load_state_dict(donor.state_dict())
        ran.append([str(report), list(optimizer.state.values())])
    assert "int8" in ran[0][0]
    assert_same(ran[1], ran[0])


def test_a_lazy_parameter_of_another_shape_than_its_state_is_named() -> None:
    donor = steprule.AdamW([("0.weight", nn.Parameter(torch.ones(4, 5)))])
    donor.init_state()
    model = nn.Sequential(nn.LazyLinear(4, bias=False))
    optimizer = steprule.AdamW(model)
    optimizer.load_state_dict(donor.state_dict())
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"^AdamW: '0.weight' .*'exp_avg' has shape \(4, 5\), not \(4, 6\)"):
        optimizer.step()


def test_muon_looks_at_a_lazy_parameter_when_it_has_a_gradient() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    optimizer = steprule.Muon(model.named_parameters())
    model(torch.ones(2, 6)).sum().backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=r"^Muon only supports 2D parameters, but '0.bias'"):
        optimizer.step()
    assert_same([param.detach() for param in model.parameters()], before)
