"""Options of every rule: decay, maximize, tensor lr, a tape, sparse gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rules import (
    ACCEPT_SPARSE,
    LOOPS,
    Case,
    assert_same,
    assert_same_run,
    each,
    flat,
    give_gradients,
    numbers,
    plain,
    snapshot,
    sparse_rows,
    uses_curvature,
)
from torch import Tensor, nn

import steprule
from steprule import WeightDecay

CLOSURELESS = [case for case in LOOPS if not case.closure]


@each(lambda case: case.knows("maximize") and not case.closure)
def test_maximize_descends_on_the_negative_gradient(case: Case) -> None:
    climbing, descending = case.make(maximize=True), case.make()
    for number in range(3):
        give_gradients(case, climbing, number)
        give_gradients(case, descending, number)
        # The curvature is that of the loss, whatever becomes of the gradient.
        case.prepare(climbing)
        case.prepare(descending)
        for param in flat(descending):
            param.grad = -param.grad
        climbing.step()
        descending.step()
    assert_same_run(climbing, descending)


# Weight decay


def shrunk_by_hand(case: Case, decay: WeightDecay, steps: int) -> Any:
    """The rule without decay, and the decay done by the caller before every step."""
    optimizer = case.make(weight_decay=0.0)
    lr, strength = optimizer.param_groups[0]["lr"], decay.weight_decay
    for number in range(steps):
        give_gradients(case, optimizer, number)
        with torch.no_grad():
            for param in flat(optimizer):
                if decay.mode == "l2":
                    param.grad = param.grad.add(param, alpha=strength)
                else:
                    param.mul_(1 - (strength if decay.absolute else lr * strength))
        optimizer.step()
    return optimizer


DECAYS = [
    WeightDecay(0.25),
    WeightDecay(0.25, weight_decouple=False),
    WeightDecay(0.25, absolute=True),
]
DECAYED = [case for case in CLOSURELESS if plain(case) and case.knows("weight_decay")]
# Why the others must not shrink the parameter: tests further down.
IN_ANY_MODE = [case for case in DECAYED if case.rule.fields["weight_decay"].not_decoupled is None]


# Adafactor measures the parameter before its decay, the curvature is made of the plain gradient. What remembers
# the start sees it after the first decay that is done by hand.
@each(
    lambda case: not (case.name == "Adafactor" or uses_curvature(case.rule) or case.returns), among=IN_ANY_MODE
)
@pytest.mark.parametrize("decay", DECAYS, ids=lambda decay: decay.mode)
def test_weight_decay_in_each_mode(case: Case, decay: WeightDecay) -> None:
    optimizer = case.make(weight_decay=decay)
    case.advance(optimizer, 3)
    wanted = shrunk_by_hand(case, decay, 3)
    for param, by_hand in zip(flat(optimizer), flat(wanted), strict=True):
        torch.testing.assert_close(param, by_hand)
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0.25
    assert group["weight_decay_mode"] == decay.mode


@each(among=IN_ANY_MODE)
@pytest.mark.parametrize("decay", DECAYS, ids=lambda decay: decay.mode)
def test_the_decay_mode_is_saved_in_the_group(case: Case, decay: WeightDecay) -> None:
    optimizer, loaded = case.make(weight_decay=decay), case.make()
    case.advance(optimizer, 2)
    case.advance(loaded, 2)
    with torch.no_grad():
        for param, twin in zip(flat(optimizer), flat(loaded), strict=True):
            twin.copy_(param)
    loaded.load_state_dict(optimizer.state_dict())
    case.advance(optimizer, 2, first=2)
    case.advance(loaded, 2, first=2)
    assert_same_run(loaded, optimizer)


@each(among=DECAYED)
def test_a_number_decays_as_the_rule_says_and_zero_does_nothing(case: Case) -> None:
    # In LAMB, a tensor of one element moves by lr·|θ|, whatever λ is. In MARS, vectors have a λ of their own.
    least = {"LAMB": 1, "MARS": 2}.get(case.name, 0)
    shapes = tuple(shape for shape in case.shapes if len(shape) >= least)
    number, absent, nothing = (
        case.make(case.parameters(shapes=shapes), weight_decay=decay)
        for decay in (0.25, 0.0, WeightDecay(0.0, absolute=True))
    )
    for optimizer in (number, absent, nothing):
        case.advance(optimizer, 3)
    assert_same_run(nothing, absent)
    moved = [not torch.equal(p, q) for p, q in zip(flat(number), flat(absent), strict=True)]
    assert all(moved)


@each(lambda case: case.many_groups and not case.shares, among=IN_ANY_MODE)
def test_every_group_has_its_own_decay(case: Case) -> None:
    first, *rest = case.parameters()
    groups = [{"params": [first], "weight_decay": WeightDecay(0.5, absolute=True)}, {"params": rest}]
    optimizer, wanted = case.make(groups), case.make()
    case.advance(optimizer, 2)
    case.advance(wanted, 2)
    assert not torch.equal(first, flat(wanted)[0])
    assert_same([p.detach() for p in rest], [p.detach() for p in flat(wanted)[1:]])


NOT_BESIDE_THE_STEP = {
    **dict.fromkeys(["DoG", "LDoG", "DoWG"], "would count as distance from the start"),
    **dict.fromkeys(["Prodigy", "DAdaptAdam"], "lr is 1 and not the step size"),
    **dict.fromkeys(["ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam"], "shrink y and not z"),
}


@pytest.mark.parametrize("mode", ["decoupled", "absolute", "independent", "corrected", "cautious"])
@pytest.mark.parametrize("name", NOT_BESIDE_THE_STEP)
def test_decay_that_makes_no_sense_beside_a_step_is_refused(name: str, mode: str) -> None:
    rule, decay = steprule.catalogue()[name], WeightDecay(0.1, mode=mode)
    with pytest.raises(ValueError, match=f"{name} .* '{mode}': .*{NOT_BESIDE_THE_STEP[name]}.* a number"):
        rule([torch.ones(3)], weight_decay=decay)
    optimizer = rule([torch.ones(3, requires_grad=True)], weight_decay=WeightDecay(0.0, mode=mode))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=NOT_BESIDE_THE_STEP[name]):
        optimizer.step()
    rule([torch.ones(3)], weight_decay=WeightDecay(0.1, weight_decouple=False))


@pytest.mark.parametrize("name", NOT_BESIDE_THE_STEP)
def test_a_pull_to_the_start_beside_such_a_step_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"ToStart does not go with {name}"):
        steprule.catalogue()[name]([torch.ones(3)], modifiers=[steprule.ToStart()])


# A tensor as lr


def as_with_a_number(given: Any, wanted: Any) -> None:
    """The same run, up to the rounding that a single-precision lr brings into the scalars."""
    for param, other in zip(flat(given), flat(wanted), strict=True):
        torch.testing.assert_close(param, other)


@each(among=LOOPS)
def test_a_tensor_lr_is_used_and_never_replaced(case: Case) -> None:
    lr = torch.tensor(0.125)
    optimizer, twin = case.make(lr=lr), case.make(lr=0.125)
    assert optimizer.param_groups[0]["lr"] is lr
    case.advance(optimizer, 2)
    case.advance(twin, 2)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.125
    as_with_a_number(optimizer, twin)


@each(lambda case: case.torch_class is not None, among=LOOPS)
def test_a_tensor_lr_rounds_as_torchs(case: Case) -> None:
    if case.name == "Muon":
        pytest.skip("torch's Muon takes no tensor")
    ours, theirs = case.make(lr=torch.tensor(0.1)), case.make_torch(lr=torch.tensor(0.1))
    case.advance(ours, 3)
    case.advance(theirs, 3)
    assert_same([p.detach() for p in flat(ours)], [p.detach() for p in flat(theirs)])


@each(among=LOOPS)
def test_a_schedule_changes_a_tensor_lr_in_place(case: Case) -> None:
    lr = torch.tensor(0.5)
    optimizer, twin = case.make(lr=lr), case.make(lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for number in range(3):
        twin.param_groups[0]["lr"] = 0.5 * 0.5**number
        case.advance(optimizer, 1, first=number)
        case.advance(twin, 1, first=number)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.0625
    as_with_a_number(optimizer, twin)


@each(lambda case: plain(case) and case.knows("betas"))
def test_betas_may_be_tensors(case: Case) -> None:
    plain_betas = (0.75, 0.875, 0.9375)[: len(case.rule.fields["betas"].default)]
    betas = tuple(map(torch.tensor, plain_betas))
    optimizer, twin = case.make(betas=betas), case.make(betas=plain_betas)
    case.advance(optimizer, 3)
    case.advance(twin, 3)
    assert optimizer.param_groups[0]["betas"][0] is betas[0]
    given, wanted = ([p.detach() for p in flat(x)] for x in (optimizer, twin))
    if case.name in ("AdaHessian", "StableAdamW"):  # quotients with betas are rounded to their single precision
        torch.testing.assert_close(given, wanted)
    else:
        assert_same(given, wanted)


# The step on autograd's tape


def two_steps(case: Case, lr: Any, gradients: list[Tensor], tape: bool) -> Tensor:
    start = numbers((3, 2), torch.float64, seed=1)
    param = start.clone().requires_grad_()
    if tape:
        param = param.clone()
        param.retain_grad()
    optimizer = case.make([param], lr=lr, differentiable=tape)
    for gradient in gradients:
        param.grad = gradient
        case.step(optimizer)
    total = (param**2).sum()
    return total if tape else total.detach()


TAPED = [case for case in CLOSURELESS if case.knows("differentiable") and case.elementwise]
TAPED = [case for case in TAPED if not case.sparse_only]


@each(lambda case: not case.closure and case.rule.on_matrices, among=LOOPS)
def test_a_rule_on_matrices_leaves_no_tape_and_says_so(case: Case) -> None:
    with pytest.raises((ValueError, RuntimeError), match=rf"^{case.name}: differentiable=True"):
        case.make(differentiable=True)


@each(among=TAPED)
def test_differentiable_gives_the_slope_of_the_loss_over_lr(case: Case) -> None:
    gradients = [numbers((3, 2), torch.float64, seed=10 + n) for n in range(3)]
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    loss = two_steps(case, lr, gradients, tape=True)
    (slope,) = torch.autograd.grad(loss, lr)
    h = 1e-6
    above = two_steps(case, 0.01 + h, gradients, tape=False)
    below = two_steps(case, 0.01 - h, gradients, tape=False)
    # ASGD keeps η in single precision, which shows in a difference quotient with so small an h.
    tolerance = 1e-3 if case.name == "ASGD" else 1e-4
    assert slope.item() == pytest.approx((above - below).item() / (2 * h), rel=tolerance)


@each(among=TAPED)
def test_differentiable_gives_the_slope_of_the_loss_over_the_gradients(case: Case) -> None:
    gradients = [numbers((3, 2), torch.float64, seed=10 + n) for n in range(3)]
    taped = [gradient.clone().requires_grad_() for gradient in gradients]
    loss = two_steps(case, 0.01, [taped[0], taped[1] * 1, taped[2]], tape=True)
    slopes = torch.autograd.grad(loss, taped, allow_unused=True)
    for place, slope in enumerate(slopes):
        h = 1e-6
        moved = []
        for side in (h, -h):
            changed = [g.clone() for g in gradients]
            changed[place][1, 1] += side
            moved.append(two_steps(case, 0.01, changed, tape=False).item())
        wanted = (moved[0] - moved[1]) / (2 * h)
        given = 0.0 if slope is None else slope[1, 1].item()
        assert given == pytest.approx(wanted, rel=1e-4, abs=1e-7), place


@each(among=TAPED)
def test_the_taped_step_has_the_same_numbers(case: Case) -> None:
    gradients = [numbers((3, 2), torch.float64, seed=10 + n) for n in range(3)]
    assert_same(
        two_steps(case, 0.01, gradients, tape=True).detach(),
        two_steps(case, 0.01, gradients, tape=False).detach(),
    )


# Sparse gradients


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's Adagrad makes sparse tensors
@each(lambda case: case.name in ACCEPT_SPARSE and "weight_decay" not in case.options)
@pytest.mark.parametrize("in_parts", [False, True])
def test_sparse_gradients_work_as_torchs(case: Case, in_parts: bool) -> None:
    """To the last bit, although torch's SGD adds a row that comes in parts one part at a time."""
    shapes = ((6, 3), (5, 2))
    optimizer, wanted = (
        case.make(case.parameters(shapes=shapes)),
        case.make_torch(case.parameters(shapes=shapes)),
    )
    for number in range(3):
        for place in range(len(shapes)):
            gradient = sparse_rows(numbers(shapes[place], torch.float32, 10 * number + place))
            gradient = gradient if in_parts else gradient.coalesce()
            flat(optimizer)[place].grad = gradient.clone()
            flat(wanted)[place].grad = gradient.clone()
        optimizer.step()
        wanted.step()
    for param, other in zip(flat(optimizer), flat(wanted), strict=True):
        if in_parts:
            torch.testing.assert_close(param, other)
        else:
            assert_same(param.detach(), other.detach())


