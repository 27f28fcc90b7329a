"""Parameters and groups, in every form that torch takes, for every rule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rules import (
    Case,
    assert_same,
    assert_same_run,
    each,
    flat,
    gradient_for,
    matrices_only,
    numbers,
    plain,
    snapshot,
)
from torch import Tensor, nn

import steprule


class Model(nn.Module):
    """A module that holds exactly these parameters."""

    def __init__(self, params: list[Any]):
        super().__init__()
        for place, param in enumerate(params):
            self.register_parameter(f"weight_{place}", param)


FORMS: dict[str, Any] = {
    "list": lambda params: params,
    "tuple": tuple,
    "generator": lambda params: (p for p in params),
    "names": lambda params: Model(params).named_parameters(),
    "module": Model,
    "group": lambda params: [{"params": params}],
    "group of a generator": lambda params: [{"params": (p for p in params)}],
    "group of names": lambda params: [{"params": Model(params).named_parameters()}],
    "group of a module": lambda params: [{"params": Model(params)}],
    "generator of groups": lambda params: (group for group in [{"params": params}]),
}


@each(plain)
@pytest.mark.parametrize("form", FORMS)
def test_parameters_in_every_form(case: Case, form: str) -> None:
    if form == "module" and matrices_only(case.rule):
        pytest.skip(f"{case.name} steps the hidden matrices of a module, and this one has none")
    optimizer, wanted = case.make(FORMS[form](case.parameters())), case.make()
    case.advance(optimizer, 2)
    case.advance(wanted, 2)
    assert_same_run(optimizer, wanted)
    if form in ("names", "module", "group of names", "group of a module"):
        names = [f"weight_{place}" for place in range(len(case.shapes))]
        assert optimizer.param_groups[0]["param_names"] == names
    else:
        assert "param_names" not in optimizer.param_groups[0]


@each(lambda case: case.many_groups)
def test_a_single_tensor_is_a_group(case: Case) -> None:
    first, second = case.parameters()[:2]
    optimizer = case.make([{"params": first}, {"params": [second], "lr": 0.25}])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert optimizer.param_groups[1]["lr"] == 0.25


@each(lambda case: plain(case) and case.many_groups and not case.shares and not case.draws)
@given(data=st.data())
def test_groups_are_optimizers_of_their_own(case: Case, data: Any) -> None:
    count = len(case.shapes)
    order = data.draw(st.permutations(range(count)))
    sizes = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=count))
    rates = data.draw(st.lists(st.sampled_from([0.5, 0.1, 1e-3]), min_size=count, max_size=count))
    places = iter(order)
    parts = [part for size in sizes if (part := list(itertools.islice(places, size)))]
    params = case.parameters()
    optimizer = case.make(
        [{"params": [params[i] for i in part], "lr": rates[n]} for n, part in enumerate(parts)]
    )
    twins = case.parameters()
    gradients = [numbers(tuple(p.shape), p.dtype, seed=i) for i, p in enumerate(params)]
    for n, part in enumerate(parts):
        alone = case.make([twins[i] for i in part], lr=rates[n])
        for _ in range(2):
            for i in part:
                twins[i].grad = gradients[i].to_sparse(1) if case.sparse_only else gradients[i]
            case.step(alone)
    for _ in range(2):
        for part in parts:
            for i in part:
                params[i].grad = gradients[i].to_sparse(1) if case.sparse_only else gradients[i]
        case.step(optimizer)
    for i in order[: sum(map(len, parts))]:
        assert_same(params[i].detach(), twins[i].detach(), f"parameter {i}")


@each(lambda case: case.many_groups and not case.draws)
def test_a_group_added_in_the_middle_starts_from_its_beginning(case: Case) -> None:
    early, late = case.parameters()[:1], case.parameters()[1:]
    optimizer, alone = case.make(early), case.make(case.parameters()[1:])
    case.advance(optimizer, 2)
    kept = snapshot(optimizer)
    given_group = {"params": late}
    optimizer.add_param_group(given_group)
    assert set(given_group) == {"params"}
    assert_same([early[0].detach()], kept[0])
    assert_same(optimizer.state_dict()["state"], kept[1]["state"])
    assert set(optimizer.param_groups[1]) == set(optimizer.param_groups[0])
    case.advance(optimizer, 2, first=2)
    if case.name == "DAdaptAdam":
        return  # d, which all parameters share, has grown by now; Prodigy's has not
    for number in (2, 3):
        copy_gradients(case, optimizer, alone, number)
        case.step(alone)
    for param, twin in zip(late, flat(alone), strict=True):
        assert_same(param.detach(), twin.detach())
        assert_same(dict(optimizer.state[param]), dict(alone.state[twin]))


def copy_gradients(case: Case, optimizer: Any, alone: Any, number: int) -> None:
    """Give the parameters of `alone` the gradients that `advance` gave to the last ones of `optimizer`."""
    skipped = len(flat(optimizer)) - len(flat(alone))
    for place, twin in enumerate(flat(alone)):
        twin.grad = gradient_for(case, twin, 1000 * number + place + skipped)


@each(plain)
def test_the_group_is_read_at_every_step(case: Case) -> None:
    """Trainers and users write a new lr, new parameters, or new memory under a parameter."""
    optimizer = case.make(lr=0.5)
    case.advance(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0 if not case.closure else 1e-12
    if case.name == "ASGD":  # its step size is set one step ahead
        case.advance(optimizer)
    # These still move, to where their sums point.
    still = {
        "MADGRAD": lambda p: optimizer.state[p]["grad_sum"],
        "DAdaptAdam": lambda p: (optimizer.state[p]["s"] / optimizer.state[p]["s"].norm()).round(decimals=5),
    }
    what = still.get(case.name, lambda p: p.detach())
    before = [what(p).clone() for p in flat(optimizer)]
    case.advance(optimizer, 2, first=1)
    for param, old in zip(flat(optimizer), before, strict=True):
        if case.name == "Rprop":  # its lr is only where the step sizes start
            assert not torch.equal(param, old)
        else:
            torch.testing.assert_close(what(param), old, atol=1e-9, rtol=0)


@each(lambda case: not case.closure and not case.shares)
def test_a_parameter_swapped_for_another_is_stepped_from_its_beginning(case: Case) -> None:
    optimizer, fresh = case.make(), case.make()
    case.advance(optimizer, 2)
    old = flat(optimizer)[0]
    resting = old.detach().clone()
    swapped = case.parameters()[0]
    optimizer.param_groups[0]["params"][0] = swapped
    case.advance(optimizer, 2)
    case.advance(fresh, 2)
    assert_same(old.detach(), resting)
    assert_same(swapped.detach(), flat(fresh)[0].detach())
    saved = optimizer.state_dict()
    assert set(saved["state"]) <= set(range(len(flat(optimizer))))
    assert set(saved["state"]) == set(fresh.state_dict()["state"])


@each()
def test_new_memory_under_a_parameter(case: Case) -> None:
    optimizer, twin = case.make(), case.make()
    case.advance(optimizer, 2)
    case.advance(twin, 2)
    for param in flat(optimizer):
        param.data = param.data.clone()
    case.advance(optimizer, 2, first=2)
    case.advance(twin, 2, first=2)
    assert_same_run(optimizer, twin)


# What is refused, as torch refuses it


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 2))


def used_up() -> Any:
    spent = iter([weight()])
    list(spent)
    return spent


SHARED = weight()
REFUSED: dict[str, tuple[Any, str]] = {
    "a tensor": (lambda: weight(), r"iterable.*\[weight\]"),
    "a string": (lambda: "weights", "iterable"),
    "a function": (lambda: Model([weight()]).parameters, r"parameters\(\)"),
    "an empty list": (lambda: [], "empty parameter list"),
    "an empty module": (lambda: nn.Module(), "empty parameter list"),
    "a used-up generator": (used_up, "empty parameter list.*generator"),
    "a set": (lambda: {weight(), weight()}, "set.*order.*list"),
    "a group of a set": (lambda: [{"params": {weight()}}], "set.*order.*list"),
    "a number": (lambda: [weight(), 3.0], "can only optimize tensors.*parameter 1.*float"),
    "a result": (lambda: [weight() * 2], "non-leaf.*parameter 0"),
    "a shared parameter": (
        lambda: [{"params": [SHARED]}, {"params": [SHARED]}],
        "more than one parameter group.*parameter 0",
    ),
    "a shared name": (
        lambda: [{"params": [("embed", SHARED)]}, {"params": [("head", SHARED)]}],
        "more than one parameter group.*'head'",
    ),
    "half the names": (lambda: [("a", weight()), weight()], "names"),
    "names in one group": (
        lambda: [{"params": [("a", weight())]}, {"params": [weight()]}],
        "parameter group 1.*names",
    ),
    "a group without params": (lambda: [{"lr": 0.1}], "no 'params'"),
}


@each(plain)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_parameters(case: Case, kind: str) -> None:
    """torch's exception type, and a message that names the rule, what was given and what to do."""
    params, message = REFUSED[kind]
    if not case.many_groups and kind in ("a shared parameter", "names in one group"):
        wanted: type[Exception] = ValueError
    else:
        # torch raises a KeyError here, which would print our message in quotes.
        own = {"a set": TypeError, "a group without params": ValueError}
        wanted = own.get(kind) or torchs_error(params())
    with pytest.raises(wanted, match=message) as caught:
        case.rule(params())
    assert str(caught.value).startswith(case.name)


