"""Groups with rules of their own: the same as several optimizers, in one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from rules import RULES, assert_same, assert_same_run, by_lines, estimate_curvature, flat, numbers, sums_of
from test_companions import SCHEDULERS, STEPS, advance_schedule
from test_modifiers import RUNNERS
from torch import nn

import steprule
from steprule import Elementwise, hyper, slot
from steprule.declare import Matrix
from steprule.words import norm

MATRICES, VECTORS = ((4, 3), (6, 2)), ((5,), (3, 4))
# Those that step dense gradients by themselves.
GUESTS = [x for x in RULES if x not in ("LBFGS", "SparseAdam", "Sophia")]


def parameters() -> tuple[list[Any], list[Any]]:
    first, second = (
        [nn.Parameter(numbers(shape, torch.float32, seed=10 * i + j)) for j, shape in enumerate(shapes)]
        for i, shapes in enumerate((MATRICES, VECTORS))
    )
    return first, second


def give(params: list[Any], step: int) -> None:
    for place, param in enumerate(params):
        param.grad = numbers(tuple(param.shape), param.dtype, seed=1000 * step + place)


def advance(optimizer: Any, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for index, group in enumerate(optimizer.param_groups):
            give(group["params"], 100 * step + 10 * int(group.get("name", index)))
        estimate_curvature(optimizer)
        optimizer.step()


def mixed(rule: Any = steprule.Muon, runner: str = "loop", **options: Any) -> Any:
    """AdamW with a group that has another rule."""
    first, second = parameters()
    flags = RUNNERS[runner]
    theirs = {"rule": rule, **flags, **options}
    return steprule.AdamW([{"params": first, **theirs}, {"params": second}], **flags)


def named(*rules: Any, order: tuple[int, ...] = (0, 1), by_name: bool = True, **options: Any) -> Any:
    """AdamW with two groups, which have these rules; None leaves the rule out."""
    groups: list[dict[str, Any]] = []
    for i in order:
        params = parameters()[i]
        pairs = [(f"p{i}.{j}", p) for j, p in enumerate(params)] if by_name else params
        rule = {} if rules[i] is None else {"rule": rules[i]}
        groups.append({"params": pairs, "name": str(i), **rule})
    return steprule.AdamW(groups, **options)


# The same as several optimizers


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", GUESTS)
def test_two_rules_step_as_two_optimizers_do(name: str, runner: str) -> None:
    rule, flags = RULES[name], RUNNERS[runner]
    if runner == "lists" and by_lines(rule) and not rule.sums_as_torch:
        pytest.skip("lists have no rows and columns")
    together = mixed(rule, runner)
    first, second = parameters()
    apart = [rule(first, **flags), steprule.AdamW(second, **flags)]
    for step in range(3):
        advance(together, 1, first=step)
        for index, optimizer in enumerate(apart):
            give(flat(optimizer), 100 * step + 10 * index)
            estimate_curvature(optimizer)
            optimizer.step()
    assert_same([p.detach() for p in flat(together)], [p.detach() for x in apart for p in flat(x)])
    for group, other in zip(together.param_groups, apart, strict=True):
        for one, theirs in zip(group["params"], flat(other), strict=True):
            assert_same(dict(together.state[one]), dict(other.state[theirs]))
        for shared in (x for x in together.composition(group).slots.values() if x.shared):
            assert group[shared.key] == other.param_groups[0][shared.key]


@pytest.mark.parametrize("name", GUESTS)
def test_copies_and_reports(name: str) -> None:
    optimizer = mixed(RULES[name], "kernel")
    assert steprule.memory_report(optimizer).state_bytes > 0 or name == "SGD"
    advance(optimizer, 2)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    advance(optimizer, 2, first=2)
    for other in copies:
        advance(other, 2, first=2)
        assert_same_run(other, optimizer)
    assert f"group 0: {name}, 2 parameters" in optimizer.explain()
    assert "group 1: AdamW, 2 parameters" in optimizer.explain()
    assert f"rule: {name}" in repr(optimizer)
    rows = steprule.memory_report(optimizer).rows
    kept = {row.entry.removesuffix("_codes") for row in rows if row.group == 0} - {"step", "noise_key"}
    assert kept <= {x.key for x in RULES[name].slots.values()}
    assert {row.entry for row in rows if row.group == 1} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_every_group(name: str) -> None:
    first, second = parameters()
    options = {"lr": 0.1, "momentum": 0.9}
    optimizer = steprule.SGD(
        [{"params": first, "rule": steprule.Muon, **options}, {"params": second}], **options
    )
    apart = steprule.Muon(parameters()[0], **options), steprule.SGD(parameters()[1], **options)
    schedule, *theirs = (SCHEDULERS[name](x) for x in (optimizer, *apart))
    seen: list[Any] = []
    for step in range(STEPS):
        settings = [[group[key] for key in options] for group in optimizer.param_groups]
        assert settings == [[x.param_groups[0][key] for key in options] for x in apart]
        seen.append(settings)
        advance(optimizer, 1, first=step)
        for index, other in enumerate(apart):
            give(flat(other), 100 * step + 10 * index)
            other.step()
        for x in (schedule, *theirs):
            advance_schedule(x, step)
    assert any(settings != seen[0] for settings in seen)
    assert_same([p.detach() for p in flat(optimizer)], [p.detach() for x in apart for p in flat(x)])


def test_a_gradient_scaler_unscales_and_skips_all_groups() -> None:
    optimizer, twin = mixed(), mixed()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    advance(twin, 3)
    for step in range(3):
        scaler.scale(torch.zeros(()))
        for index, group in enumerate(optimizer.param_groups):
            give(group["params"], 100 * step + 10 * index)
            for param in group["params"]:
                param.grad = param.grad * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
    assert_same_run(optimizer, twin)
    scaler.scale(torch.zeros(()))
    flat(optimizer)[-1].grad.view(-1)[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert_same_run(optimizer, twin)


# Checkpoints


@pytest.mark.parametrize("name", GUESTS)
def test_a_checkpoint_is_loaded_by_name_whatever_the_order_of_groups(name: str) -> None:
    one = named(RULES[name], None)
    advance(one, 3)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = named(RULES[name], None, order=(1, 0))
    with torch.no_grad():
        values = {n: p for group in one.param_groups for n, p in zip(*names_and_params(group), strict=True)}
        for group in other.param_groups:
            for label, param in zip(*names_and_params(group), strict=True):
                param.copy_(values[label])
    report = other.load_state_dict(torch.load(file, weights_only=True))
    assert report.matched_by == "name"
    assert nothing_to_report(report)
    for optimizer in (one, other):
        advance(optimizer, 2, first=3)
    first, second = other.param_groups[::-1]
    got = [p.detach() for p in (*first["params"], *second["params"])]
    if sums_of(RULES[name]) & {"group", "all"}:
        torch.testing.assert_close(got, [p.detach() for p in flat(one)])
    else:
        assert_same(got, [p.detach() for p in flat(one)])


def nothing_to_report(report: steprule.LoadReport) -> bool:
    return not any((report.missing, report.unexpected, report.hyperparameters, report.notes))


def names_and_params(group: dict[str, Any]) -> tuple[list[str], list[Any]]:
    return group["param_names"], group["params"]


def test_a_checkpoint_is_loaded_by_position() -> None:
    one, other = mixed(steprule.Lion), mixed(steprule.Lion)
    advance(one, 3)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert_same(other.state_dict(), one.state_dict())


def test_the_class_of_the_optimizer_is_not_in_the_checkpoint() -> None:
    one = named(steprule.Muon, None)
    advance(one, 2)
    (first, second) = (
        [(f"p{i}.{j}", p) for j, p in enumerate(params)] for i, params in enumerate(parameters())
    )
    other = steprule.Muon([{"params": first}, {"params": second, "rule": steprule.AdamW}])
    report = other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert nothing_to_report(report)
    assert_same(other.state_dict()["state"], one.state_dict()["state"])


ADAMW, LION, SGD = steprule.AdamW, steprule.Lion, steprule.SGD


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    ("saved", "here", "group", "both"),
    [
        ((SGD, None), (LION, None), 0, ("SGD", "Lion")),
        ((LION, None), (None, LION), 0, ("Lion", "AdamW")),
        ((None, None), (LION, None), 0, ("Adam or AdamW", "Lion")),
        ((None, None), (None, SGD), 1, ("Adam or AdamW", "SGD")),
        ((LION, None), (None, None), 0, ("Lion", "AdamW")),
        ((None, LION), (ADAMW, ADAMW), 1, ("Lion", "AdamW")),
    ],
)
def test_other_rules_are_refused_or_reported(
    saved: Any, here: Any, group: int, both: tuple[str, str], by_name: bool
) -> None:
    one, other = named(*saved, by_name=by_name), named(*here, by_name=by_name)
    advance(one, 2)
    advance(other, 1)
    before = copy.deepcopy(other.state_dict())
    told = f"parameter group {group} was saved with the rule {both[0]}, and now has {both[1]}"
    with pytest.raises(ValueError, match=told):
        other.load_state_dict(one.state_dict())
    assert_same(other.state_dict(), before)
    report = other.load_state_dict(one.state_dict(), strict=False)
    changed = {x.what: (x.saved, x.current, x.taken) for x in report.hyperparameters}
    assert changed[f"the rule (group {group})"] == (*both, "current")
    # Nothing of one rule gets into the other, even under the same key.
    param = other.param_groups[group]["params"][0]
    assert not other.state.get(param)
    label = f"p{group}.0" if by_name else f"parameter {2 * group}"
    wanted = {f"{label}: {key}" for key in one.state[one.param_groups[group]["params"][0]]} - {f"{label}: step"}
    assert wanted <= set(report.unexpected)
    assert not report.notes
    fresh = named(*here, by_name=by_name).param_groups[group]
    assert {k: v for k, v in other.param_groups[group].items() if k != "params"} == {
        k: v for k, v in fresh.items() if k != "params"
    }
    advance(other, 1)


def test_a_checkpoint_of_torch_is_loaded_where_the_rule_is_the_same() -> None:
    pairs = [[(f"p{i}.{j}", p) for j, p in enumerate(params)] for i, params in enumerate(parameters())]
    theirs = torch.optim.AdamW([{"params": x} for x in pairs])
    advance(theirs, 2)
    ours = named(steprule.Muon, None)
    with pytest.raises(ValueError, match="saved with the rule Adam or AdamW, and now has Muon"):
        ours.load_state_dict(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=False)
    first, second = ours.param_groups
    assert not ours.state.get(first["params"][0])
    for mine, param in zip(second["params"], theirs.param_groups[1]["params"], strict=True):
        assert_same(ours.state[mine]["exp_avg"], theirs.state[param]["exp_avg"])


def test_an_optimizer_with_one_rule_writes_what_torch_writes() -> None:
    assert not any("rule" in group for group in named(None, None).state_dict()["param_groups"])
    written = named(LION, None).state_dict()["param_groups"]
    assert [group["rule"] for group in written] == ["Lion", "AdamW"]


# Groups


class Named(Elementwise):
    lr: float = hyper(default=0.1, at_least=0)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return -h.lr * g


class Second:
    """Where a class of the same name is."""

    class Named(Elementwise):
        lr: float = hyper(default=0.1, at_least=0)

        @staticmethod
        def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
            return -h.lr * g


def group_of(**options: Any) -> dict[str, Any]:
    return {"params": [nn.Parameter(torch.ones(3, 2))], **options}


def test_groups_are_added_by_class_by_name_and_without_a_rule() -> None:
    optimizer = mixed(LION)
    advance(optimizer, 2)
    for rule in ({}, {"rule": None}, {"rule": "Lion"}, {"rule": "AdamW"}, {"rule": Named}, {"rule": "Named"}):
        optimizer.add_param_group(group_of(**rule))
    rules = [optimizer.rule_of(group).__name__ for group in optimizer.param_groups]
    assert rules == ["Lion", "AdamW", "AdamW", "AdamW", "Lion", "AdamW", "Named", "Named"]
    assert optimizer.param_groups[4]["lr"] == LION.fields["lr"].default
    assert "betas" not in optimizer.param_groups[6]
    advance(optimizer, 1)
    assert_same(optimizer.param_groups[4]["params"][0].detach().shape, torch.Size((3, 2)))
    assert "exp_avg_sq" not in optimizer.state[optimizer.param_groups[4]["params"][0]]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (3, TypeError, "rule = 3 .*is not a rule. Give a class, .*that this optimizer has: AdamW, Lion"),
        ("Named", TypeError, "'Named' .*is not a rule"),
        (torch.optim.SGD, TypeError, "is not a rule"),
        (steprule.LBFGS, TypeError, "is not a rule"),
        (steprule.GenericAdaptiveOptimizer, TypeError, "is not a rule"),
        (Elementwise, TypeError, "is not a rule"),
        (Matrix, TypeError, "is not a rule"),
        (steprule.EMA, TypeError, "is not a rule"),
        (steprule.Sophia, TypeError, "needs update_hessian, .*Build Sophia from all groups"),
        (steprule.Muon, ValueError, r"Muon only supports 2D parameters, .*\(2,\) \(parameter group 2\)"),
    ],
)
def test_a_wrong_rule_is_refused_and_nothing_is_added(rule: Any, error: type[Exception], message: str) -> None:
    optimizer = mixed(LION)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rule": rule})
    assert len(optimizer.param_groups) == 2
    assert set(optimizer.parts.rules) == {"AdamW", "Lion"}
    advance(optimizer, 1)


def test_two_classes_of_one_name_are_refused() -> None:
    optimizer = mixed(Named)
    with pytest.raises(ValueError, match="two different classes with the name Named"):
        optimizer.add_param_group(group_of(rule=Second.Named))
    # One that was refused for another reason leaves its name free.
    optimizer = mixed(LION)
    with pytest.raises(ValueError, match="lr = -1"):
        optimizer.add_param_group(group_of(rule=Named, lr=-1))
    optimizer.add_param_group(group_of(rule=Second.Named))
    advance(optimizer, 1)


class ByHand(steprule.GenericAdaptiveOptimizer):
    def step_param(self, state: Any, group: Any, grad: Any, param: Any) -> None:
        param.sub_(grad)


@pytest.mark.parametrize("make", [steprule.LBFGS, ByHand])
def test_a_step_that_is_not_declared_has_no_other_beside_it(make: Any) -> None:
    with pytest.raises(TypeError, match=f"{make.__name__} steps every parameter in its own way"):
        make([group_of(rule=SGD)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"^SGD: lr = -1.0, must be at least 0 \(parameter group 0\)"),
        ({"momentum": "much"}, TypeError, r"^SGD: momentum"),
        ({"momentm": 0.9}, ValueError, r"^SGD has no hyper-parameter 'momentm' .*'momentum'"),
        ({"nesterov": True}, ValueError, r"^SGD|^Nesterov"),
        ({"state_dtype": {"exp_avg": "bf16"}}, ValueError, r"^SGD: state_dtype names 'exp_avg'"),
    ],
)
def test_values_are_checked_as_those_of_the_groups_rule(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        steprule.AdamW([group_of(rule=SGD, **options)])


def test_options_of_single_groups() -> None:
    """Decay, direction and storage are those of the group; the constructor's are for its own rule."""
    (a, b), (_, d) = parameters()
    c = nn.Parameter(numbers((100, 60), torch.float32, seed=5))
    groups: list[dict[str, Any]] = [
        {"params": [a], "rule": SGD, "lr": 0.1, "maximize": True},
        {"params": [b], "rule": SGD, "lr": 0.1, "weight_decay": steprule.WeightDecay(0.5, absolute=True)},
        {"params": [c], "state_dtype": "int8"},
        {"params": [d], "rule": LION, "state_dtype": "bf16", "weight_decay": 0.0},
    ]
    before = [p.detach().clone() for p in (a, b)]
    optimizer = steprule.AdamW(groups, weight_decay=0.3)
    advance(optimizer, 1)
    torch.testing.assert_close(a.detach(), before[0] + 0.1 * a.grad)
    torch.testing.assert_close(b.detach(), 0.5 * before[1] - 0.1 * b.grad)
    assert "exp_avg_codes" in optimizer.state[c]
    assert optimizer.state[d]["exp_avg"].dtype is torch.bfloat16
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.5, 0.3, 0.0]
    advance(optimizer, 2, first=1)


