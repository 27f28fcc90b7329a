"""Checkpoints of named parameters: matched by name, whatever their order, groups and number."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rules import LOOPS, Case, assert_same, each, flat, give_gradients, numbers, plain, snapshot
from torch import nn

import steprule
from steprule import AdamW

ADAMW = Case(AdamW)
NAMES = ("embed.weight", "norm.weight", "head.weight", "head.bias")


def named(case: Case, order: Any = None) -> list[tuple[str, nn.Parameter]]:
    """The case's parameters with names, in this order."""
    pairs = [(f"layer{i}.weight", p) for i, p in enumerate(case.parameters())]
    return [pairs[i] for i in (range(len(pairs)) if order is None else order)]


def step_by_name(case: Case, optimizer: Any, number: int) -> None:
    """One step, with the same gradient for the same name, wherever the parameter is."""
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            seed = 1000 * number + sum(map(ord, name))
            gradient = numbers(tuple(param.shape), param.dtype, seed)
            param.grad = gradient.to_sparse(1) if case.sparse_only else gradient
    case.step(optimizer)


def by_name(optimizer: Any) -> dict[str, Any]:
    """The state of every parameter."""
    return {
        name: dict(optimizer.state.get(param, {}))
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


def trained(groups: Any, steps: int = 3, **options: Any) -> Any:
    optimizer = AdamW(groups, **options)
    for number in range(steps):
        step_by_name(ADAMW, optimizer, number)
    return optimizer


def weights(*names: str) -> list[tuple[str, nn.Parameter]]:
    """Parameters with these names; the shape depends on the length of the name, so several share one."""
    return [
        (name, nn.Parameter(numbers((len(name) % 3 + 2, 2), torch.float32, sum(map(ord, name)))))
        for name in names
    ]


# Matching


@each(lambda case: case.many_groups and not case.shares)
def test_another_order_and_other_groups_continue_to_the_same_bits(case: Case) -> None:
    stay = case.make(named(case))
    for number in range(3):
        step_by_name(case, stay, number)
    order = list(reversed(range(len(case.shapes))))
    pairs = named(case, order)
    current = {f"layer{i}.weight": p for i, p in enumerate(flat(stay))}
    for name, param in pairs:
        param.data.copy_(current[name].detach())
    moved = case.make([{"params": pairs[:1]}, {"params": pairs[1:]}])
    report = moved.load_state_dict(stay.state_dict())
    assert report.matched_by == "name"
    assert not report.missing
    assert not report.unexpected
    assert_same(by_name(moved), by_name(stay))
    step_by_name(case, stay, 3)
    step_by_name(case, moved, 3)
    assert_same(by_name(moved), by_name(stay))
    for name, param in pairs:
        assert_same(param.detach(), current[name].detach(), name)


@given(data=st.data())
def test_every_reshuffle_takes_each_state_to_its_name(data: Any) -> None:
    pool = [f"{'x' * i}.weight" for i in range(1, 8)]
    divided = st.lists(st.lists(st.sampled_from(pool), max_size=4), min_size=1, max_size=4)
    before, after = (_partition(data.draw(divided)) for _ in range(2))
    source = trained([{"params": weights(*part)} for part in before])
    target = trained([{"params": weights(*part)} for part in after], steps=1)
    kept, saved = by_name(target), by_name(source)
    added, removed = set(kept) - set(saved), set(saved) - set(kept)
    assume(set(kept) & set(saved))
    if added or removed:
        lone = sorted(added or removed)[0]
        before_loading = snapshot(target)
        with pytest.raises(ValueError, match=f"'{lone}'"):
            target.load_state_dict(source.state_dict())
        assert_same(snapshot(target), before_loading)
    report = target.load_state_dict(source.state_dict(), strict=False)
    assert (set(report.missing), set(report.unexpected)) == (added, removed)
    assert set(report.matched) == set(kept) & set(saved)
    assert_same(by_name(target), {name: saved.get(name, kept[name]) for name in kept})
    again = AdamW([{"params": weights(*part)} for part in after])
    again.load_state_dict(target.state_dict())
    assert_same(by_name(again), by_name(target))


def _partition(parts: list[list[str]]) -> list[list[str]]:
    """Every name once; at least one."""
    seen: set[str] = set()
    unique: list[list[str]] = []
    for part in parts:
        own = [name for name in dict.fromkeys(part) if name not in seen]
        seen.update(own)
        unique += [own] if own else []
    return unique or [["x.weight"]]


def test_a_parameter_of_another_shape_is_named_or_left_alone() -> None:
    source = trained(weights(*NAMES))
    other = [(n, nn.Parameter(torch.zeros(9, 2)) if n == "head.bias" else p) for n, p in weights(*NAMES)]
    target = trained(other, steps=1)
    before = snapshot(target)
    with pytest.raises(ValueError, match=r"'head.bias' has shape \(2, 2\) in the checkpoint and \(9, 2\) here"):
        target.load_state_dict(source.state_dict())
    assert_same(snapshot(target), before)
    kept = by_name(target)["head.bias"]
    report = target.load_state_dict(source.state_dict(), strict=False)
    assert [(c.what, c.saved, c.current) for c in report.reshaped] == [("head.bias", (2, 2), (9, 2))]
    assert_same(by_name(target)["head.bias"], kept)
    assert_same(by_name(target)["embed.weight"], by_name(source)["embed.weight"])


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_prefix_before_every_name_does_not_count(prefixed: bool) -> None:
    """LightningModules call the network inside `net` or `model`."""
    source = trained([(f"net.{name}" if prefixed else name, p) for name, p in weights(*NAMES)])
    other = [(name if prefixed else f"net.{name}", p) for name, p in weights(*reversed(NAMES))]
    target = trained(other, steps=0)
    assert target.load_state_dict(source.state_dict()).matched_by == "name"
    assert_same([target.state[p] for p in flat(target)], [source.state[p] for p in reversed(flat(source))])


WRAPPED: dict[str, Callable[[str], str]] = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "FSDP of every layer": lambda name: f"_fsdp_wrapped_module.{name.replace('.', '._fsdp_wrapped_module.')}",
    "checkpointed layers": lambda name: name.replace(".", "._checkpoint_wrapped_module."),
    "Fabric": lambda name: f"_forward_module.{name}",
    "Opacus": lambda name: f"_module.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("wrapped_before", [True, False])
@pytest.mark.parametrize("case", [ADAMW, Case(steprule.LBFGS)], ids=str)
def test_names_are_matched_whatever_wraps_the_module(case: Case, wrapped_before: bool, wrapper: str) -> None:
    def wrap(pairs: Any, on: bool) -> Any:
        return [(WRAPPED[wrapper](name) if on else name, p) for name, p in pairs]

    source = case.make(wrap(weights(*NAMES), wrapped_before))
    case.advance(source)
    names = NAMES if case.closure else (*NAMES[2:], *NAMES[:2])
    target = case.make(wrap(weights(*names), not wrapped_before))
    report = target.load_state_dict(source.state_dict())
    assert report.matched_by == "name"
    assert report.matched == tuple(target.param_groups[0]["param_names"])
    states = [source.state[p] for p in flat(source)]
    order = [NAMES.index(name) for name in names]
    assert_same([target.state[p] for p in flat(target)], [states[i] for i in order])


@pytest.mark.parametrize("wrapped", ["real.torch.compile", "DataParallel", "checkpoint_wrapper"])
def test_real_wrappers_do_not_count(wrapped: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    # The compiler warns on import about its own deprecated code.
    warnings.simplefilter("ignore", DeprecationWarning)
    wraps: Any = {
        "real.torch.compile": torch.compile,
        "DataParallel": nn.DataParallel,
        "checkpoint_wrapper": lambda module: nn.Sequential(*(checkpoint_wrapper(x) for x in module)),
    }
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    source = AdamW(wraps[wrapped](module))
    give_gradients(ADAMW, source, 0)
    source.step()
    target = AdamW(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    report = target.load_state_dict(source.state_dict())
    assert (report.matched_by, report.renamed) == ("name", ())
    assert report.matched == ("0.weight", "0.bias", "1.weight", "1.bias")


def test_names_that_would_be_one_without_wrappers_keep_them() -> None:
    source = trained(weights("a.module.w", "a.w"))
    target = trained(weights("a.w", "a.module.w"), steps=0)
    assert target.load_state_dict(source.state_dict()).matched_by == "name"
    assert_same(by_name(target), by_name(source))
    assert AdamW(weights("module")).load_state_dict(AdamW(weights("module")).state_dict()).matched_by == "name"


@pytest.mark.parametrize("options", [{}, {"strict": False}])
def test_where_no_name_matches_the_places_decide_and_it_is_said(options: Any) -> None:
    source = trained([("a.0", p) for _, p in weights("x")] + [("a.1", p) for _, p in weights("yy")])
    target = trained([("b.0", p) for _, p in weights("x")] + [("b.1", p) for _, p in weights("yy")], steps=0)
    with pytest.warns(UserWarning, match=r"^AdamW.*no parameter name .*'a\.0'.*'b\.0'.*position") as caught:
        report = target.load_state_dict(source.state_dict(), **options)
    assert len(caught) == 1
    assert report.matched_by == "position"
    assert [(c.saved, c.current) for c in report.renamed] == [("a.0", "b.0"), ("a.1", "b.1")]
    assert "'a.1' in the checkpoint" in str(report)
    assert target.param_groups[0]["param_names"] == ["b.0", "b.1"]
    assert_same(list(by_name(target).values()), list(by_name(source).values()))


def test_one_name_that_matches_is_enough_for_names() -> None:
    source = trained(weights("a", "bb"))
    target = trained(weights("a", "cc"), steps=0)
    with pytest.raises(ValueError, match=r"lacks 'cc'.*lacks 'bb'"):
        target.load_state_dict(source.state_dict())


def test_many_missing_names_make_a_short_message() -> None:
    source = trained(weights("a.weight"))
    target = trained(weights("a.weight", *(f"{'b' * i}.bias" for i in range(1, 40))), steps=0)
    with pytest.raises(ValueError, match=r"lacks 'b.bias', .* and 34 more\. .*strict=False") as caught:
        target.load_state_dict(source.state_dict())
    assert len(str(caught.value)) < 400


# By position


@pytest.mark.parametrize("side", ["checkpoint", "optimizer", "both"])
def test_without_names_on_both_sides_the_place_decides_and_every_shape_must_agree(side: str) -> None:
    pairs = weights(*NAMES)
    bare = [p for _, p in pairs]
    source = trained(pairs)
    if side != "optimizer":
        for group in (saved := source.state_dict())["param_groups"]:
            del group["param_names"]
    else:
        saved = source.state_dict()
    target = AdamW(bare if side != "checkpoint" else pairs)
    report = target.load_state_dict(saved)
    assert report.matched_by == "position"
    assert_same([dict(target.state[p]) for p in bare], [dict(source.state[p]) for p in bare])
    swapped = AdamW([bare[2], bare[1], bare[0], bare[3]])
    with pytest.raises(ValueError, match=r"has shape \(\d, 2\).*\(\d, 2\)"):
        swapped.load_state_dict(saved)
    assert not swapped.state


def test_stored_shapes_betray_another_order_before_there_is_any_state() -> None:
    source = trained(weights("a", "bb"), steps=0)
    target = AdamW([p for _, p in weights("bb", "a")])
    message = r"parameter 0 has shape \(4, 2\), .* 'a' with shape \(3, 2\).*named_parameters"
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("there", "here"), [(["w", "w"], ["w", "w"]), (["w", "w"], ["w", "x"]), (["w", "x"], ["w", "w"])]
)
def test_names_that_stand_twice_cannot_be_matched_by(there: list[str], here: list[str]) -> None:
    params = [p for _, p in weights("a", "bb")]
    source = AdamW([{"params": [pair]} for pair in zip(there, params, strict=True)])
    step_by_name(ADAMW, source, 0)
    target = AdamW([{"params": [pair]} for pair in zip(here, params, strict=True)])
    assert target.load_state_dict(source.state_dict()).matched_by == "position"
    assert_same(target.state_dict()["state"], source.state_dict()["state"])


def test_lbfgs_has_one_history_for_all_in_their_order() -> None:
    case = Case(steprule.LBFGS)
    source, target = case.make(named(case)), case.make(named(case, [1, 0, 2, 3]))
    case.advance(source, 2)
    before = snapshot(target)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"one history for all parameters.*order"):
            target.load_state_dict(source.state_dict(), strict=strict)
    assert_same(snapshot(target), before)
    same = case.make(named(case))
    assert same.load_state_dict(source.state_dict()).matched_by == "name"


# torch


@each(lambda case: case.torch_class is not None, among=LOOPS)
def test_torch_loads_our_names_and_we_load_torchs(case: Case) -> None:
    """Two steps here, two in torch, two here: the same bits as six steps here."""
    stay = case.make(named(case))
    case.advance(stay, 6)
    params = named(case)
    first = case.make(params)
    case.advance(first, 2)
    second = case.make_torch(params)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    case.advance(second, 2, first=2)
    third = case.make(params)
    report = third.load_state_dict(second.state_dict())
    assert report.matched_by == "name"
    case.advance(third, 2, first=4)
    assert_same([p.detach() for p in flat(third)], [p.detach() for p in flat(stay)])


def test_torchs_names_come_without_shapes_and_still_betray_another_shape() -> None:
    theirs = torch.optim.AdamW(weights(*NAMES))
    give_gradients(ADAMW, theirs, 0)
    theirs.step()
    other = [(n, nn.Parameter(torch.zeros(9, 2)) if n == "head.bias" else p) for n, p in weights(*NAMES)]
    ours = AdamW(other)
    with pytest.raises(ValueError, match=r"'head.bias' has shape"):
        ours.load_state_dict(theirs.state_dict())
    report = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert [change.what for change in report.reshaped] == ["head.bias"]
    assert not ours.state.get(other[3][1])


def test_shapes_are_written_only_beside_names() -> None:
    case = ADAMW
    assert "param_shapes" not in case.make().state_dict()["param_groups"][0]
    group = case.make(named(case)).state_dict()["param_groups"][0]
    assert group["param_shapes"] == [list(shape) for shape in case.shapes]
    optimizer = case.make(named(case))
    assert "param_shapes" not in optimizer.param_groups[0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert "param_shapes" not in optimizer.param_groups[0]


# Hyper-parameters


def with_rates(**options: Any) -> Any:
    return AdamW([{"params": weights("a")}, {"params": weights("bb"), **options}], lr=0.5)


@pytest.mark.parametrize(
    ("choice", "lr", "decay"),
    [
        ("saved", 0.25, 0.125),
        ("current", 0.5, 0.0625),
        ({"lr": "current"}, 0.5, 0.125),
        ({"weight_decay": "current"}, 0.25, 0.0625),
        ({"lr": "saved", "weight_decay": "current"}, 0.25, 0.0625),
    ],
)
def test_hyperparameters_from_the_checkpoint_or_from_the_code(choice: Any, lr: float, decay: float) -> None:
    source = AdamW(weights(*NAMES), lr=0.25, weight_decay=0.125)
    torch.optim.lr_scheduler.ExponentialLR(source, 0.5)
    target = AdamW(weights(*NAMES), lr=0.5, weight_decay=0.0625)
    torch.optim.lr_scheduler.ExponentialLR(target, 0.5)
    report = target.load_state_dict(source.state_dict(), hyperparams=choice)
    group = target.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (lr, decay)
    assert group["initial_lr"] == lr
    differing = {c.what: (c.saved, c.current, c.taken) for c in report.hyperparameters}
    assert differing["lr (group 0)"] == (0.25, 0.5, "saved" if lr == 0.25 else "current")
    assert differing["weight_decay (group 0)"] == (0.125, 0.0625, "saved" if decay == 0.125 else "current")
    assert set(differing) == {f"{x} (group 0)" for x in ("lr", "weight_decay", "initial_lr")}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("new", "hyperparams = 'new', must be 'saved', 'current'"),
        ({"lr": "new"}, r"hyperparams\['lr'\] = 'new'"),
        ({"learning_rate": "saved"}, "no hyper-parameter 'learning_rate'"),
        (None, "hyperparams = None"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(choice: Any, message: str) -> None:
    optimizer = trained(weights(*NAMES))
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=f"AdamW.*{message}"):
        optimizer.load_state_dict(optimizer.state_dict(), hyperparams=choice)
    assert_same(snapshot(optimizer), before)


def test_a_parameter_in_another_group_takes_its_state_along_and_the_groups_go_on() -> None:
    first, second = weights("a", "bb", "ccc"), weights("dddd", "eeeee", "ffffff")
    source = trained([{"params": first, "lr": 0.25}, {"params": second, "lr": 0.125}])
    target = AdamW([{"params": first[:2]}, {"params": [*second, first[2]]}], lr=0.5)
    report = target.load_state_dict(source.state_dict())
    assert [(c.what, c.saved, c.current) for c in report.moved] == [("ccc", 0, 1)]
    assert [group["lr"] for group in target.param_groups] == [0.25, 0.125]
    assert_same(by_name(target)["ccc"], by_name(source)["ccc"])


def test_a_new_rule_for_weight_decay_is_not_undone_by_the_checkpoint() -> None:
    """One group becomes two that differ in weight_decay, of which the checkpoint knows nothing."""
    pairs = weights("a", "bb", "ccc", "dddd")
    source = trained(pairs, lr=0.25, weight_decay=0.5)
    groups: Any = [{"params": pairs[:2], "weight_decay": 0.125}, {"params": pairs[2:], "weight_decay": 0.0}]
    target = AdamW(groups, lr=0.5)
    before = snapshot(target)
    with pytest.raises(ValueError, match=r"group 0 has weight_decay = 0.125, but .* 'current'.*strict=False"):
        target.load_state_dict(source.state_dict())
    assert_same(snapshot(target), before)
    for how in ({"strict": False}, {"hyperparams": {"weight_decay": "current"}}):
        target = AdamW(groups, lr=0.5)
        report = target.load_state_dict(source.state_dict(), **how)
        assert [group["weight_decay"] for group in target.param_groups] == [0.125, 0.0]
        assert [group["lr"] for group in target.param_groups] == [0.25, 0.25]
        assert_same(by_name(target), by_name(source))
        assert {c.what: c.taken for c in report.hyperparameters} == {
            "lr (group 0)": "saved",
            "lr (group 1)": "saved",
            "weight_decay (group 0)": "current",
            "weight_decay (group 1)": "current",
        }


def test_groups_that_became_one_and_disagree_ask_which() -> None:
    source = with_rates(lr=0.25)
    target = AdamW(weights("a", "bb"), lr=0.125)
    with pytest.raises(ValueError, match=r"group 0 has lr = 0.125, but .* lr = 0.5, 0.25"):
        target.load_state_dict(source.state_dict())
    target.load_state_dict(source.state_dict(), hyperparams="current")
    assert target.param_groups[0]["lr"] == 0.125


def test_a_new_group_keeps_its_own_settings() -> None:
    source = trained(weights("a"), lr=0.25)
    target = AdamW([{"params": weights("a")}, {"params": weights("bb"), "lr": 0.125}], lr=0.5)
    report = target.load_state_dict(source.state_dict(), strict=False)
    assert report.missing == ("bb",)
    assert [group["lr"] for group in target.param_groups] == [0.25, 0.125]


def test_a_tensor_lr_is_copied_too() -> None:
    source = AdamW(weights(*NAMES), lr=torch.tensor(0.25), foreach=False)
    target = AdamW(weights(*NAMES), lr=torch.tensor(0.5), foreach=False)
    target.load_state_dict(source.state_dict())
    target.param_groups[0]["lr"].mul_(2)
    assert (float(source.param_groups[0]["lr"]), float(target.param_groups[0]["lr"])) == (0.25, 0.5)


def test_what_a_checkpoint_does_not_say_stays() -> None:
    source = trained(weights(*NAMES)).state_dict()
    for key in ("lr", "betas"):
        del source["param_groups"][0][key]
    target = AdamW(weights(*NAMES), lr=0.5, betas=(0.5, 0.75))
    target.load_state_dict(source)
    assert (target.param_groups[0]["lr"], target.param_groups[0]["betas"]) == (0.5, (0.5, 0.75))


def test_an_option_that_changed_adds_or_drops_its_slot() -> None:
    plain_run = trained(weights(*NAMES))
    with_maximum = trained(weights(*NAMES), amsgrad=True)
    adds = AdamW(weights(*NAMES), amsgrad=True)
    report = adds.load_state_dict(plain_run.state_dict(), hyperparams="current")
    assert set(report.missing) == {f"{name}: max_exp_avg_sq" for name in NAMES}
    step_by_name(ADAMW, adds, 3)
    assert all("max_exp_avg_sq" in state for state in by_name(adds).values())
    drops = AdamW(weights(*NAMES))
    report = drops.load_state_dict(with_maximum.state_dict(), hyperparams="current")
    assert set(report.unexpected) == {f"{name}: max_exp_avg_sq" for name in NAMES}
    assert all("max_exp_avg_sq" not in state for state in by_name(drops).values())


# The report


def test_the_report_reads_as_a_table() -> None:
    source = trained(weights("a", "bb", "ccc"), lr=0.25)
    target = AdamW([*weights("a", "dddd"), ("bb", nn.Parameter(torch.zeros(7)))], lr=0.5)
    text = str(target.load_state_dict(source.state_dict(), strict=False))
    assert text.splitlines()[0] == "AdamW: 1 parameter matched by name"
    assert [line.split(maxsplit=1) for line in text.splitlines()[1:5]] == [
        ["missing", "dddd          not in the checkpoint"],
        ["unexpected", "ccc           not in the optimizer"],
        ["reshaped", "bb            (4, 2) in the checkpoint, (7,) here"],
        ["hyper-parameter", "lr (group 0)  0.25 in the checkpoint, 0.5 here: saved value taken"],
    ]


@each(plain)
def test_a_report_of_nothing_special_is_one_line(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer, 2)
    again = case.make()
    report = again.load_state_dict(optimizer.state_dict())
    assert str(report) == f"{case.name}: {len(case.shapes)} parameters matched by position"
    assert report.matched == tuple(f"parameter {i}" for i in range(len(case.shapes)))


def test_parameters_named_alike_in_a_module_come_from_it() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    source = AdamW(model)
    model(torch.ones(1, 2)).sum().backward()
    source.step()
    report = AdamW(model.named_parameters()).load_state_dict(source.state_dict())
    assert report.matched == ("0.weight", "0.bias", "1.weight", "1.bias")
