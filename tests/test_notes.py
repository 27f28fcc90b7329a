"""Keys of groups that are not hyper-parameters: the user's notes are kept, misspelt names are refused."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from rules import LOOPS, Case, assert_same, assert_same_run, each, flat, plain, snapshot
from torch import nn

import steprule
from steprule.engine.group_keys import misspelt

# Keys that SAM, timm, mmengine, Megatron, DeepSpeed, Hugging Face, schedulers and users put into groups.
NOTES: dict[str, Any] = {
    "rho": 0.05,
    "adaptive": True,
    "lr_scale": 0.5,
    "lr_mult": 2.0,
    "wd_mult": 1.0,
    "weight_decay_scale": 0.1,
    "group_name": "layer_3",
    "name": "no_decay",
    "layer_id": 3,
    "is_expert": False,
    "moe": False,
    "initial_lr": 0.1,
    "use_muon": True,
    "id": 7,
    "d_coef": None,
    "tags": ["a", "b"],
}
RULES = [case for case in LOOPS if plain(case)]
MISSPELT = {
    "weigth_decay": "weight_decay",
    "wieght_decay": "weight_decay",
    "weight-decay": "weight_decay",
    "weightdecay": "weight_decay",
    "weight_dec": "weight_decay",
    "momentun": "momentum",
    "momnetum": "momentum",
    "beta": "betas",
    "beta1": "betas",
    "Betas": "betas",
    "LR": "lr",
    "learning_rate": "lr",
    "epsilon": "eps",
    "esp": "eps",
    "maximise": "maximize",
    "max_iters": "max_iter",
}


def own_notes(case: Case) -> dict[str, Any]:
    return {key: value for key, value in NOTES.items() if key not in case.rule.fields}


@each(among=RULES)
def test_notes_are_kept_saved_and_ignored(case: Case) -> None:
    notes = own_notes(case)
    noted, bare = case.make([{"params": case.parameters(), **notes}]), case.make()
    case.advance(noted, 2)
    case.advance(bare, 2)
    assert_same_run(noted, bare)
    assert {key: noted.param_groups[0][key] for key in notes} == notes
    loaded = case.make()
    report = loaded.load_state_dict(copy.deepcopy(noted.state_dict()))
    assert {key: loaded.param_groups[0][key] for key in notes} == notes
    assert set(report.notes) == {
        f"{key} = {value!r} (group 0)" for key, value in notes.items() if key not in ("name", "initial_lr")
    }
    assert_same(loaded.state_dict(), noted.state_dict())
    kept = case.make([{"params": case.parameters(), "tags": "mine"}])
    kept.load_state_dict(noted.state_dict(), hyperparams={"tags": "current"})
    assert kept.param_groups[0]["tags"] == "mine"


@each(lambda case: case.many_groups and not case.shares, among=RULES)
def test_notes_in_a_group_that_is_added_or_changed(case: Case) -> None:
    first, *rest = case.parameters()
    optimizer, twin = case.make([first]), case.make()
    optimizer.add_param_group({"params": rest, **own_notes(case)})
    optimizer.param_groups[0]["rank"] = torch.ones(2)
    case.advance(optimizer, 2)
    case.advance(twin, 2)
    assert_same([p.detach() for p in flat(optimizer)], [p.detach() for p in flat(twin)])


@each(among=RULES)
def test_torch_takes_the_same_notes(case: Case) -> None:
    """A checkpoint with notes goes to torch and comes back."""
    if case.torch_class is None:
        return
    ours = case.make([{"params": case.parameters(), **own_notes(case)}])
    theirs = case.make_torch()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    again = case.make()
    again.load_state_dict(theirs.state_dict())
    assert again.param_groups[0].items() >= own_notes(case).items()


@each(among=RULES)
@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_keys_are_refused_everywhere(case: Case, key: str) -> None:
    meant = MISSPELT[key]
    if meant not in case.rule.fields:
        assert misspelt(key, case.rule.fields) is None
        return
    message = rf"^{case.name} has no hyper-parameter '{key}' \(parameter group 0\)\. Did you mean '{meant}'\?"
    optimizer = case.make()
    kept = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        case.rule([{"params": case.parameters(), key: 0.5}])
    if case.many_groups:
        with pytest.raises(ValueError, match=message.replace("group 0", "group 1")):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], key: 0.5})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = 0.5
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), kept)
    assert optimizer.load_state_dict(saved, strict=False).unexpected
    case.advance(optimizer)
    optimizer.param_groups[0][key] = 0.5
    before = [p.detach().clone() for p in flat(optimizer)]
    with pytest.raises(ValueError, match=message):
        case.advance(optimizer)
    assert_same([p.detach() for p in flat(optimizer)], before)


def test_no_hyper_parameter_of_one_rule_is_a_misspelling_in_another() -> None:
    """torch accepts `momentum` in a group of Adam; someone who uses both rules may keep it there."""
    names = {name for rule in steprule.catalogue().values() for name in rule.fields}
    for rule in steprule.catalogue().values():
        assert not {name: misspelt(name, rule.fields) for name in names - set(rule.fields)}.items() & {
            (name, near) for name in names for near in rule.fields
        }


class SAM(torch.optim.Optimizer):
    """The wrapper of davda54/sam, which passes its own groups to the rule inside."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **kwargs: Any):
        super().__init__(params, dict(rho=rho, adaptive=False, **kwargs))
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=float(group["rho"] / (norm + 1e-12)))
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_sharpness_aware_minimization_around_our_rule_is_that_around_torchs(name: str) -> None:
    runs: list[Any] = []
    for module in (steprule, torch.optim):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = SAM(model.parameters(), getattr(module, name), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

        def closure(model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            (model(torch.ones(4, 3)) ** 2).sum().backward()

        for _ in range(3):
            closure()
            optimizer.step(closure)
            schedule.step()
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*runs)


# Weight decay where there is none

NO_DECAY = [case for case in RULES if "weight_decay" not in case.rule.fields]
ZEROS = [0, 0.0, -0.0, torch.tensor(0.0), False, None]


@each(among=NO_DECAY)
@pytest.mark.parametrize("zero", ZEROS, ids=repr)
def test_a_rule_without_decay_takes_a_zero(case: Case, zero: Any) -> None:
    """transformers.Trainer puts it into the groups of whatever optimizer it is given."""
    optimizer, twin = case.make([{"params": case.parameters(), "weight_decay": zero}]), case.make()
    case.advance(optimizer, 2)
    case.advance(twin, 2)
    assert_same_run(optimizer, twin)
    loaded = case.make()
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.param_groups[0]["weight_decay"] == zero


@each(among=NO_DECAY)
def test_a_rule_without_decay_refuses_any_other(case: Case) -> None:
    message = rf"^{case.name} has no weight decay: weight_decay = 0.1 would do nothing \(parameter group 0\)"
    with pytest.raises(ValueError, match=message):
        case.rule([{"params": case.parameters(), "weight_decay": 0.1}])
    with pytest.raises(TypeError, match="no hyper-parameter 'weight_decay'"):
        case.rule(case.parameters(), weight_decay=0.0)
    optimizer = case.make()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


# Options and state of other versions


@each(lambda case: case.torch_class is not None, among=RULES)
@pytest.mark.parametrize("default", [False, None, 0.25, "fast"], ids=repr)
def test_an_option_that_only_a_newer_torch_has(case: Case, default: Any, monkeypatch: Any) -> None:
    class Newer:
        def __init__(self, params: Any, lr: float = 0.1, *, warp: Any = default):
            pass

    real = inspect.signature(case.torch_class)
    arguments = [*real.parameters.values(), inspect.signature(Newer).parameters["warp"]]
    Newer.__signature__ = real.replace(parameters=arguments)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.optim, case.name, Newer)
    optimizer = case.make()
    for neutral in (False, None, default):
        saved = optimizer.state_dict()
        saved["param_groups"][0]["warp"] = neutral
        loaded = case.make()
        report = loaded.load_state_dict(saved)
        assert report.notes == (f"warp = {neutral!r} (group 0)",)
        assert f"warp = {neutral!r}" in str(report)
        assert loaded.state_dict()["param_groups"][0]["warp"] == neutral
    saved["param_groups"][0]["warp"] = 2.0
    kept = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"^{case.name}.*warp = 2.0 is an option of torch's.*strict=False"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), kept)
    report = optimizer.load_state_dict(saved, strict=False)
    assert report.unexpected == ("hyper-parameter 'warp' (group 0)",)
    assert "warp" not in optimizer.param_groups[0]