# Sums over all parameters


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", ["Muon", "Adafactor", "SGD", "Prodigy", "DoG"])
def test_gradients_are_clipped_together_whatever_the_rules(name: str, runner: str) -> None:
    rule, flags = RULES[name], RUNNERS[runner]
    if runner == "lists" and by_lines(rule) and not rule.sums_as_torch:
        pytest.skip("lists have no rows and columns")
    clip = [steprule.GlobalNormClip(0.5)]
    first, second = parameters()
    theirs = flags
    together = steprule.AdamW(
        [{"params": first, "rule": rule, "modifiers": clip, **theirs}, {"params": second}],
        modifiers=clip,
        **flags,
    )
    first, second = parameters()
    apart = [rule(first, **theirs), steprule.AdamW(second, **flags)]
    for step in range(3):
        for index, optimizer in enumerate(apart):
            give(flat(optimizer), 100 * step + 10 * index)
        total = nn.utils.clip_grad_norm_([*first, *second], 0.5)
        advance(together, 1, first=step)
        assert together.gradient_norm == pytest.approx(float(total), rel=1e-6)
        for optimizer in apart:
            optimizer.step()
    torch.testing.assert_close(
        [p.detach() for p in flat(together)], [p.detach() for p in (*first, *second)], rtol=1e-4, atol=1e-6
    )