@each(lambda case: case.name in ACCEPT_SPARSE and plain(case))
def test_rows_without_a_gradient_rest(case: Case) -> None:
    optimizer = case.make(case.parameters(shapes=((6, 3),)), lr=0.1)
    before = flat(optimizer)[0].detach().clone()
    flat(optimizer)[0].grad = sparse_rows(numbers((6, 3), torch.float32, 1))
    optimizer.step()
    assert_same(flat(optimizer)[0].detach()[0], before[0])
    assert not torch.equal(flat(optimizer)[0][1:], before[1:])


@each(lambda case: case.name not in ACCEPT_SPARSE and not case.closure)
@pytest.mark.parametrize("named", [True, False])
def test_other_rules_refuse_a_sparse_gradient_by_name(case: Case, named: bool) -> None:
    param = case.parameters(shapes=((6, 3),))[0]
    optimizer = case.make([("embed.weight", param)] if named else [param])
    param.grad = sparse_rows(numbers((6, 3), torch.float32, 1))
    kept = snapshot(optimizer)
    place = "'embed.weight'" if named else "parameter 0"
    message = rf"^{case.name} needs dense gradients, got a sparse one for {place}\. Use .*sparse=False"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), kept)


@each(lambda case: case.sparse_only)
def test_a_rule_on_rows_refuses_a_dense_gradient_by_name(case: Case) -> None:
    param = case.parameters()[0]
    optimizer = case.make([("embed.weight", param)])
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=rf"^{case.name} needs sparse.*'embed.weight'.*sparse=True"):
        optimizer.step()


@pytest.mark.parametrize("rule", [steprule.SGD, steprule.Adagrad])
def test_decay_does_not_go_with_sparse_gradients(rule: Any) -> None:
    param = nn.Parameter(torch.ones(4, 2))
    optimizer = rule([("embed.weight", param)], weight_decay=0.1)
    param.grad = sparse_rows(torch.ones(4, 2))
    with pytest.raises(RuntimeError, match=r"weight_decay.*sparse.*'embed.weight'.*weight_decay=0"):
        optimizer.step()
