"""What torch's class accepts, the class of the same name accepts, and steps to the same numbers.

Every rule of torch with values of every kind for every argument: the runs are compared, state included.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from rules import LOOPS, Case, assert_same, flat, numbers, plain, snapshot
from torch import nn

import steprule

RULES = [case for case in LOOPS if plain(case) and case.torch_class is not None]
NAN = float("nan")


class ConfigList:
    """A list of a configuration library, which is neither a list nor a tuple."""

    def __init__(self, *values: Any):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: int) -> Any:
        return self.values[place]

    def __repr__(self) -> str:
        return f"ConfigList{self.values}"


def values_for(name: str, default: Any) -> list[Any]:
    """Values of every kind that people give."""
    if name == "lr":
        tensors = [torch.tensor(0.1), torch.tensor([0.1]), torch.ones(2)]
        return [0, 1, 0.1, -0.1, NAN, np.float64(0.1), None, *tensors]
    if isinstance(default, bool):
        return [True, False]
    if name in ("foreach", "fused"):
        return [None, True, False]
    if isinstance(default, tuple):
        some = [list(default), ConfigList(*default), default[:1], default[::-1], 0.5]
        if None not in default and len(default) == 2:
            mixed = (default[0], torch.tensor(default[1]))
            some += [np.array(default), (default[0], -1.0), (NAN, default[1]), mixed]
        return some
    if name == "adjust_lr_fn":
        return ["original", "match_rms_adamw", "spectral_unclamped", "largest"]
    if name == "line_search_fn":
        return ["strong_wolfe", "wolfe"]
    if isinstance(default, int) and name in ("max_iter", "history_size", "ns_steps"):
        return [1, 3, np.int64(2), "3"]
    if isinstance(default, (int, float)):
        return [0, 1, 0.5, -0.5, NAN, np.float32(0.25)]
    return [3, np.int64(3)]


def runs() -> list[Any]:
    found: list[Any] = []
    for case in RULES:
        theirs = inspect.signature(case.torch_class).parameters
        for name, parameter in list(theirs.items())[1:]:
            for value in values_for(name, parameter.default):
                for more in ({}, {"foreach": True}, {"fused": True}):
                    if set(more) <= set(theirs) - {name} and (not more or name in ("lr", "betas", "maximize")):
                        found.append((case, {name: value, **more}))
        switches = [name for name, x in theirs.items() if isinstance(x.default, bool) and name != "capturable"]
        for pair in itertools.combinations(switches, 2):
            found.append((case, dict.fromkeys(pair, True)))
    return found


# Where torch's constructor checks no range and ours does, so that a wrong sign is found before training.
UNCHECKED = {
    "ASGD": {"lambd"},
    "LBFGS": {"tolerance_grad", "tolerance_change"},
    "Muon": {"eps", "ns_steps"},
    "Rprop": {"step_sizes"},
}


def is_stricter_here(case: Case, options: dict[str, Any]) -> bool:
    """A number beyond the range of ours, and NaN, which torch's SGD takes for any of them."""
    name, value = next(iter(options.items()))
    entries = value if isinstance(value, tuple) else (value,)
    no_number = any(isinstance(x, float) and (math.isnan(x) or x < 0) for x in entries)
    unordered = isinstance(value, tuple) and value == case.rule.fields[name].default[::-1]
    return (name in UNCHECKED.get(case.name, ()) and (no_number or unordered)) or value is NAN


def outcome(case: Case, make: Any, options: dict[str, Any]) -> Any:
    """The optimizer after three steps, or the type of what went wrong."""
    try:
        optimizer = make(case.parameters(), **(case.settings | copy.deepcopy(options)))
        case.advance(optimizer, 3)
    except Exception as error:
        return type(error)
    return optimizer


def label(run: Any) -> str:
    return f"{run[0].name}-{run[1]}"