class Longest(Elementwise):
    """A slot for all parameters of this rule."""

    lr: float = hyper(default=0.1, at_least=0)
    r = slot("longest", per="all")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        s.r = norm(g, over="all")
        return -h.lr * g / s.r


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_slot_for_all_parameters_is_for_those_of_its_rule(runner: str) -> None:
    optimizer = mixed(Longest, runner)
    start = [p.detach().clone() for p in flat(optimizer)]
    advance(optimizer, 1)
    first, second = optimizer.param_groups
    wanted = torch.cat([p.grad.flatten() for p in first["params"]]).double().norm()
    assert first["longest"] == pytest.approx(float(wanted), rel=1e-6)
    assert "longest" not in second
    param = first["params"][0]
    torch.testing.assert_close(param.detach(), start[0] - 0.1 * param.grad / wanted.float())


def test_what_all_groups_must_agree_on_is_about_groups_of_that_rule() -> None:
    """Prodigy makes its distance with lr and betas; those of other rules are their own."""
    first, second = parameters()
    groups = [{"params": second, "lr": 0.1, "betas": (0.8, 0.9)}, {"params": first, "rule": steprule.Prodigy}]
    advance(steprule.AdamW(groups), 2)
    groups[1] = {"params": first[:1], "rule": steprule.Prodigy}
    groups.append({"params": first[1:], "rule": steprule.Prodigy, "lr": 0.5})
    with pytest.raises(ValueError, match="Give all groups the same value"):
        advance(steprule.AdamW(groups), 1)


