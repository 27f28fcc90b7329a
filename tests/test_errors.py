"""Errors of users: messages say who, what was given, what is allowed, what to do, and where."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rules import (
    ACCEPT_SPARSE,
    LOOPS,
    Case,
    assert_same,
    each,
    flat,
    give_gradients,
    plain,
    snapshot,
    sparse_rows,
)
from torch import nn

import steprule

PLAIN = [case for case in LOOPS if plain(case)]
CLOSURELESS = [case for case in PLAIN if not case.closure]
INFINITY = float("inf")

# The pairs of Rprop must also be in order; they have tests of their own below.
IN_ORDER = {"etas", "step_sizes"}


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, 2))


def is_number(field: Any) -> bool:
    if field.choices is not None:
        return False
    return isinstance(field.default, (int, float)) and not isinstance(field.default, bool)


def is_tuple(field: Any) -> bool:
    return isinstance(field.default, tuple) and None not in field.default


def hyper_parameters(kind: Any, among: Any = PLAIN) -> Any:
    """One test per rule and hyper-parameter of this kind."""
    return pytest.mark.parametrize(
        ("case", "field"),
        [
            pytest.param(case, field, id=f"{case.name}-{name}")
            for case in among
            for name, field in case.rule.fields.items()
            if kind(field)
        ],
    )


def bounds(field: Any) -> tuple[float, float]:
    """The closed range of floats that the declaration allows."""
    low, high = -INFINITY, INFINITY
    if field.at_least is not None:
        low = field.at_least
    if field.above is not None:
        low = math.nextafter(field.above, INFINITY)
    if field.at_most is not None:
        high = field.at_most
    if field.below is not None:
        high = math.nextafter(field.below, -INFINITY)
    return low, high


def outside(field: Any) -> list[Any]:
    """Numbers just beyond the range, and values that no range allows."""
    low, high = bounds(field)
    beyond: list[Any] = [math.nan, INFINITY, -INFINITY, torch.tensor(math.nan), torch.tensor(INFINITY)]
    if math.isfinite(low):
        beyond += [math.nextafter(low, -INFINITY), low - 1.0, torch.tensor(low - 1.0)]
    if math.isfinite(high):
        beyond += [math.nextafter(high, INFINITY), high + 1.0]
    return beyond


NO_NUMBERS: list[Any] = ["0.1", "abc", b"1", [], {}, (0.1, 0.2), 1j, object(), True]


def refused(case: Case, name: str, value: Any) -> None:
    """By the constructor, in a group, in `add_param_group` and on load; each names what is wrong."""
    message = rf"^{case.name}: (Tensor )?{name}"
    # torch has this one type for a line search that does not exist.
    wrong = RuntimeError if name == "line_search_fn" else (ValueError, TypeError)
    params = case.parameters()
    with pytest.raises(wrong, match=message):
        case.rule(params, **{name: value})
    where = r"parameter group 0"
    with pytest.raises(wrong, match=f"{message}.*{where}"):
        case.rule([{"params": params, name: value}])
    optimizer = case.make(params[:1])
    kept = snapshot(optimizer)
    if case.many_groups:
        with pytest.raises(wrong, match=rf"{message}.*parameter group 1"):
            optimizer.add_param_group({"params": params[1:], name: value})
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = value
    with pytest.raises(wrong, match=f"{message}.*{where}"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), kept)


@hyper_parameters(is_number)
def test_numbers_out_of_range_are_refused(case: Case, field: Any) -> None:
    for value in outside(field):
        refused(case, field.name, value)


@hyper_parameters(is_number)
def test_what_is_no_number_is_refused(case: Case, field: Any) -> None:
    for value in [*NO_NUMBERS, torch.ones(2)]:
        refused(case, field.name, value)
    with pytest.raises((TypeError, ValueError)):
        case.rule(case.parameters(), **{field.name: 10**400})


@hyper_parameters(lambda field: is_number(field) and "int" in field.type)
def test_half_a_count_is_refused(case: Case, field: Any) -> None:
    refused(case, field.name, 2.5)


@given(data=st.data())
@hyper_parameters(is_number)
def test_every_number_in_range_is_taken(case: Case, field: Any, data: Any) -> None:
    low, high = bounds(field)
    if "int" in field.type:
        value: Any = data.draw(st.integers(int(max(low, 1)), int(min(high, 1000))))
    else:
        value = data.draw(st.floats(low, high, allow_nan=False, allow_infinity=False))
    # In float64, since a slot that starts at the largest float32 rounded up overflows, as in torch.
    optimizer = case.rule(case.parameters(torch.float64), **{field.name: value})
    assert optimizer.param_groups[0][field.name] == value
    assert optimizer.defaults[field.name] == value


@given(data=st.data())
@hyper_parameters(lambda field: is_number(field) and field.type == "float", CLOSURELESS)
def test_every_moderate_number_in_range_can_be_stepped_with(case: Case, field: Any, data: Any) -> None:
    """No division by zero, no complex number, no overflow on the way to the step."""
    low, high = bounds(field)
    moderate = st.floats(max(low, -100.0), min(high, 100.0)).filter(lambda x: x == 0 or abs(x) > 1e-6)
    value = data.draw(moderate)
    optimizer = case.make(**{field.name: value})
    case.advance(optimizer, 2)


@hyper_parameters(is_tuple)
def test_pairs_out_of_range_are_refused(case: Case, field: Any) -> None:
    default = field.default
    for place in range(len(default)):
        for value in [*outside(field), *NO_NUMBERS]:
            if isinstance(value, torch.Tensor):
                continue
            changed = [*default[:place], value, *default[place + 1 :]]
            refused(case, field.name, tuple(changed))
    for value in (0.5, "0.9", default[:-1], (*default, 0.5), None, {0.5, 0.6}):
        refused(case, field.name, value)


@given(data=st.data())
@hyper_parameters(lambda field: is_tuple(field) and field.name not in IN_ORDER)
def test_every_pair_in_range_is_taken(case: Case, field: Any, data: Any) -> None:
    low, high = bounds(field)
    entries = st.floats(low, high, allow_nan=False, allow_infinity=False)
    values = [data.draw(entries) for _ in field.default]
    optimizer = case.rule(case.parameters(), **{field.name: values})
    assert optimizer.param_groups[0][field.name] == tuple(values)
    assert isinstance(optimizer.param_groups[0][field.name], tuple)


@pytest.mark.parametrize("value", [(1.2, 0.5), (0.0, 1.2), (0.5, 1.0), (1.0, 1.2)])
def test_etas_of_rprop_are_on_either_side_of_one(value: Any) -> None:
    refused(Case(steprule.Rprop), "etas", value)


def test_step_sizes_of_rprop_come_smallest_first() -> None:
    refused(Case(steprule.Rprop), "step_sizes", (1.0, 0.1))


@hyper_parameters(lambda field: isinstance(field.default, bool))
def test_switches_are_true_or_false(case: Case, field: Any) -> None:
    if field.name not in case.make().param_groups[0]:
        pytest.skip("torch's rule has no such key in its groups")
    for value in ("True", "yes", "", 2, 0.5, [], np.ones(2), torch.ones(2)):
        refused(case, field.name, value)


@hyper_parameters(lambda field: field.type in ("bool", "bool | None"))
def test_switches_may_be_given_as_torch_takes_them(case: Case, field: Any) -> None:
    """As 0, 1, None or numpy's booleans; groups and checkpoints then hold plain ones."""
    if field.name not in case.make().param_groups[0]:
        pytest.skip("torch's rule has no such key in its groups")
    for off in (0, 0.0, np.False_, torch.tensor(False), None):
        (group,) = case.rule(case.parameters(), **{field.name: off}).param_groups
        assert group.get(field.name) is (None if off is None and field.default is None else False)
    # These need more than the switch, and a tape ends at a sum over all parameters and at whole matrices.
    tapeless = case.shares or getattr(case.rule, "on_matrices", False)
    if field.name not in ("capturable", "fused", "nesterov", *["differentiable"] * tapeless):
        for on in (1, 1.0, np.True_, torch.tensor(True)):
            dtype = torch.float64
            (group,) = case.rule(case.parameters(dtype), **{field.name: on}).param_groups
            assert group[field.name] is True