@pytest.mark.parametrize("run", [run for run in runs() if not is_stricter_here(*run)], ids=label)
def test_the_constructor_accepts_what_torchs_does(run: Any) -> None:
    case, options = run
    theirs, ours = (outcome(case, make, options) for make in (case.torch_class, case.rule))
    if isinstance(theirs, type):
        # Ours may do what torch does not, or report an error earlier and more clearly.
        assert ours in (theirs, ValueError, TypeError) or not isinstance(ours, type)
        return
    assert not isinstance(ours, type), f"torch takes {options}"
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    there, here = theirs.state_dict()["state"], ours.state_dict()["state"]
    for place, saved in there.items():
        torch.testing.assert_close(
            {k: here[place][k] for k in saved}, saved, rtol=1e-4, atol=1e-6, check_dtype=False
        )


# One by one


TENSOR_LR = [case for case in RULES if case.knows("foreach") and case.elementwise and not case.sparse_only]


@pytest.mark.parametrize("case", TENSOR_LR, ids=str)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_lists_of_tensors_take_a_tensor_lr_where_torchs_do(case: Case, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.1)
    if case.name in ("Adam", "AdamW"):
        with pytest.raises(
            ValueError, match="lr as a Tensor does not go with capturable=False and foreach=True"
        ):
            case.rule(case.parameters(), lr=lr, foreach=True)
        return
    ours = case.rule(case.parameters(), lr=lr, foreach=True)
    theirs = case.torch_class(case.parameters(), lr=lr.clone(), foreach=True)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(x, 0.5) for x in (ours, theirs)]
    assert "runner: foreach" in ours.explain()
    for number in range(4):
        case.advance(ours, first=number)
        case.advance(theirs, first=number)
        for schedule in schedules:
            schedule.step()
    assert ours.param_groups[0]["lr"] is lr
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_adafactor_takes_foreach_and_says_what_runs() -> None:
    case = Case(steprule.Adafactor)
    lists, loop = case.rule(case.parameters(), foreach=True), case.rule(case.parameters(), foreach=False)
    theirs = torch.optim.Adafactor(case.parameters(), foreach=True)
    for optimizer in (lists, loop, theirs):
        case.advance(optimizer, 4)
    assert_same([p.detach() for p in flat(lists)], [p.detach() for p in flat(loop)])
    for one, other in zip(flat(lists), flat(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert "runner: reference" in lists.explain()
    assert "not foreach: torch's lists of tensors have no rows and columns" in lists.explain()
    assert lists.state_dict()["param_groups"][0]["foreach"] is True


def test_a_switch_that_torchs_rule_does_not_have_is_a_runner_asked_for() -> None:
    optimizer = steprule.Muon([nn.Parameter(torch.ones(2, 2))], foreach=True)
    flat(optimizer)[0].grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="foreach=True is not available: Muon works on"):
        optimizer.step()
    for switch, runner in ((True, "cpu_kernel"), (False, "reference")):
        optimizer = steprule.Muon([nn.Parameter(torch.ones(2, 2))], fused=switch)
        assert f"runner: {runner}" in optimizer.explain()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"nesterov": True}], ids=str)
@pytest.mark.parametrize("coalesced", [True, False])
def test_sgd_goes_on_from_torchs_sparse_momentum(options: dict[str, Any], coalesced: bool) -> None:
    case = Case(steprule.SGD)
    weights = nn.Parameter(numbers((5, 3), torch.float32, 1))
    theirs = torch.optim.SGD([weights], lr=0.1, momentum=0.9, **options)
    ours = steprule.SGD([nn.Parameter(weights.detach().clone())], lr=0.1, momentum=0.9, **options)

    def step(optimizer: Any, number: int) -> None:
        rows = torch.tensor([[1, 3, 3]])
        gradient = torch.sparse_coo_tensor(rows, numbers((3, 3), torch.float32, number), (5, 3))
        flat(optimizer)[0].grad = gradient.coalesce() if coalesced else gradient
        optimizer.step()

    step(theirs, 1)
    step(theirs, 2)
    with torch.no_grad():
        flat(ours)[0].copy_(weights)
    report = ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert [str(change.saved) for change in report.converted] == ["torch.sparse_coo"]
    for number in (3, 4):
        step(theirs, number)
        step(ours, number)
    torch.testing.assert_close(flat(ours)[0], weights)
    assert case.name in str(report)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_muon_unclamped_scales_by_the_root_of_rows_over_columns(shape: tuple[int, int]) -> None:
    """With momentum and decay off, only the scale differs from the original's."""
    moved: list[torch.Tensor] = []
    for way in ("original", "spectral_unclamped"):
        param = nn.Parameter(torch.zeros(shape))
        optimizer = steprule.Muon([param], lr=1.0, weight_decay=0.0, adjust_lr_fn=way)
        param.grad = numbers(shape, torch.float32, 1)
        optimizer.step()
        moved.append(param.detach())
    rows, columns = shape
    torch.testing.assert_close(
        moved[1], moved[0] * math.sqrt(rows / columns) / math.sqrt(max(1, rows / columns))
    )