def test_sophia_estimates_the_curvature_of_its_own_groups() -> None:
    first, second = parameters()
    optimizer = steprule.Sophia([{"params": second}, {"params": first, "rule": SGD}])
    alone = steprule.Sophia(parameters()[1])
    for params in (first, second, flat(alone)):
        give(params, 3)
    for x in (optimizer, alone):
        x.update_hessian(4)
        x.step()
    assert_same([p.detach() for p in second], [p.detach() for p in flat(alone)])
    assert not optimizer.state[first[0]]


def test_what_any_rule_takes_comes_from_the_constructor() -> None:
    first, second = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(4))
    groups = [{"params": [first], "rule": steprule.Muon}, {"params": [second]}]
    options = {"modifiers": [steprule.GlobalNormClip(0.5)], "maximize": True, "nonfinite": "skip"}
    optimizer = steprule.AdamW(groups, lr=0.5, **options)
    of_muon, own = optimizer.param_groups
    for key in ("modifiers", "global_norm_clip.max_norm", "maximize", "nonfinite"):
        assert of_muon[key] == own[key]
    assert of_muon["lr"] == 1e-3
    first.grad, second.grad = torch.ones(3, 3), torch.ones(4)
    optimizer.step()
    assert optimizer.gradient_norm == pytest.approx(13**0.5)
    with pytest.raises(ValueError, match="EMA does not go with ScheduleFreeSGD"):
        steprule.AdamW([{"params": [first], "rule": steprule.ScheduleFreeSGD}], modifiers=[steprule.EMA()])
    without = [{"params": [first], "rule": steprule.Muon, "modifiers": None}, {"params": [second]}]
    assert "ema.decay" not in steprule.AdamW(without, modifiers=[steprule.EMA()]).param_groups[0]
