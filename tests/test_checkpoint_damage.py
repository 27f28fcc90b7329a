"""Broken and hostile checkpoints: one clear error that says where, and nothing is changed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rules import Case, assert_same, each, numbers, plain, snapshot
from torch import Tensor, nn

import steprule
from steprule import Adafactor, Adam, AdamW, NAdam, load_checkpoint, save_checkpoint

NAMES = ("embed.weight", "head.weight", "head.bias")


def build(rule: Any = AdamW, **options: Any) -> Any:
    shapes = ((4, 3), (2, 3), (3, 2))
    params = [nn.Parameter(numbers(s, torch.float32, i)) for i, s in enumerate(shapes)]
    optimizer = rule(list(zip(NAMES, params, strict=True)), **options)
    Case(rule).advance(optimizer, 2)
    return optimizer


# A state dict that is not what it should be


def put(place: int, key: str, value: Any) -> Callable[[Any], None]:
    def spoil(saved: Any) -> None:
        saved["state"][place][key] = value

    return spoil


def drop(place: int, key: str) -> Callable[[Any], None]:
    return lambda saved: saved["state"][place].pop(key)


def group(**changes: Any) -> Callable[[Any], None]:
    return lambda saved: saved["param_groups"][0].update(changes)


def top(key: str, value: Any) -> Callable[[Any], None]:
    return lambda saved: saved.update({key: value})


def poke(number: float) -> Callable[[Any], None]:
    def spoil(saved: Any) -> None:
        saved["state"][1]["exp_avg"].view(-1)[3] = number

    return spoil


WEIGHT, BIAS = "'head.weight'", "'head.bias'"
NAN, INF = float("nan"), float("inf")
DAMAGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "NaN": (poke(NAN), f"'exp_avg' of {WEIGHT} is NaN or infinite"),
    "infinity": (poke(-INF), f"'exp_avg' of {WEIGHT} is NaN or infinite"),
    "a slot missing": (drop(2, "exp_avg_sq"), f"{BIAS} has no 'exp_avg_sq'"),
    "no count": (drop(2, "step"), f"{BIAS} has no 'step'"),
    "a foreign slot": (put(1, "exp_avg_other", torch.zeros(2, 3)), f"{WEIGHT} has 'exp_avg_other'.*exp_avg_sq"),
    "another shape": (put(1, "exp_avg", torch.zeros(3, 2)), rf"'exp_avg' of {WEIGHT} has shape \(3, 2\)"),
    "a list": (put(1, "exp_avg", [0.0] * 6), f"'exp_avg' of {WEIGHT} is list, must be a tensor"),
    "text": (put(2, "exp_avg_sq", "0.0"), f"'exp_avg_sq' of {BIAS} is str"),
    "whole numbers": (put(1, "exp_avg", torch.zeros(2, 3, dtype=torch.int64)), "is torch.int64 .*floating"),
    "codes without a scale": (put(1, "exp_avg", torch.zeros(2, 3, dtype=torch.int8)), "is torch.int8"),
    "truths": (put(1, "exp_avg", torch.zeros(2, 3, dtype=torch.bool)), "is torch.bool .*floating"),
    "complex": (put(1, "exp_avg", torch.zeros(2, 3, dtype=torch.complex64)), "is torch.complex64 .*floating"),
    "sparse": (put(1, "exp_avg", torch.zeros(2, 3).to_sparse()), r"'exp_avg' of .*\(torch.sparse_coo\)"),
    "a count of text": (put(1, "step", "2"), f"'step' of {WEIGHT} \\('2'\\) is not a step count"),
    "a count below zero": (put(1, "step", torch.tensor(-1.0)), f"'step' of {WEIGHT} .*at least 0"),
    "a count of NaN": (put(1, "step", torch.tensor(NAN)), f"'step' of {WEIGHT} .*at least 0"),
    "two counts": (put(1, "step", torch.ones(2)), f"'step' of {WEIGHT} is not a step count, must be one"),
    "a truth as count": (put(1, "step", True), f"'step' of {WEIGHT} .*is not a step count"),
    "a list as state": (lambda s: s["state"].update({1: [1]}), "state of parameter 1 is list"),
    "numbers as keys": (put(1, 5, torch.zeros(1)), "state of parameter 1 is dict"),  # type: ignore[arg-type]
    "state of nobody": (lambda s: s["state"].update({9: {}}), "parameter 9, which is in no group"),
    "state under a name": (lambda s: s["state"].update({"head": {}}), "parameter 'head', which is in no"),
    "a list of states": (top("state", [{}]), "'state' is list"),
    "groups in a dict": (top("param_groups", {0: {}}), "'param_groups' is dict"),
    "a group of text": (top("param_groups", ["lr"]), "parameter group 0 is str"),
    "no params": (group(params=None), "'params' of parameter group 0 is NoneType"),
    "params of tensors": (group(params=[torch.ones(1)] * 3), "not numbered"),
    "a number twice": (group(params=[0, 1, 1]), "two parameters .* have the same number"),
    "a negative lr": (group(lr=-1.0), "lr = -1.0"),
    "an lr of text": (group(lr="0.1"), "lr = '0.1'"),
    "betas of text": (group(betas="fast"), "betas = 'fast'"),
    "a misspelt key": (group(wieght_decay=0.9), "no hyper-parameter 'wieght_decay' .*group 0.*'weight_decay'"),
    "an impossible option": (group(nonfinite="hope"), "nonfinite = 'hope'"),
    "skipped steps of text": (group(nonfinite="skip", skipped_steps="1"), "skipped_steps = '1'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_changes_nothing(kind: str) -> None:
    spoil, message = DAMAGE[kind]
    optimizer = build()
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    before = snapshot(optimizer)
    objects = [id(value) for state in optimizer.state.values() for value in state.values()]
    with pytest.raises((ValueError, TypeError), match=f"^AdamW.*{message}"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)
    assert [id(value) for state in optimizer.state.values() for value in state.values()] == objects
    Case(AdamW).advance(optimizer)


@pytest.mark.parametrize("given", [[], "state", None, 3, ({}, [])])
def test_something_else_in_place_of_a_dict(given: Any) -> None:
    with pytest.raises(TypeError, match=r"AdamW\.load_state_dict takes the dict"):
        build().load_state_dict(given)


def test_the_whole_training_checkpoint_in_place_of_the_optimizers() -> None:
    with pytest.raises(ValueError, match=r"no 'state'. .*this holds model, optimizer"):
        build().load_state_dict({"model": {}, "optimizer": {}})


@each(plain)
def test_nan_in_any_state_names_parameter_and_slot(case: Case) -> None:
    optimizer = case.make([(f"layer{i}.weight", p) for i, p in enumerate(case.parameters())])
    case.advance(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    whole = [(key, value) for key, value in saved["state"].get(0, {}).items() if isinstance(value, Tensor)]
    whole = [(key, value) for key, value in whole if value.dim() and value.numel()]
    if not whole:
        assert case.name == "SGD"
        return
    key, value = whole[-1]
    value.view(-1)[-1] = NAN
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{case.name}.*'{key}' of 'layer0.weight' is NaN"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)
    report = optimizer.load_state_dict(saved, strict=False)
    assert report.nonfinite == (f"layer0.weight: {key}",)
    assert_same(optimizer.state_dict()["state"], saved["state"])


def test_a_lacking_slot_without_strict_starts_that_parameter_again() -> None:
    """A second moment of zero next to a high count would make the steps far too large."""
    optimizer = build()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]["exp_avg_sq"]
    report = optimizer.load_state_dict(saved, strict=False)
    assert report.missing == ("head.weight: exp_avg_sq",)
    params = optimizer.param_groups[0]["params"]
    assert [len(optimizer.state[p]) for p in params] == [3, 0, 3]


def test_strict_false_drops_what_is_foreign_and_says_so() -> None:
    optimizer = build()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["slow"] = torch.zeros(2, 3)
    saved["state"][7] = {}
    saved["param_groups"][0]["wieght_decay"] = 2.0
    report = optimizer.load_state_dict(saved, strict=False)
    assert report.unexpected == ("parameter 7", "head.weight: slow", "hyper-parameter 'wieght_decay' (group 0)")
    assert "wieght_decay" not in optimizer.param_groups[0]
    assert "slow" not in optimizer.state[optimizer.param_groups[0]["params"][1]]


@pytest.mark.parametrize(("rule", "key"), [(NAdam, "mu_product"), (Adafactor, "row_var")])
def test_numbers_per_tensor_and_slots_of_other_shapes(rule: Any, key: str) -> None:
    optimizer = build(rule)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][key] = torch.ones(5)
    with pytest.raises(ValueError, match=rf"{rule.__name__}.*'{key}' of {WEIGHT} has shape \(5,\)"):
        optimizer.load_state_dict(saved)


def test_a_plain_number_per_tensor_is_taken_and_reported() -> None:
    optimizer = build(NAdam)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["mu_product"] = float(saved["state"][1]["mu_product"])
    saved["state"][1]["step"] = 2
    report = optimizer.load_state_dict(saved)
    assert {(c.what, c.saved) for c in report.converted} == {
        ("head.weight: mu_product", "float"),
        ("head.weight: step", "int"),
    }
    assert_same(optimizer.state_dict(), build(NAdam).state_dict())


LBFGS_DAMAGE: dict[str, tuple[str, Any, str]] = {
    "a direction of text": ("d", "down", "'d' holds str"),
    "a direction too short": ("d", torch.ones(3), "'d' has 3 elements, the parameters have 24"),
    "history outside a list": ("old_dirs", torch.ones(24), "'old_dirs' is Tensor, must be a list"),
    "history of text": ("old_stps", ["x"], "'old_stps' holds str"),
    "a scale of text": ("H_diag", "1", "'H_diag' is str"),
    "products outside a list": ("ro", 1.0, "'ro' is float"),
    "a foreign key": ("exp_avg", torch.ones(24), "'exp_avg' is not part of the state"),
}


@pytest.mark.parametrize("kind", LBFGS_DAMAGE)
def test_damage_to_a_history(kind: str) -> None:
    key, value, message = LBFGS_DAMAGE[kind]
    optimizer = build(steprule.LBFGS)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"^LBFGS.load_state_dict: {message}"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


def test_a_history_kept_elsewhere() -> None:
    optimizer = build(steprule.LBFGS)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1] = saved["state"].pop(0)
    with pytest.raises(ValueError, match=f"{WEIGHT} has state, only the first keeps any"):
        optimizer.load_state_dict(saved)


class Keeper(steprule.GenericAdaptiveOptimizer):
    """Keeps something that no rule here keeps."""

    def init_state(self, state: dict[str, Any], group: dict[str, Any], param: Tensor) -> None:
        state.update(mean=torch.zeros_like(param), past=[torch.zeros_like(param)], note="new", count=0)

    def step_param(self, state: Any, group: dict[str, Any], grad: Tensor, param: Tensor) -> None:
        state["mean"].lerp_(grad, 0.5)
        state["past"] = [*state["past"], grad.clone()][-3:]
        state["count"] += 1
        param.sub_(state["mean"] + state["past"][0], alpha=group["lr"])


def test_a_rule_written_by_hand_keeps_lists_and_words_and_is_guarded_too() -> None:
    optimizer, again = build(Keeper), build(Keeper)
    saved = optimizer.state_dict()
    Case(Keeper).advance(again, 2, first=5)
    again.load_state_dict(saved)
    assert_same(again.state_dict(), saved)
    mine, theirs = (o.state[o.param_groups[0]["params"][0]] for o in (again, optimizer))
    assert mine["past"][0].data_ptr() != theirs["past"][0].data_ptr()
    broken = copy.deepcopy(saved)
    broken["state"][1]["past"][1][0, 0] = INF
    before = snapshot(again)
    with pytest.raises(ValueError, match=f"Keeper.*'past' of {WEIGHT} is NaN or infinite"):
        again.load_state_dict(broken)
    assert_same(snapshot(again), before)


@given(data=st.data())
def test_no_random_damage_gets_through_halfway(data: Any) -> None:
    """Any value in any place: either it loads and steps, or nothing has changed."""
    optimizer = build(Adam)
    saved = copy.deepcopy(optimizer.state_dict())
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=2),
        st.just([]), st.just({}), st.just(torch.zeros(4, 3)), st.just(torch.zeros(())),
        st.just(torch.full((2, 3), NAN)), st.just(object()),
    )  # fmt: skip
    for _ in range(data.draw(st.integers(1, 3))):
        at: Any = saved
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(at[key], (dict, list)) and at[key] and data.draw(st.booleans()):
                at = at[key]
                continue
            if isinstance(at, dict) and data.draw(st.booleans()):
                del at[key]
            else:
                at[key] = data.draw(junk)
            break
        if not isinstance(saved.get("state", {}), dict):
            break
    before = snapshot(optimizer)
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, TypeError) as error:
        assert_same(snapshot(optimizer), before)
        if not str(error).startswith("Adam"):
            raise
    Case(Adam).advance(optimizer, 1)


# Files


def checkpoint(number: int = 1) -> dict[str, Any]:
    return {"step": number, "numbers": torch.full((300,), float(number)), "optimizer": build().state_dict()}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    saved = checkpoint()
    save_checkpoint(file, saved)
    assert_same(load_checkpoint(file), saved)
    assert_same(load_checkpoint(str(file)), torch.load(file, weights_only=True))
    assert os.listdir(tmp_path) == ["run.pt"]


def test_truncated_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    save_checkpoint(file, checkpoint())
    whole = file.read_bytes()
    for length in [0, 1, 30, *range(64, len(whole), len(whole) // 60), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"run\.pt is damaged or not a checkpoint: .+ Use an earlier one"):
            load_checkpoint(file)


def test_flipped_bits_are_found_or_harmless(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    saved = checkpoint()
    save_checkpoint(file, saved)
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(300):
        place = int(torch.randint(len(whole), (), generator=generator))
        bit = 1 << int(torch.randint(8, (), generator=generator))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            loaded = load_checkpoint(file)
        except ValueError as error:
            found += "run.pt" in str(error)
            continue
        assert_same(loaded, saved, f"byte {place}")
    assert found > 100


def test_a_file_that_asks_for_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    file, trace = tmp_path / "run.pt", tmp_path / "trace"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (trace,)

    torch.save({"model": Evil()}, file)
    with pytest.raises(ValueError, match=r"run\.pt was not loaded: it asks for .*pathlib\.Path.* run code"):
        load_checkpoint(file)
    assert not trace.exists()


def test_an_object_is_refused_when_it_is_saved_not_when_it_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    save_checkpoint(file, checkpoint(1))
    with pytest.raises(TypeError, match=r"run\.pt was not written: it would hold .*Linear.*state_dict\(\)"):
        save_checkpoint(file, {"model": nn.Linear(1, 1)})
    assert load_checkpoint(file)["step"] == 1
    assert os.listdir(tmp_path) == ["run.pt"]


@pytest.mark.parametrize("content", [b"", b"model", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_checkpoint(file)


def test_a_tensor_alone_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "run.pt")
    with pytest.raises(ValueError, match="holds Tensor, not a dict"):
        load_checkpoint(tmp_path / "run.pt")


def test_no_file_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "run.pt")
    with pytest.raises(OSError, match=r"cannot write .*run\.pt: .*No such file"):
        save_checkpoint(tmp_path / "nowhere" / "run.pt", {})