@each(lambda case: not case.closure, among=RULES)
@pytest.mark.parametrize("neutral", [None, False])
def test_state_of_a_newer_version_that_says_nothing(case: Case, neutral: Any) -> None:
    optimizer, twin = case.make(), case.make()
    case.advance(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    if not saved["state"].get(0):
        return
    saved["state"][0]["drift"] = neutral
    report = twin.load_state_dict(saved)
    assert report.unexpected == ("parameter 0: drift",)
    assert "drift" not in twin.state[flat(twin)[0]]
    saved["state"][0]["drift"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"'drift'.*strict=False"):
        twin.load_state_dict(saved)


@pytest.mark.parametrize("key", ["maximise", "amsgrd", "weigth_decay"])
@pytest.mark.parametrize("value", [False, None])
def test_a_misspelt_key_of_a_checkpoint_that_says_nothing_is_left_out(key: str, value: Any) -> None:
    donor, optimizer = (steprule.AdamW([torch.nn.Parameter(torch.ones(2))]) for _ in range(2))
    saved = donor.state_dict()
    saved["param_groups"][0][key] = value
    report = optimizer.load_state_dict(saved)
    assert report.unexpected == (f"hyper-parameter '{key}' (group 0)",)
    assert key not in optimizer.param_groups[0]
    saved["param_groups"][0][key] = 0.5
    with pytest.raises(ValueError, match=f"no hyper-parameter '{key}'"):
        optimizer.load_state_dict(saved)
