"""torch's contract and the library's promises, for every rule: what a step does, and what it leaves alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rules import (
    CASES,
    REFUSE_COMPLEX,
    Case,
    assert_equal,
    assert_same,
    assert_same_run,
    by_kind,
    each,
    flat,
    give_gradients,
    loss_with_gradients,
    numbers,
    plain,
    sparse_rows,
)
from torch import Tensor, nn

CLOSURELESS = [case for case in CASES if not case.closure]

# Updates that round away in 16 bits do not matter in these tests.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")


def a_step_away(case: Case) -> Any:
    """An optimizer in the middle of training."""
    optimizer = case.make()
    case.advance(optimizer, 2)
    return optimizer


# The constructor


@each(plain)
def test_it_is_a_torch_optimizer(case: Case) -> None:
    assert isinstance(case.make(), torch.optim.Optimizer)


@each(plain)
def test_signature_names_types_and_defaults(case: Case) -> None:
    signature = inspect.signature(case.rule)
    first, *rest = signature.parameters.values()
    assert first.name == "params"
    for parameter in rest:
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        assert parameter.default is not parameter.empty, parameter.name
        assert parameter.annotation is not parameter.empty, parameter.name
    assert "lr" in signature.parameters


@each(lambda case: plain(case) and case.torch_class is not None)
def test_signature_begins_as_torchs(case: Case) -> None:
    ours = inspect.signature(case.rule).parameters
    theirs = inspect.signature(case.torch_class).parameters
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    order = [p.name for p in theirs.values() if p.kind is by_position]
    assert [p.name for p in ours.values() if p.kind is by_position][: len(order)] == order
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name


@each(plain)
def test_arguments_by_position(case: Case) -> None:
    by_position = [
        parameter.name
        for parameter in list(inspect.signature(case.rule).parameters.values())[1:]
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    defaults = [inspect.signature(case.rule).parameters[name].default for name in by_position]
    optimizer = case.rule(case.parameters(), *defaults)
    assert optimizer.param_groups[0]["lr"] == case.make().param_groups[0]["lr"]
    assert case.rule(case.parameters(), 0.125).param_groups[0]["lr"] == 0.125


@each(lambda case: plain(case) and case.torch_class is not None)
def test_group_keys_are_torchs(case: Case) -> None:
    ours, theirs = case.rule(case.parameters()), case.torch_class(case.parameters())
    extra = {
        name
        for name in inspect.signature(case.rule).parameters
        if name not in inspect.signature(case.torch_class).parameters
    }
    assert set(theirs.param_groups[0]) <= set(ours.param_groups[0])
    assert set(ours.param_groups[0]) - set(theirs.param_groups[0]) <= extra
    for key, value in theirs.defaults.items():
        assert ours.defaults[key] == value, key
        assert ours.param_groups[0][key] == value, key


# Closures and hooks


@each()
@pytest.mark.parametrize("keyword", [False, True])
def test_closure_runs_with_gradients_and_its_value_is_returned(case: Case, keyword: bool) -> None:
    optimizer, twin = case.make(), case.make()
    saw: list[bool] = []

    def closure() -> Tensor:
        saw.append(torch.is_grad_enabled())
        if case.closure:
            return loss_with_gradients(optimizer)
        give_gradients(case, optimizer, 0)
        case.prepare(optimizer)
        return torch.tensor(4.5)

    with torch.no_grad():
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert all(saw)
    assert saw
    if case.closure:
        assert float(loss.detach()) == pytest.approx(float(loss_with_gradients(case.make()).detach()))
        return
    assert float(loss) == 4.5
    give_gradients(case, twin, 0)
    case.prepare(twin)
    assert twin.step() is None
    assert_same_run(optimizer, twin)


@each(plain)
def test_step_hooks_run_around_the_step(case: Case) -> None:
    optimizer = case.make()
    order: list[str] = []

    def before(self: Any, args: Any, kwargs: Any) -> None:
        assert self is optimizer
        order.append("before")

    optimizer.register_step_pre_hook(before)
    handle = optimizer.register_step_post_hook(lambda *_: order.append("after"))
    case.advance(optimizer)
    assert order == ["before", "after"]
    handle.remove()
    case.advance(optimizer)
    assert order == ["before", "after", "before"]


@each(plain)
def test_a_pre_hook_may_change_the_arguments(case: Case) -> None:
    optimizer = case.make()

    def closure() -> Tensor:
        return loss_with_gradients(optimizer) if case.closure else torch.tensor(7.0)

    def unused() -> Tensor:
        raise AssertionError("the hook replaced this closure")

    optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, closure), {}))
    assert optimizer.step(unused) is not None


@each(plain)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(case: Case, set_to_none: bool) -> None:
    optimizer = case.make()
    give_gradients(case, optimizer, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in flat(optimizer):
        assert (param.grad is None) == set_to_none
        if not set_to_none:
            gradient = param.grad.to_dense() if param.grad.is_sparse else param.grad
            assert not gradient.any()


# What a step leaves alone


@each()
def test_a_step_moves_every_parameter(case: Case) -> None:
    optimizer = case.make(lr=0.1)
    before = [p.detach().clone() for p in flat(optimizer)]
    case.advance(optimizer, 2)
    for place, (param, old) in enumerate(zip(flat(optimizer), before, strict=True)):
        assert torch.isfinite(param).all()
        assert not torch.equal(param, old), place


@each(among=CLOSURELESS)
def test_no_gradient_nothing_moves(case: Case) -> None:
    """No decay, no momentum, no step count. (L-BFGS has one direction for all parameters, as in torch.)"""
    optimizer = a_step_away(case)
    resting = [copy.deepcopy(optimizer.state[p]) for p in flat(optimizer)[1:]]
    values = [p.detach().clone() for p in flat(optimizer)[1:]]
    case.advance(optimizer, 2, first=2, without=range(1, len(flat(optimizer))))
    assert_same([p.detach() for p in flat(optimizer)[1:]], values)
    assert_same([optimizer.state[p] for p in flat(optimizer)[1:]], resting)


@each(lambda case: not case.starts_with_state, among=CLOSURELESS)
def test_a_parameter_that_never_had_a_gradient_has_no_state(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer, 1, without=[0])
    assert set(optimizer.state_dict()["state"]).isdisjoint({0})


@each(lambda case: not case.shares, among=CLOSURELESS)
def test_a_late_gradient_starts_its_own_count(case: Case) -> None:
    optimizer, alone = case.make(), case.make(case.parameters()[:1])
    case.advance(optimizer, 3, without=[0])
    case.advance(optimizer, 2, first=3)
    case.advance(alone, 2, first=3)
    assert_same(flat(optimizer)[0].detach(), flat(alone)[0].detach())
    assert_same(dict(optimizer.state[flat(optimizer)[0]]), dict(alone.state[flat(alone)[0]]))


@each()
def test_a_frozen_parameter_rests(case: Case) -> None:
    params = case.parameters()
    params[0].requires_grad_(False)
    before = params[0].clone()
    optimizer = case.make(params)
    case.advance(optimizer, 2)
    assert_same(params[0], before)
    if case.starts_with_state:
        assert optimizer.state[params[0]]["step"] == 0
    else:
        assert case.closure or not optimizer.state.get(params[0])


@each(among=CLOSURELESS)
@pytest.mark.parametrize("maximize", [False, True])
def test_the_gradient_is_read_only(case: Case, maximize: bool) -> None:
    if maximize and not case.knows("maximize"):
        pytest.skip("this rule has no maximize")
    optimizer = case.make(maximize=True) if maximize else case.make()
    for number in range(3):
        give_gradients(case, optimizer, number)
        gradients = [p.grad for p in flat(optimizer)]
        kept = [g.clone() for g in gradients]
        case.step(optimizer)
        for param, gradient, wanted in zip(flat(optimizer), gradients, kept, strict=True):
            assert param.grad is gradient
            dense = (gradient._values(), wanted._values()) if gradient.is_sparse else (gradient, wanted)
            assert_same(*dense)


@each()
def test_a_step_tells_autograd_that_it_wrote(case: Case) -> None:
    optimizer = case.make()
    versions = [p._version for p in flat(optimizer)]
    case.advance(optimizer)
    assert all(p._version > old for p, old in zip(flat(optimizer), versions, strict=True))


@each(among=CLOSURELESS)
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_dummy_step_changes_no_parameter(case: Case, lr: Any) -> None:
    """With lr 0 and zero gradients: that is how checkpoint tools make an optimizer create its state."""
    params = case.parameters()
    with torch.no_grad():
        params[0][0] = -0.0
        params[0][1] = 0.0
    optimizer = case.make(params)
    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = lr
    for param in params:
        zero = torch.zeros_like(param)
        param.grad = sparse_rows(zero) if case.sparse_only else zero
    case.step(optimizer)
    assert_same([p.detach() for p in params], before)


# Shapes, strides and dtypes


def run_beside(case: Case, params: list[Any], twins: list[Any], **more: Any) -> None:
    """The same gradients to both, and the same results from both."""
    optimizer, twin = case.make(params, **more), case.make(twins, **more)
    case.advance(optimizer, 3)
    case.advance(twin, 3)
    for param, wanted in zip(params, twins, strict=True):
        assert_equal(case, param.detach(), wanted.detach())


@each()
def test_a_strided_parameter_and_the_memory_around_it(case: Case) -> None:
    memory = numbers((9, 8), torch.float32, seed=1)
    kept = memory.clone()
    view = nn.Parameter(memory[1::2, ::3])
    assert not view.is_contiguous()
    assert view.data_ptr() != memory.data_ptr()
    run_beside(case, [view], [nn.Parameter(view.detach().clone(memory_format=torch.contiguous_format))])
    memory[1::2, ::3] = kept[1::2, ::3]
    assert_same(memory, kept)


@each()
def test_a_transposed_parameter(case: Case) -> None:
    wide = numbers((5, 4), torch.float32, seed=1)
    run_beside(case, [nn.Parameter(wide.t())], [nn.Parameter(wide.t().contiguous())])


@each(lambda case: case.any_shape)
def test_channels_last(case: Case) -> None:
    image = numbers((4, 3, 2, 5), torch.float32, seed=1)
    last = nn.Parameter(image.clone(memory_format=torch.channels_last))
    run_beside(case, [last], [nn.Parameter(image)])
    assert last.is_contiguous(memory_format=torch.channels_last)


@each(lambda case: case.any_shape and not case.sparse_only and not case.closure)
def test_a_gradient_with_other_strides(case: Case) -> None:
    params, twins = case.parameters(shapes=((4, 3, 2, 5),)), case.parameters(shapes=((4, 3, 2, 5),))
    optimizer, twin = case.make(params), case.make(twins)
    for number in range(3):
        gradient = numbers((4, 3, 2, 5), torch.float32, seed=number)
        twins[0].grad = gradient
        params[0].grad = gradient.clone(memory_format=torch.channels_last)
        case.step(optimizer)
        case.step(twin)
    assert_equal(case, params[0].detach(), twins[0].detach())


@each()
def test_an_empty_parameter_beside_others(case: Case) -> None:
    shape = case.shapes[0]
    params = [*case.parameters(shapes=((0, *shape[1:]), shape))]
    if case.sparse_only:
        params[0].requires_grad_(False)
    optimizer = case.make(params)
    case.advance(optimizer, 2)
    assert torch.isfinite(params[1]).all()
    assert params[0].shape == (0, *shape[1:])


@each(lambda case: case.any_shape and not case.sparse_only)
def test_a_parameter_of_one_number_without_dimensions(case: Case) -> None:
    params = case.parameters(shapes=((),))
    before = params[0].item()
    case.advance(case.make(params, lr=0.1), 3)  # ADOPT rests in the first, and two signs may cancel
    assert params[0].shape == ()
    assert params[0].item() != before


@given(
    shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    axes=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@each(lambda case: case.any_shape and not case.sparse_only and not case.options)
def test_strides_never_change_the_numbers(case: Case, shape: Any, axes: Any, dtype: torch.dtype) -> None:
    order = list(range(len(shape)))
    axes.shuffle(order)
    stored = numbers(tuple(shape[i] for i in order), dtype, seed=3)
    back = [order.index(i) for i in range(len(shape))]
    param = nn.Parameter(stored.permute(back))
    assert param.shape == shape
    run_beside(case, [param], [nn.Parameter(param.detach().contiguous().clone())])


@each(lambda case: case.name not in REFUSE_COMPLEX)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_pairs_of_real_ones(case: Case, dtype: torch.dtype) -> None:
    # The twin of a vector is a matrix.
    shapes = tuple(x for x in case.shapes if len(x) > 1) if by_kind(case.rule) else case.shapes
    params = case.parameters(dtype, shapes)
    twins = [nn.Parameter(torch.view_as_real(p.detach().clone())) for p in params]
    optimizer, twin = case.make(params), case.make(twins)
    if case.closure:
        # A closure reads the parameters, so it can only be given to one of the two at a time.
        case.advance(optimizer, 2)
        assert all(torch.isfinite(torch.view_as_real(p)).all() for p in params)
        return
    for number in range(3):
        give_gradients(case, optimizer, number)
        for param, real in zip(params, twins, strict=True):
            real.grad = torch.view_as_real(param.grad)
        case.step(optimizer)
        case.step(twin)
    assert_equal(case, [torch.view_as_real(p.detach()) for p in params], [p.detach() for p in twins])


@each(lambda case: plain(case) and case.name in REFUSE_COMPLEX)
def test_a_rule_without_a_complex_form_says_so(case: Case) -> None:
    with pytest.raises((ValueError, RuntimeError), match=rf"{case.name}.*complex.*parameter"):
        case.advance(case.make(case.parameters(torch.complex64)))


@each(among=CLOSURELESS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single_and_rounded_once(case: Case, dtype: torch.dtype) -> None:
    optimizer = case.make(case.parameters(dtype))
    optimizer.init_state()
    for number in range(3):
        give_gradients(case, optimizer, number)
        case.prepare(optimizer)
        twin = in_single_precision(case, optimizer)
        optimizer.step()
        twin.step()
        for param, wide in zip(flat(optimizer), flat(twin), strict=True):
            assert_same(param.detach(), wide.detach().to(dtype))
            for key, value in optimizer.state[param].items():
                if key != "step" and value.shape == param.shape and value.dtype is dtype:
                    assert_same(value, twin.state[wide][key].to(dtype), key)


def in_single_precision(case: Case, optimizer: Any) -> Any:
    """The same optimizer with all values in a wider dtype."""
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for key, value in state.items():
            state[key] = value.float() if isinstance(value, Tensor) and value.dim() else value
    twin = case.make([nn.Parameter(p.detach().float()) for p in flat(optimizer)])
    for param, wide in zip(flat(optimizer), flat(twin), strict=True):
        wide.grad = param.grad.float()
    twin.load_state_dict(saved)
    for param, wide in zip(flat(optimizer), flat(twin), strict=True):
        for key, value in optimizer.state[param].items():
            if isinstance(value, Tensor) and value.shape == param.shape and not value.dim():
                same = "step" in key or value.dtype not in (torch.bfloat16, torch.float16)
                twin.state[wide][key] = value.clone() if same else value.float()
    return twin


@each(among=CLOSURELESS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_of_another_dtype_is_kept_in_it(case: Case, dtype: torch.dtype) -> None:
    optimizer = case.make()
    optimizer.init_state()
    changed: list[tuple[Any, str]] = []
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == param.shape:
                state[key] = value.to(dtype)
                changed.append((param, key))
    case.advance(optimizer, 2)
    assert all(optimizer.state[param][key].dtype is dtype for param, key in changed)
    assert all(torch.isfinite(p).all() for p in flat(optimizer))
    loaded = case.make()
    loaded.load_state_dict(optimizer.state_dict())
    places = {param: place for place, param in enumerate(flat(optimizer))}
    for param, key in changed:
        assert loaded.state[flat(loaded)[places[param]]][key].dtype is dtype