def torchs_error(params: Any) -> type[Exception]:
    if isinstance(params, nn.Module):
        params = []
    try:
        torch.optim.SGD(params)
    except (TypeError, ValueError, KeyError) as error:
        return type(error)
    raise AssertionError("torch accepts this")


@each(lambda case: plain(case) and case.many_groups)
def test_a_refused_group_changes_nothing(case: Case) -> None:
    params = case.parameters()
    optimizer = case.make(params[:1])
    case.advance(optimizer)
    kept = snapshot(optimizer)
    bad: list[Any] = [
        {"params": params[:1]},
        {"params": params[1:], "lr": -1.0},
        {"params": params[1:], "lr": float("nan")},
        {"params": params[1:], "learning_rate": 0.1},
        {"params": [*params[1:], "x"]},
        {"params": [params[1] * 2]},
        {"params": [("name", params[1])]},
        {"lr": 0.1},
        params[1],
    ]
    for group in bad:
        before = dict(group) if isinstance(group, dict) else None
        with pytest.raises((ValueError, TypeError), match=f"^{case.name}"):
            optimizer.add_param_group(group)
        assert before is None or list(group) == list(before)
        assert len(optimizer.param_groups) == 1
        assert_same(snapshot(optimizer), kept)


@each(plain)
def test_a_parameter_twice_in_a_group_is_warned_about_and_stepped_once(case: Case) -> None:
    params, twins = case.parameters()[:1], case.parameters()[:1]
    with pytest.warns(UserWarning, match=f"{case.name}.*duplicate.*parameter 1"):
        optimizer = case.make([params[0], params[0]])
    assert len(flat(optimizer)) == 1
    twin = case.make(twins)
    case.advance(optimizer, 2)
    case.advance(twin, 2)
    assert_same_run(optimizer, twin)