@hyper_parameters(is_number)
def test_infinity_is_called_not_finite(case: Case, field: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field.name} = inf, must be .*(finite|below|at most)"):
        case.rule(case.parameters(), **{field.name: INFINITY})


@hyper_parameters(lambda field: field.choices is not None)
def test_choices_are_listed(case: Case, field: Any) -> None:
    refused(case, field.name, "no such choice")
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        case.rule(case.parameters(), **{field.name: "no such choice"})
    assert all(repr(choice) in str(caught.value) for choice in field.choices)


NUMBERS_OF_OTHERS = [np.float32(0.5), np.float64(0.5), np.asarray(0.5)]


@each(plain)
@pytest.mark.parametrize("value", NUMBERS_OF_OTHERS, ids=lambda value: str(type(value).__name__))
def test_numpy_numbers_become_plain_ones(case: Case, value: Any) -> None:
    """Otherwise a checkpoint could not be read with weights_only=True."""
    optimizer = case.make(lr=value)
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert optimizer.param_groups[0]["lr"] == 0.5


@given(data=st.data())
@each(lambda case: plain(case) and case.torch_class is not None)
def test_what_torch_refuses_we_refuse(case: Case, data: Any) -> None:
    """Any number in any place: no rule is more careless than torch's, and the exception has its type."""
    field = data.draw(st.sampled_from([f for f in case.rule.fields.values() if is_number(f)]))
    assume(field.name in case.torch_class(case.parameters()).defaults)
    value = data.draw(st.sampled_from([-1.0, -1e-30, 0.0, 0.5, 1.0, 2.0]) | st.floats(-3, 3))
    try:
        case.torch_class(case.parameters(), **{field.name: value})
    except (ValueError, TypeError) as error:
        with pytest.raises(type(error)):
            case.rule(case.parameters(), **{field.name: value})