@pytest.mark.parametrize("swapped", [torch.ones(4), torch.ones(4, 2, 2), torch.ones(())])
def test_muon_names_a_parameter_that_is_no_matrix_any_more(swapped: torch.Tensor) -> None:
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = steprule.Muon([{"params": [("a", first)]}, {"params": [("b", second)]}])
    optimizer.param_groups[1]["params"] = [nn.Parameter(swapped)]
    for param in flat(optimizer):
        param.grad = torch.ones_like(param)
    message = rf"^Muon only supports 2D parameters, but 'b' has shape {re.escape(str(tuple(swapped.shape)))}"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(first.detach(), torch.ones(2, 2))


# Checkpoints of another rule


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("source", ["torch", "steprule"])
@pytest.mark.parametrize("writer", RULES, ids=str)
def test_a_checkpoint_of_another_rule_names_both_and_the_way(writer: Case, source: str, steps: int) -> None:
    shapes = ((4, 3), (2, 2))
    make = writer.torch_class if source == "torch" else writer.rule
    old = make(writer.parameters(shapes=shapes))
    writer.advance(old, steps)
    for reader in RULES:
        new = reader.make(reader.parameters(shapes=shapes))
        kept = snapshot(new)
        pair = {writer.name, reader.name}
        saved = copy.deepcopy(old.state_dict())
        if len(pair) == 1 or pair == {"Adam", "AdamW"}:
            new.load_state_dict(saved)
            continue
        if pair == {"Adamax", "SparseAdam"} and not steps:
            continue  # the same hyper-parameters except for a decay of zero
        message = rf"^{reader.name}\..*: this is a checkpoint of .*\b{writer.name}\b.*, not of {reader.name}"
        with pytest.raises(ValueError, match=message) as caught:
            new.load_state_dict(saved)
        assert f"to='{reader.name}'" in str(caught.value)
        assert_same(snapshot(new), kept)


def test_adam_and_adamw_load_each_other_as_in_torch() -> None:
    """The kind of decay is AdamW's own; Adam takes it from the checkpoint."""
    for module in (torch.optim, steprule):
        adam, adamw = (getattr(module, name)([nn.Parameter(torch.ones(2))]) for name in ("Adam", "AdamW"))
        ours = steprule.AdamW([nn.Parameter(torch.ones(2))])
        report = ours.load_state_dict(adam.state_dict())
        assert ours.param_groups[0]["decoupled_weight_decay"] is True
        assert ours.param_groups[0]["weight_decay"] == 0
        assert "decoupled_weight_decay (group 0)" in [change.what for change in report.hyperparameters]
        ours = steprule.Adam([nn.Parameter(torch.ones(2))])
        ours.load_state_dict(adamw.state_dict())
        assert ours.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("reader", ["Adam", "AdamW"])
@pytest.mark.parametrize("saved", [True, False])
def test_amsgrad_comes_from_the_checkpoint_as_in_torch(reader: str, saved: bool) -> None:
    ran: list[Any] = []
    case = Case(getattr(steprule, reader))
    donor = getattr(torch.optim, reader)(case.parameters(), amsgrad=saved, foreach=False)
    case.advance(donor, 2)
    for module in (torch.optim, steprule):
        optimizer = getattr(module, reader)(case.parameters(), amsgrad=not saved, foreach=False)
        report = optimizer.load_state_dict(copy.deepcopy(donor.state_dict()))
        case.advance(optimizer, 3, first=2)
        ran.append([[p.detach() for p in flat(optimizer)], dict(optimizer.state_dict()["state"])])
    assert_same(ran[1], ran[0])
    assert f"amsgrad (group 0)  {saved} in the checkpoint, {not saved} here: saved value taken" in str(report)


