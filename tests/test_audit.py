"""`audit`: what an optimizer lacks of a model, has twice, has frozen, or has from elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import steprule
from steprule import SGD, AdamW, audit

KINDS = ("missing", "duplicated", "frozen", "foreign")


def network(tied: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    if tied:
        model[3].weight = model[0].weight
    return model


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_is_well(kind: Any, tied: bool) -> None:
    model = network(tied)
    for params in (model.parameters(), model.named_parameters(), [{"params": model.parameters()}]):
        report = audit(model, kind(params), strict=True)
        assert report.ok
        assert not any(report.findings().values())
        assert report.parameters == 6 - tied
    assert str(report) == f"{6 - tied} parameters: every trainable one is in one group"


@given(st.lists(st.sampled_from(["once", "absent", "twice"]), min_size=6, max_size=6), st.integers(0, 63))
def test_every_parameter_is_reported_for_what_it_is(places: list[str], frozen: int) -> None:
    model = network()
    named = list(model.named_parameters())
    for place, (_, param) in enumerate(named):
        param.requires_grad_(not frozen >> place & 1)
    stray = nn.Parameter(torch.ones(2, 3))
    optimizer = SGD([{"params": [("stray", stray)]}, {"params": [("more", torch.ones(1))], "name": "more"}])
    for (name, param), where in zip(named, places, strict=True):
        for group in optimizer.param_groups[: ["absent", "once", "twice"].index(where)]:
            group["params"].append(param)
            group["param_names"].append(name)
    report = audit(model, optimizer)
    is_frozen = {name: bool(frozen >> place & 1) for place, (name, _) in enumerate(named)}
    where = {name: place for (name, _), place in zip(named, places, strict=True)}
    assert list(report.missing) == [x for x in where if where[x] == "absent" and not is_frozen[x]]
    assert list(report.duplicated) == [x for x in where if where[x] == "twice"]
    assert list(report.frozen) == [x for x in where if where[x] != "absent" and is_frozen[x]]
    assert report.foreign == {
        "stray": "in group 0, with shape (2, 3)",
        "more": "in group 1 (more), with shape (1,)",
    }
    assert not report.ok
    for kind in KINDS:
        for name, text in getattr(report, kind).items():
            assert name in str(report)
            assert text in str(report)


def test_a_forgotten_parameter_is_an_error_with_its_name() -> None:
    model = network()
    decay = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    message = r"audit: trainable, but in no group: '1\.weight', '1\.bias', '2\.bias'\. Correct the groups"
    with pytest.raises(ValueError, match=message):
        audit(model, AdamW(decay), strict=True)


def test_an_optimizer_of_a_copy_is_found_out() -> None:
    model = network()
    report = audit(copy.deepcopy(model), AdamW(model))
    assert list(report.missing) == list(report.foreign)
    assert "the model has another tensor of this name, made later" in report.foreign["2.weight"]
    # Without names, the place in the optimizer is all there is to say.
    unnamed = audit(copy.deepcopy(model), torch.optim.SGD(model.parameters()))
    assert unnamed.foreign["parameter 5 of group 0"] == "in group 0, with shape (5, 4)"
    assert len(unnamed.foreign) == 6


def test_several_optimizers_share_a_model() -> None:
    model = network()
    matrices = torch.optim.Muon([model[2].weight])
    rest = AdamW([p for p in model.parameters() if p is not model[2].weight])
    assert audit(model, [matrices, rest]).ok
    twice = audit(model, (matrices, AdamW(model)))
    assert twice.duplicated == {"2.weight": "in group 0 of Muon and group 0 of AdamW"}
    assert not audit(model, [matrices]).ok


def test_wrappers_and_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    optimizer = AdamW(model)
    assert audit(model, optimizer).ok
    model(torch.ones(1, 7))
    assert audit(nn.DataParallel(model), optimizer).ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], AdamW([torch.ones(1)])), "audit: got list, must be an nn.Module"),
        ((network(), network()), "audit: got Sequential, which has no param_groups"),
        ((network(), [{"params": []}]), "audit: got dict, which has no param_groups"),
    ],
)
def test_what_audit_refuses(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        steprule.audit(*arguments)


def test_parameters_of_one_name_from_several_optimizers_are_all_reported() -> None:
    report = audit(nn.Linear(2, 2), [SGD(nn.Linear(2, 2)), AdamW(nn.Linear(2, 2))])
    where = ["weight in group 0 of SGD", "bias in group 0 of SGD"]
    assert list(report.foreign) == [*where, *(x.replace("SGD", "AdamW") for x in where)]
    unnamed = audit(nn.Linear(2, 2), [SGD(nn.Linear(2, 2).parameters()), SGD(nn.Linear(2, 2).parameters())])
    assert len(unnamed.foreign) == 4
    assert unnamed.foreign["parameter 1 of group 0 of SGD (optimizer 1)"].endswith("with shape (2,)")