# Names


@hyper_parameters(lambda field: True)
def test_a_misspelt_name_gets_the_nearest_right_one(case: Case, field: Any) -> None:
    misspelt = field.name + field.name[-1]
    message = rf"^{case.name} has no hyper-parameter '{misspelt}'"
    hint = rf".*Did you mean '{field.name}'\?"
    with pytest.raises(TypeError, match=message + hint):
        case.rule(case.parameters(), **{misspelt: field.default})
    if field.name not in case.make().param_groups[0]:
        return
    group = {"params": case.parameters(), misspelt: field.default}
    with pytest.raises(ValueError, match=message + r" \(parameter group 0\)" + hint):
        case.rule([group])
    if case.many_groups:
        optimizer = case.make([weight()])
        with pytest.raises(ValueError, match=message + r" \(parameter group 1\)" + hint):
            optimizer.add_param_group(group)


@each(plain)
def test_a_name_like_no_other_gets_the_list(case: Case) -> None:
    with pytest.raises(TypeError, match=r"'qqq'\. Allowed are: .*\blr\b"):
        case.rule(case.parameters(), qqq=1)


@each(plain)
def test_the_same_argument_twice(case: Case) -> None:
    with pytest.raises(TypeError, match="lr"):
        case.rule(case.parameters(), 0.1, lr=0.1)


@each(plain)
def test_no_parameters_at_all(case: Case) -> None:
    with pytest.raises(TypeError, match="params"):
        case.rule()


# Messages, word by word


def test_a_message_names_who_what_the_range_and_the_group() -> None:
    groups = [{"params": [weight()]}, {"params": [weight()]}, {"params": [weight()], "betas": (0.9, 1.5)}]
    with pytest.raises(ValueError, match="betas") as caught:
        steprule.Adamax(groups)
    wanted = "Adamax: betas[1] = 1.5, must be at least 0 and below 1 (parameter group 2)."
    assert str(caught.value) == wanted


def test_a_misspelt_weight_decay() -> None:
    with pytest.raises(TypeError) as caught:
        steprule.Adam([weight()], weigth_decay=0.1)
    wanted = "Adam has no hyper-parameter 'weigth_decay'. Did you mean 'weight_decay'?"
    assert str(caught.value) == wanted


def test_a_sparse_gradient_names_its_parameter() -> None:
    embed = nn.Embedding(4, 2, sparse=True)
    optimizer = steprule.Adamax(nn.ModuleDict({"embed": embed}))
    embed(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "Adamax needs dense gradients, got a sparse one for 'embed.weight'. Use SparseAdam for that "
        "parameter, or Embedding(sparse=False)."
    )


@pytest.mark.parametrize("misuse", [{"absolute": True, "weight_decouple": False}, {"weight_decay": -0.1}])
def test_weight_decay_checks_itself(misuse: Any) -> None:
    with pytest.raises(ValueError, match=r"^WeightDecay: "):
        steprule.WeightDecay(**misuse)


def test_an_unknown_decay_mode_in_a_group() -> None:
    with pytest.raises(ValueError, match="weight_decay_mode = 'l3', must be one of l2, decoupled"):
        steprule.Adam([{"params": [weight()], "weight_decay_mode": "l3"}])


@each(lambda case: plain(case) and case.knows("foreach", "fused"))
def test_two_runners_at_once(case: Case) -> None:
    with pytest.raises(RuntimeError, match=rf"^{case.name}.*fused.*foreach"):
        case.rule(case.parameters(), fused=True, foreach=True)


def test_nesterov_without_momentum() -> None:
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum and zero dampening"):
        steprule.SGD([weight()], nesterov=True)


def test_lbfgs_without_a_closure() -> None:
    with pytest.raises(TypeError, match="closure"):
        steprule.LBFGS([weight()]).step()


def test_sophia_says_when_the_curvature_was_never_estimated() -> None:
    param = weight()
    optimizer = steprule.Sophia([("w", param)])
    param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match=r"update_hessian was never called for 'w'"):
        optimizer.step()
    optimizer.step()
    quiet = steprule.Sophia([nn.Parameter(torch.ones(0, 2)), param])
    quiet.param_groups[0]["params"][0].grad = torch.ones(0, 2)
    quiet.update_hessian(4)
    quiet.step()


@each(lambda case: case.name not in ACCEPT_SPARSE and not case.closure)
def test_no_parameter_moves_when_the_last_one_is_refused(case: Case) -> None:
    """Half a step would be worse than none."""
    optimizer = case.make()
    case.advance(optimizer)
    before = [p.detach().clone() for p in flat(optimizer)]
    give_gradients(case, optimizer, 1)
    last = next(p for p in reversed(flat(optimizer)) if p.dim())
    last.grad = sparse_rows(last.grad)
    with pytest.raises(RuntimeError, match=r"sparse one for parameter \d"):
        optimizer.step()
    assert_same([p.detach() for p in flat(optimizer)], before)
