"""Checkpoints: from and to torch.optim, on disk, copied, pickled; one that does not fit is refused entirely."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rules import CASES, LOOPS, Case, assert_same, assert_same_run, each, flat, plain, snapshot
from torch import Tensor, nn

import steprule

# Updates that round away in 16 bits do not matter in these tests.
pytestmark = pytest.mark.filterwarnings("ignore:.*rounded away:UserWarning")


def copies(optimizer: Any) -> list[Any]:
    return [nn.Parameter(p.detach().clone()) for p in flat(optimizer)]


def through_a_file(saved: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# torch.optim


@each(lambda case: case.torch_class is not None, among=LOOPS)
def test_state_keys_are_torchs(case: Case) -> None:
    ours, theirs = case.make(), case.make_torch()
    case.advance(ours, 2)
    case.advance(theirs, 2)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"][0]["params"] == other["param_groups"][0]["params"]
    assert set(other["param_groups"][0]) <= set(mine["param_groups"][0])
    for place, state in other["state"].items():
        kept = {key for key, value in state.items() if value is not None}
        assert set(mine["state"][place]) == kept
        for key in kept:
            assert type(mine["state"][place][key]) is type(state[key]), key
            if isinstance(state[key], Tensor):
                assert mine["state"][place][key].shape == state[key].shape, key
                assert mine["state"][place][key].dtype == state[key].dtype, key
    # torch's SGD keeps nothing for a parameter without momentum
    assert all(not state for place, state in mine["state"].items() if place not in other["state"])


@each(lambda case: case.torch_class is not None, among=LOOPS)
def test_a_run_moves_from_torch_to_us_and_back(case: Case) -> None:
    """Two steps there, two here, two there: the same bits as six steps of torch."""
    stay = case.make_torch()
    case.advance(stay, 6)

    first = case.make_torch()
    case.advance(first, 2)
    second = case.make(copies(first))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    case.advance(second, 2, first=2)
    third = case.make_torch(copies(second))
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    case.advance(third, 2, first=4)
    assert_same([p.detach() for p in flat(third)], [p.detach() for p in flat(stay)])


@each(lambda case: case.torch_class is not None, among=LOOPS)
def test_settings_come_along_from_torch(case: Case) -> None:
    theirs = case.make_torch(lr=0.0625)
    case.advance(theirs)
    ours = case.rule(copies(theirs))
    ours.load_state_dict(theirs.state_dict())
    group, other = ours.param_groups[0], theirs.param_groups[0]
    for key in set(other) - {"params"}:
        assert group[key] == other[key], key
    assert group["lr"] == 0.0625


# Our own


WAYS: dict[str, Callable[[Case, Any], Any]] = {
    "load": lambda case, optimizer: loaded(case, optimizer, optimizer.state_dict()),
    "file": lambda case, optimizer: loaded(case, optimizer, through_a_file(optimizer.state_dict())),
    "deepcopy": lambda case, optimizer: copy.deepcopy(optimizer),
    "pickle": lambda case, optimizer: pickle.loads(pickle.dumps(optimizer)),
}


def loaded(case: Case, optimizer: Any, saved: Any) -> Any:
    again = case.make(copies(optimizer))
    again.load_state_dict(saved)
    return again


@each()
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_continues_to_the_same_bits(case: Case, way: str) -> None:
    optimizer = case.make()
    case.advance(optimizer, 3)
    again = WAYS[way](case, optimizer)
    assert type(again) is type(optimizer)
    assert flat(again)[0] is not flat(optimizer)[0]
    assert_same_run(again, optimizer)
    case.advance(optimizer, 3, first=3)
    kept = [p.detach().clone() for p in flat(again)]
    assert not torch.equal(kept[0], flat(optimizer)[0])
    case.advance(again, 3, first=3)
    assert_same_run(again, optimizer)
    assert repr(again) == repr(optimizer)


@each(plain)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_continue_to_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    if case.closure and dtype is torch.bfloat16:
        pytest.skip("a line search in half precision has nothing to hold on to")
    optimizer = case.make(case.parameters(dtype))
    case.advance(optimizer, 3)
    again = loaded(case, optimizer, through_a_file(optimizer.state_dict()))
    assert_same_run(again, optimizer)
    for o in (optimizer, again):
        case.advance(o, 3, first=3)
    assert_same_run(again, optimizer)


@each()
def test_two_optimizers_never_share_state(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer, 2)
    again = loaded(case, optimizer, optimizer.state_dict())
    kept = snapshot(optimizer)
    case.advance(again, 2, first=2)
    assert_same(snapshot(optimizer), kept)


@each()
def test_loading_into_a_fresh_optimizer_what_it_saved_changes_nothing(case: Case) -> None:
    optimizer, wanted = case.make(), case.make()
    saved = optimizer.state_dict()
    rebuilt = {key: type(value)(value) for key, value in saved.items()}
    optimizer.load_state_dict(rebuilt)
    assert_same(optimizer.state_dict(), saved)
    case.advance(optimizer, 2)
    case.advance(wanted, 2)
    assert_same_run(optimizer, wanted)


@each(lambda case: not case.closure)
def test_init_state_before_a_step_changes_no_step(case: Case) -> None:
    params = case.parameters()
    params[0].requires_grad_(False)
    early, late = case.make(params), case.make([nn.Parameter(p.detach().clone()) for p in params])
    flat(late)[0].requires_grad_(False)
    before = [p.detach().clone() for p in params]
    early.init_state()
    assert_same([p.detach() for p in params], before)
    assert case.starts_with_state == (0 in early.state_dict()["state"])
    keys = {place: set(state) for place, state in early.state_dict()["state"].items()}
    case.advance(early, 2)
    case.advance(late, 2)
    assert_same_run(early, late)
    assert keys == {place: set(state) for place, state in late.state_dict()["state"].items()}


@each(lambda case: not case.closure)
def test_state_is_plain_and_has_the_shapes_that_the_slots_declare(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer)
    declared = {slot.key: slot for slot in getattr(case.rule, "slots", {}).values()}
    for param, state in optimizer.state.items():
        assert type(state) is dict
        for key, value in state.items():
            if case.sparse_only and key == "step":
                assert type(value) is int  # as in torch
                continue
            assert type(value) is Tensor, key
            assert not value.requires_grad
            wanted = (
                ()
                if key in ("step", "noise_key")
                else declared[key].shape_for(param, optimizer.param_groups[0])
            )
            assert tuple(value.shape) == wanted, key


@each()
def test_the_checkpoint_holds_plain_containers_only(case: Case) -> None:
    optimizer = case.make()
    case.advance(optimizer)

    def check(value: Any) -> None:
        assert type(value) in (dict, list, tuple, int, float, bool, str, type(None), Tensor), type(value)
        parts = value.values() if isinstance(value, dict) else value
        for part in parts if isinstance(value, (dict, list, tuple)) else ():
            check(part)

    check(optimizer.state_dict())


@each(plain)
def test_groups_written_as_json_are_taken(case: Case) -> None:
    """Tuples come back as lists."""
    optimizer, wanted = case.make(), case.make()
    saved = optimizer.state_dict()
    saved["param_groups"] = json.loads(json.dumps(saved["param_groups"]))
    optimizer.load_state_dict(saved)
    case.advance(optimizer, 2)
    case.advance(wanted, 2)
    assert_same_run(optimizer, wanted)


@each(plain)
def test_hooks_around_saving_and_loading(case: Case) -> None:
    optimizer = case.make()
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: seen.append("before loading"))
    optimizer.register_load_state_dict_pre_hook(
        lambda o, saved: {**saved, "param_groups": [{**group, "lr": 0.125} for group in saved["param_groups"]]}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after loading"))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["before saving", "before loading", "after loading"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.125]


# What does not fit


def without(saved: Any, key: str) -> Any:
    return {name: value for name, value in saved.items() if name != key}


def change_group(saved: Any, **changes: Any) -> Any:
    saved["param_groups"][0].update(changes)
    return saved


def change_state(saved: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    for state in saved["state"].values():
        change(state)
    return saved


def fewer(saved: Any) -> Any:
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    return saved


def wrong_shapes(state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            state[key] = value.new_zeros(7, 7, 7)


UNFIT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no state": (lambda saved: without(saved, "state"), "has no 'state'"),
    "no groups": (lambda saved: without(saved, "param_groups"), "has no 'param_groups'"),
    "more groups": (
        lambda saved: {**saved, "param_groups": saved["param_groups"] * 2},
        "2 parameter groups.*1",
    ),
    "fewer parameters": (fewer, "parameter group 0 has"),
    "a negative lr": (lambda saved: change_group(saved, lr=-1.0), "lr = -1.0.*parameter group 0"),
    "lr not a number": (lambda saved: change_group(saved, lr=float("nan")), "lr = nan.*parameter group 0"),
    "an unknown key": (lambda saved: change_group(saved, learning_rte=1.0), "'learning_rte'"),
}


@each(plain)
@pytest.mark.parametrize("kind", UNFIT)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(case: Case, kind: str) -> None:
    spoil, message = UNFIT[kind]
    optimizer = case.make()
    case.advance(optimizer, 2)
    kept = snapshot(optimizer)
    saved = spoil(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises((ValueError, KeyError), match=message) as caught:
        optimizer.load_state_dict(saved)
    assert case.name in str(caught.value)
    assert_same(snapshot(optimizer), kept)


@each(lambda case: bool(case.options) and bool(getattr(case.rule, "slots", {})), among=LOOPS)
def test_state_of_other_shapes_is_refused_by_name(case: Case) -> None:
    named = [(f"layer{i}.weight", p) for i, p in enumerate(case.parameters())]
    optimizer = case.make(named)
    case.advance(optimizer, 2)
    kept = snapshot(optimizer)
    saved = change_state(copy.deepcopy(optimizer.state_dict()), wrong_shapes)
    with pytest.raises(ValueError, match=r"'layer0\.weight'.*\(7, 7, 7\)"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), kept)


def test_a_checkpoint_of_another_librarys_rule_is_loaded_if_one_says_so() -> None:
    """One with fewer options and a step that is no tensor, as labml's Adam writes it."""
    weight = torch.nn.Parameter(torch.ones(3))
    entry = {"step": 10, "exp_avg": torch.full((3,), 0.5), "exp_avg_sq": torch.ones(3)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-16, "weight_decay": 0.0, "params": [0]}
    written = {"state": {0: entry}, "param_groups": [group]}
    optimizer = steprule.Adam([weight])
    with pytest.raises(ValueError, match=r"If another library's Adam wrote it, strict=False loads it\.$"):
        optimizer.load_state_dict(written)
    optimizer.load_state_dict(written, strict=False)
    own = optimizer.state[weight]
    assert own["step"] == 10
    assert torch.equal(own["exp_avg"], entry["exp_avg"])
    assert optimizer.param_groups[0]["eps"] == 1e-16