@pytest.mark.parametrize("saved", [True, False])
def test_the_class_amsgrad_goes_on_as_adamw_or_is_refused(saved: bool) -> None:
    """AdamW has all of its hyper-parameters, so it takes the same steps; Adam's decay is another one."""
    case = Case(steprule.AMSGrad, {"amsgrad": saved, "weight_decay": 0.1})
    donor = case.make()
    case.advance(donor, 2)
    checkpoint = copy.deepcopy(donor.state_dict())
    optimizer = steprule.AdamW([p.detach().clone().requires_grad_() for p in flat(donor)], foreach=False)
    report = optimizer.load_state_dict(checkpoint)
    assert {change.what for change in report.hyperparameters} >= {"eps (group 0)", "optimized_update (group 0)"}
    case.advance(donor, 3, first=2)
    case.advance(optimizer, 3, first=2)
    assert_same([p.detach() for p in flat(optimizer)], [p.detach() for p in flat(donor)])
    with pytest.raises(ValueError, match=r"^Adam\..*checkpoint of AMSGrad.*to='Adam'"):
        steprule.Adam(case.parameters()).load_state_dict(checkpoint)
    for theirs in (torch.optim.Adam, torch.optim.AdamW):
        with pytest.raises(ValueError, match=r"^AMSGrad\..*checkpoint of Adam.*to='AMSGrad'"):
            steprule.AMSGrad(case.parameters()).load_state_dict(
                theirs(case.parameters(), amsgrad=saved).state_dict()
            )


@pytest.mark.parametrize("case", RULES, ids=str)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_checkpoint_has_the_same_states_as_torchs(case: Case, steps: int) -> None:
    """torch's SGD without momentum has none, also after a step. Its Adagrad makes all when constructed."""
    theirs, ours = case.make_torch(), case.make()
    for optimizer in (theirs, ours):
        optimizer.param_groups[0]["params"][0].requires_grad_(False)
        case.advance(optimizer, steps, without=[1])
    there, here = (optimizer.state_dict()["state"] for optimizer in (theirs, ours))
    assert {place: set(state) for place, state in here.items()} == {
        place: set(state) for place, state in there.items()
    }


@pytest.mark.parametrize("case", RULES, ids=str)
@pytest.mark.parametrize("options", [{}, {"initial_accumulator_value": 0.5}], ids=["default", "options"])
def test_a_checkpoint_from_before_the_first_step_loads_both_ways(case: Case, options: dict[str, Any]) -> None:
    if not case.knows(*options):
        pytest.skip("it has no such option")
    wanted = case.make_torch(**options)
    case.advance(wanted, 2)
    for give, take in ((case.make, case.make_torch), (case.make_torch, case.make)):
        saved = copy.deepcopy(give(**options).state_dict())
        optimizer = take()
        optimizer.load_state_dict(saved)
        assert_same(optimizer.state_dict()["state"], saved["state"])
        case.advance(optimizer, 2)
        assert_same([p.detach() for p in flat(optimizer)], [p.detach() for p in flat(wanted)])


def test_the_state_that_the_constructor_makes_can_be_used_at_once() -> None:
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, dtype=torch.complex64))]
    made = [rule(params, initial_accumulator_value=0.5) for rule in (torch.optim.Adagrad, steprule.Adagrad)]
    assert_same(made[1].state_dict()["state"], made[0].state_dict()["state"])
    made[1].load_state_dict(made[0].state_dict())
    made[0].load_state_dict(made[1].state_dict())
    for optimizer in made:
        optimizer.share_memory()
        assert all(state["sum"].is_shared() for state in optimizer.state.values())