@pytest.mark.parametrize("key", ["name", "initial_lr", "max_lr", "min_lr", "swa_lr"])
def test_keys_of_schedulers_and_trainers_are_welcome(key: str) -> None:
    optimizer = steprule.Adam([{"params": [weight()], key: 1.0}])
    assert optimizer.param_groups[0][key] == 1.0


# Reading


@each(plain)
def test_repr_shows_the_hyper_parameters_and_no_numbers_of_tensors(case: Case) -> None:
    text = repr(case.make(lr=0.0625))
    assert text.startswith(case.name)
    assert "lr: 0.0625" in text
    assert "group 0" in text
    assert "tensor(" not in text
    assert len(text) < 1000


@each()
def test_explain_says_rule_parameters_state_and_runner(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer)
    text = optimizer.explain()
    assert text == steprule.explain(optimizer)
    count = sum(p.numel() for p in flat(optimizer))
    size = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    assert case.name in text
    assert "group 0" in text
    assert f"{len(flat(optimizer))} parameters" in text
    assert f"{count:,} elements" in text
    assert case.closure or f"{size:,} bytes of state" in text
    assert "runner" in text


@each(lambda case: case.many_groups and case.knows("weight_decay"))
def test_explain_tells_the_groups_apart(case: Case) -> None:
    first, *rest = case.parameters()
    groups = [{"params": [first], "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    lines = case.make(groups).explain().split("group 1")
    assert "decay" in lines[0]
    assert "decay" not in lines[1]


@each(plain)
def test_train_and_eval_exist(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer)
    kept = snapshot(optimizer)
    optimizer.eval()
    optimizer.train()
    assert_same(snapshot(optimizer), kept)


@each(plain)
def test_the_default_runner_leaves_scaling_to_the_scaler(case: Case) -> None:
    """Trainers refuse gradient clipping where this attribute is set."""
    assert not getattr(case.make(), "_step_supports_amp_scaling", False)