@pytest.mark.parametrize("other", [steprule.Adagrad, steprule.Adadelta, torch.optim.Adagrad])
def test_the_state_of_another_rule_is_refused(other: Any) -> None:
    case = Case(steprule.Adam)
    wrong = other(case.parameters())
    case.advance(wrong)
    optimizer = case.make()
    kept = snapshot(optimizer)
    state_only = {**optimizer.state_dict(), "state": wrong.state_dict()["state"]}
    writer = other.__name__
    message = rf"this is a checkpoint of {writer}, not of Adam: .*convert_state.*from_='{writer}'"
    for saved in (state_only, wrong.state_dict()):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), kept)


def test_an_older_torch_checkpoint_with_a_whole_number_as_step() -> None:
    case = Case(steprule.Adam)
    theirs = torch.optim.Adam(case.parameters(), foreach=False)
    case.advance(theirs, 3)
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    ours = case.make(copies(theirs))
    ours.load_state_dict(saved)
    case.advance(ours, 2, first=3)
    case.advance(theirs, 2, first=3)
    assert_same([p.detach() for p in flat(ours)], [p.detach() for p in flat(theirs)])


# Distributed checkpoints create the state by a dummy step


@each(lambda case: case.many_groups, among=[c for c in CASES if plain(c)])
def test_a_distributed_checkpoint_reads_and_restores_it(case: Case) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    model, twin = module_of(case), module_of(case)
    optimizer, wanted = case.make(model), case.make(twin)
    optimizer.init_state()
    dcp.get_optimizer_state_dict(model, optimizer)
    case.advance(optimizer, 2)
    case.advance(wanted, 2)
    assert_same_run(optimizer, wanted)
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    assert all(isinstance(key, str) for key in saved)
    restored = module_of(case)
    restored.load_state_dict(model.state_dict())
    again = case.make(restored)
    again.init_state()
    dcp.set_optimizer_state_dict(restored, again, copy.deepcopy(saved), options=options)
    for o in (optimizer, again):
        case.advance(o, 2, first=2)
    assert_same_run(again, optimizer)


def module_of(case: Case) -> nn.Module:
    model = nn.Module()
    for place, param in enumerate(case.parameters()):
        model.register_parameter(f"weight_{place}", param)
    return model
