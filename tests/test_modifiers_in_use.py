"""Modifiers in use: runners, checkpoints, averages, metrics, groups, refusals, and those of users."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from rules import (
    assert_same,
    flat,
    numbers,
)
from test_modifiers import MODIFIERS, OPTIONS, RUNNERS
from torch import nn

import steprule
from steprule import hyper
from steprule.declare import Modifier
from steprule.words import larger, mean, where

# One optimizer with modifiers, in float32 and in 16 bits


EVERYTHING = ["GlobalNormClip", "Cautious", "EMA"]
WEIGHTS = ["ToStart", "RadialBrake", "OuterNesterov", "Noise"]
GRADIENTS = ["ValueClip", "MARSCorrection", "OrthoGrad", "NormClip", "GrokFast", "Grams"]
ROWS = ["AdaptiveClip", "Centralize", "GlobalNormClip"]


def optimizer_with(given: list[str], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    shapes = ((300, 4), (17,), (), (5, 7))
    params = [nn.Parameter(numbers(shape, dtype, seed=i)) for i, shape in enumerate(shapes)]
    modifiers = [MODIFIERS[x](**OPTIONS.get(x, {})) for x in given]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    options = {"weight_decay": 0.0} | options if "Hyperball" in given else options
    return steprule.AdamW(groups, lr=0.01, modifiers=modifiers, **options)


def advance(optimizer: Any, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for place, param in enumerate(flat(optimizer)):
            param.grad = numbers(tuple(param.shape), param.dtype, seed=1000 * step + place)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "given",
    [
        EVERYTHING,
        ["UpdateClip", "Lookahead"],
        ["TrustRatio", "Average"],
        ["Hyperball"],
        GRADIENTS,
        WEIGHTS,
        ROWS,
    ],
)
def test_every_runner_comes_to_the_same(given: list[str], dtype: torch.dtype) -> None:
    ends: dict[str, Any] = {}
    for runner, flags in RUNNERS.items():
        if runner == "lists" and given is ROWS:
            continue
        optimizer = optimizer_with(given, dtype, **flags)
        advance(optimizer, 5)
        ends[runner] = [p.detach().double() for p in flat(optimizer)]
    assert_same(ends.get("lists", ends["loop"]), ends["loop"])
    close = 1e-6 if dtype is torch.float32 else 1e-2
    for mine, wanted in zip(ends["kernel"], ends["loop"], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=close, atol=close)


@pytest.mark.parametrize("storage", [{}, {"state_dtype": "int8"}, {"state_dtype": "bf16"}])
@pytest.mark.parametrize("low", [None, "kahan", "master", "stochastic"])
def test_a_checkpoint_goes_on_with_the_same_bits(storage: dict[str, Any], low: str | None) -> None:
    options = storage if low is None else storage | {"low_precision": low}
    dtype = torch.float32 if low is None else torch.bfloat16
    one, other = (optimizer_with(EVERYTHING, dtype, **options) for _ in range(2))
    advance(one, 3)
    file = io.BytesIO()
    torch.save([one.state_dict(), [p.detach() for p in flat(one)]], file)
    file.seek(0)
    state, params = torch.load(file, weights_only=True)
    other.load_state_dict(state)
    with torch.no_grad():
        for param, value in zip(flat(other), params, strict=True):
            param.copy_(value)
    for optimizer in (one, other):
        advance(optimizer, 3, first=3)
    assert_same([p.detach() for p in flat(other)], [p.detach() for p in flat(one)])
    assert_same(other.state_dict(), one.state_dict())


@pytest.mark.parametrize(
    ("runner", "low"),
    [("loop", None), ("lists", None), ("kernel", None), ("kernel", "kahan"), ("loop", "master")],
)
def test_the_training_weights_come_back_bit_for_bit(runner: str, low: str | None) -> None:
    dtype = torch.float32 if low is None else torch.bfloat16
    flags = {"fused": None} if runner == "kernel" else RUNNERS[runner]
    optimizer, undisturbed = (
        optimizer_with(["EMA"], dtype, **flags, **({"low_precision": low} if low else {})) for _ in range(2)
    )
    for step in range(4):
        advance(optimizer, 1, first=step)
        before = [p.detach().clone() for p in flat(optimizer)]
        for _ in range(2):
            optimizer.eval()
        assert not all(map(torch.equal, before, flat(optimizer))) or step == 0
        with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
            optimizer.step()
        for _ in range(2):
            optimizer.train()
        assert_same([p.detach() for p in flat(optimizer)], before)
    advance(undisturbed, 4)
    assert_same(optimizer.state_dict()["state"], undisturbed.state_dict()["state"])


def test_the_mode_is_in_the_checkpoint() -> None:
    one, other = (optimizer_with(["EMA"]) for _ in range(2))
    advance(one, 3)
    training = [p.detach().clone() for p in flat(one)]
    one.eval()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    with pytest.raises(RuntimeError, match="evaluate with"):
        advance(other, 1)
    other.train()
    assert_same([p.detach() for p in flat(other)], training)
    assert not any("training_weights" in state for state in other.state.values())


def test_the_norm_is_that_of_all_gradients_before_clipping() -> None:
    optimizer = optimizer_with(["GlobalNormClip"])
    with pytest.raises(RuntimeError, match="GlobalNormClip"):
        _ = optimizer_with([]).gradient_norm
    advance(optimizer, 1)
    wanted = torch.linalg.vector_norm(torch.cat([p.grad.flatten().double() for p in flat(optimizer)]))
    assert optimizer.gradient_norm == pytest.approx(float(wanted), rel=1e-12)


def test_clipping_is_what_torch_does_before_the_step() -> None:
    ours, theirs = optimizer_with(["GlobalNormClip"]), optimizer_with([])
    for step in range(5):
        for place, (one, other) in enumerate(zip(flat(ours), flat(theirs), strict=True)):
            one.grad = numbers(tuple(one.shape), one.dtype, seed=100 * step + place)
            other.grad = one.grad.clone()
        nn.utils.clip_grad_norm_(flat(theirs), 4.0)
        ours.step()
        theirs.step()
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("clip", [steprule.GlobalNormClip, steprule.NormClip])
def test_gradients_of_zero_stay_zero_under_every_limit(clip: Any, runner: str) -> None:
    with pytest.raises(ValueError, match=rf"^{clip.__name__}: max_norm = 0, must be above 0\.$"):
        clip(0)
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    steprule.SGD([param], lr=1.0, modifiers=[clip(1e-300)], **RUNNERS[runner]).step()
    assert_same(param.detach(), torch.ones(3))


@pytest.mark.parametrize("runner", RUNNERS)
def test_metrics_are_the_norms_of_the_last_step(runner: str) -> None:
    optimizer = optimizer_with(["Metrics", "GlobalNormClip", "EMA"], torch.float64, **RUNNERS[runner])
    advance(optimizer, 2)
    before = [p.detach().clone() for p in flat(optimizer)]
    advance(optimizer, 1, first=2)
    of_each = optimizer.metrics("param")
    norm = torch.linalg.vector_norm
    for name, param, old in zip(of_each, flat(optimizer), before, strict=True):
        wanted = [norm(param.grad), norm(param.detach() - old), norm(param.detach())]
        found = [of_each[name][key] for key in ("gradient_norm", "update_norm", "weight_norm")]
        assert found == pytest.approx([float(x) for x in wanted], rel=1e-6)
    whole = optimizer.metrics()
    assert whole["gradient_norm"] == pytest.approx(optimizer.gradient_norm, rel=1e-6)
    assert whole["update_to_weight"] == pytest.approx(whole["update_norm"] / whole["weight_norm"])
    assert [sorted(x) for x in optimizer.metrics("group")] == [sorted(whole)] * 2
    with pytest.raises(ValueError, match="level = 'tensor', must be one of 'all', 'group', 'param'"):
        optimizer.metrics("tensor")
    with pytest.raises(RuntimeError, match=r"modifiers=\[Metrics\(\)\]"):
        optimizer_with([]).metrics()


@pytest.mark.parametrize("runner", RUNNERS)
def test_metrics_of_every_third_step_cost_nothing_at_the_others(
    runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    if RUNNERS[runner].get("fused"):
        from steprule.engine.runners.kernels import fused

        real = fused.Plan
        monkeypatch.setattr(fused, "Plan", lambda *x: made.append(x[2]) or real(*x))

    def make(*modifiers: Any) -> Any:
        params = [nn.Parameter(numbers(shape, torch.float32, 7)) for shape in ((40, 3), (5,))]
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        own = [*modifiers, steprule.GlobalNormClip(0.5)]
        return steprule.AdamW(groups, modifiers=own, nonfinite="skip", **RUNNERS[runner])

    measured, plain = make(steprule.Metrics(every=3)), make()
    norms: list[float] = []
    for number in range(8):
        for optimizer in (measured, plain):
            advance(optimizer, 1, first=number)
        assert_same([p.detach() for p in flat(measured)], [p.detach() for p in flat(plain)])
        norms.append(measured.gradient_norm)
        wanted = norms[number - number % 3]
        assert measured.metrics()["gradient_norm"] == pytest.approx(wanted, rel=1e-6)
    programs = [plain.program(group) for group in plain.param_groups]
    if made:
        # A plan for each group and outcome, and those of steps that measure nothing are the others' own.
        assert len(made) == 6
        assert sum(any(program is x for x in programs) for program in made) == 4
    flat(measured)[0].grad.fill_(torch.nan)
    measured.step()
    assert measured.param_groups[1]["metrics.steps"] == 8, "a step that is skipped does not count"

    resumed = make(steprule.Metrics(every=3))
    resumed.load_state_dict(copy.deepcopy(measured.state_dict()))
    for number in (8, 9):
        advance(resumed, 1, first=number)
        due = number == 9
        assert (resumed.metrics()["gradient_norm"] == pytest.approx(resumed.gradient_norm, rel=1e-6)) == due
    resumed.param_groups[0]["metrics.every"] = resumed.param_groups[1]["metrics.every"] = 1
    advance(resumed, 1, first=10)
    assert resumed.metrics()["gradient_norm"] == pytest.approx(resumed.gradient_norm, rel=1e-6)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("modifier", [steprule.Lookahead(3), steprule.OuterNesterov(3)])
def test_between_the_steps_that_have_it_a_step_is_that_of_the_rule(modifier: Any, runner: str) -> None:
    def make(*modifiers: Any) -> Any:
        params = [nn.Parameter(numbers(shape, torch.float32, 7)) for shape in ((40, 3), (5,))]
        return steprule.AdamW(params, modifiers=modifiers, **RUNNERS[runner])

    with_it, plain = make(modifier), make()
    started = [p.detach().clone() for p in flat(with_it)]
    for number in range(2):
        for optimizer in (with_it, plain):
            advance(optimizer, 1, first=number)
        assert_same([p.detach() for p in flat(with_it)], [p.detach() for p in flat(plain)])
    kept = [with_it.state[p][f"{type(modifier).name}.slow"] for p in flat(with_it)]
    assert_same(kept, started)
    for optimizer in (with_it, plain):
        advance(optimizer, 1, first=2)
    assert_same(kept, [p.detach() for p in flat(with_it)])
    assert not any(torch.equal(*pair) for pair in zip(flat(with_it), flat(plain), strict=True))


def test_a_cuda_graph_cannot_hold_a_step_that_differs_from_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_with(["Lookahead"])
    before = [p.detach().clone() for p in flat(optimizer)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"Lookahead acts in one of \d+ steps only, and the host decides in which"
    ):
        advance(optimizer, 1)
    assert_same([p.detach() for p in flat(optimizer)], before)


def test_modifiers_that_rest_change_no_rounding_of_a_kernel() -> None:
    """Their slots are in the state, and lie before the rule's own in the alphabet."""
    made: list[Any] = []
    for runner in ("loop", "kernel"):
        torch.manual_seed(0)
        param = nn.Parameter(numbers((300,), torch.float32, 7))
        modifiers = [steprule.OuterNesterov(every=2)]
        optimizer = steprule.RMSprop([param], modifiers=modifiers, state_dtype="bf16", **RUNNERS[runner])
        seen: list[Any] = []
        for number in range(4):
            advance(optimizer, 1, first=number)
            seen.append(optimizer.state[param]["square_avg"].clone())
        made.append(seen)
    assert_same(*made)


@pytest.mark.parametrize("runner", RUNNERS)
def test_numbers_per_tensor_out_of_range_are_infinite(runner: str) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = steprule.NovoGrad(params, **RUNNERS[runner])
    for last in (1.0, 1e30, 1.0):
        for param, size in zip(params, (1.0, last), strict=True):
            param.grad = torch.full((3,), size)
        optimizer.step()
    first, second = (optimizer.state[p]["exp_avg_sq"].item() for p in params)
    assert first == pytest.approx(3.0)
    assert second == torch.inf


def test_estimates_are_not_counted_as_steps_to_measure() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = steprule.AdaHessian([param], modifiers=[steprule.Metrics(every=2)])
    param.grad = torch.ones(3)
    for _ in range(3):
        optimizer.update_hessian({param: torch.ones(3)})
    optimizer.step()
    assert optimizer.param_groups[0]["metrics.steps"] == 1
    first = optimizer.metrics()
    optimizer.update_hessian({param: torch.ones(3)})
    optimizer.step()
    assert optimizer.metrics() == first


@pytest.mark.parametrize("rule", [steprule.Muon, steprule.LAMB])
def test_metrics_rest_on_other_kinds_of_rules(rule: Any) -> None:
    weights: list[Any] = []
    for modifiers in ([steprule.Metrics(every=2)], []):
        param = nn.Parameter(numbers((6, 4), torch.float32, 7))
        optimizer = rule([param], lr=0.01, modifiers=modifiers)
        found = []
        for number in range(4):
            param.grad = numbers((6, 4), torch.float32, number)
            optimizer.step()
            found += [optimizer.metrics()["gradient_norm"]] if modifiers else []
        assert not found or (found[0] == found[1] != found[2] == found[3])
        weights.append(param.detach())
    assert_same(weights[0], weights[1])


# Groups


def test_a_group_has_its_own_list() -> None:
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [first], "modifiers": [steprule.Cautious(0.5)]}, {"params": [second]}]
    optimizer = steprule.AdamW(groups, modifiers=[steprule.EMA(0.9)])
    own, default = optimizer.param_groups
    assert own["modifiers"] == ("cautious",)
    assert own["cautious.floor"] == 0.5
    assert "ema.decay" not in own
    assert default["modifiers"] == ("ema",)
    assert default["ema.decay"] == 0.9
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "modifiers": None})
    assert "ema.decay" not in optimizer.param_groups[2]
    optimizer.init_state()
    assert set(optimizer.state[first]) == {"step", "exp_avg", "exp_avg_sq"}
    assert {"ema.average", "ema.steps"} < set(optimizer.state[second])


def test_hyper_parameters_of_modifiers_follow_the_group() -> None:
    optimizer = steprule.SGD([nn.Parameter(torch.ones(4))], lr=1.0, modifiers=[steprule.GlobalNormClip(1.0)])
    (param,) = flat(optimizer)
    param.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert_same(param.detach(), torch.full((4,), 0.5))
    optimizer.param_groups[0]["global_norm_clip.max_norm"] = 2.0
    optimizer.step()
    assert_same(param.detach(), torch.full((4,), -0.5))


@pytest.mark.parametrize(
    ("modifiers", "error", "message"),
    [
        ([3], TypeError, "3 is not a modifier"),
        ([steprule.Grams(), steprule.Cautious()], ValueError, "Cautious does not go with Grams"),
        ([steprule.OuterNesterov(), steprule.Lookahead()], ValueError, "both decide where the weights"),
        ([steprule.ScheduleFree(), steprule.OuterNesterov()], ValueError, "both decide where the weights"),
        (
            [steprule.Hyperball(), steprule.OuterNesterov()],
            ValueError,
            "OuterNesterov does not go with Hyperball",
        ),
        ([steprule.Hyperball(), steprule.RadialBrake()], ValueError, "RadialBrake does not go with Hyperball"),
        ([steprule.EMA(), steprule.EMA()], ValueError, "EMA is listed twice"),
        ([steprule.EMA(), steprule.Average()], ValueError, "Average does not go with EMA"),
        ([steprule.Hyperball(), steprule.TrustRatio()], ValueError, "both decide how long"),
        (["emma"], TypeError, "'emma' is not a modifier"),
        ([steprule.Hyperball()], ValueError, "Hyperball does not go with weight decay: .*Set weight_decay=0"),
    ],
)
def test_what_makes_no_sense_is_refused(modifiers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        steprule.AdamW([nn.Parameter(torch.ones(2))], modifiers=modifiers)


class OwnLamb(steprule.LAMB):
    """A rule that is made from another one."""


@pytest.mark.parametrize(
    ("rule", "modifier", "message"),
    [
        (steprule.LAMB, steprule.TrustRatio, "TrustRatio does not go with LAMB"),
        (OwnLamb, steprule.TrustRatio, "TrustRatio does not go with LAMB"),
        (steprule.LARS, steprule.TrustRatio, "TrustRatio does not go with LARS"),
        (steprule.Adafactor, steprule.UpdateClip, "UpdateClip does not go with Adafactor"),
        (steprule.ScheduleFreeAdamW, steprule.Lookahead, "Lookahead does not go with ScheduleFreeAdamW"),
        (steprule.ScheduleFreeSGD, steprule.Hyperball, "Hyperball does not go with ScheduleFreeSGD"),
        (steprule.ScheduleFreeRAdam, steprule.RadialBrake, "RadialBrake does not go with ScheduleFreeRAdam"),
        (steprule.ScheduleFreeSGD, steprule.OuterNesterov, "OuterNesterov does not go with ScheduleFreeSGD"),
        (steprule.StableAdamW, steprule.UpdateClip, "UpdateClip does not go with StableAdamW"),
        *((steprule.SparseAdam, x, "does not go with SparseAdam.*whole tensors") for x in MODIFIERS.values()),
    ],
)
def test_rules_that_a_modifier_makes_no_sense_with(rule: Any, modifier: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule([nn.Parameter(torch.ones(2, 2))], modifiers=[modifier()])
    # As one of several rules, too.
    group = {"params": [nn.Parameter(torch.ones(2, 2))], "rule": rule, "modifiers": [modifier()]}
    with pytest.raises(ValueError, match=message):
        steprule.SGD([group])


def test_decay_that_is_switched_on_later_is_refused_before_anything_moves() -> None:
    optimizer = optimizer_with(["Hyperball"], weight_decay=0.0)
    advance(optimizer, 2)
    before = [p.detach().clone() for p in flat(optimizer)]
    optimizer.param_groups[1]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="Hyperball does not go with weight decay"):
        advance(optimizer, 1)
    assert_same([p.detach() for p in flat(optimizer)], before)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    advance(optimizer, 1)


@pytest.mark.parametrize("modifier", MODIFIERS.values())
def test_sparse_gradients_are_refused_by_the_name_of_their_parameter(modifier: Any) -> None:
    rows, plain = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(3))
    optimizer = steprule.SGD([("rows", rows), ("plain", plain)], modifiers=[modifier()])
    rows.grad, plain.grad = torch.ones(4, 2).to_sparse(1), torch.ones(3)
    with pytest.raises(RuntimeError, match="'rows'"):
        optimizer.step()
    assert_same([rows.detach(), plain.detach()], [torch.ones(4, 2), torch.ones(3)])


def test_a_misspelt_or_wrong_value_is_refused() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="Did you mean 'decay'"):
        steprule.EMA(decy=0.9)
    with pytest.raises(ValueError, match=r"EMA: decay = 1\.5"):
        steprule.EMA(1.5)
    with pytest.raises(ValueError, match=r"Did you mean 'ema\.decay'"):
        steprule.AdamW([{"params": params, "ema.decy": 0.5}], modifiers=[steprule.EMA()])
    with pytest.raises(ValueError, match=r"ema\.decay = 2"):
        steprule.AdamW([{"params": params, "ema.decay": 2}], modifiers=[steprule.EMA()])
    with pytest.raises(TypeError, match="ASGD sets the new parameter itself"):
        steprule.ASGD(params, modifiers=[steprule.Cautious()])


def test_loading_into_other_modifiers_names_both_lists() -> None:
    one, other = optimizer_with(["EMA"]), optimizer_with(["Lookahead"])
    advance(one, 2)
    advance(other, 1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="with the modifiers ema, and now has lookahead"):
        other.load_state_dict(one.state_dict())
    assert_same(other.state_dict(), before)
    report = other.load_state_dict(one.state_dict(), strict=False)
    assert any("lookahead.slow" in line for line in report.missing)
    assert any("ema.average" in line for line in report.unexpected)
    state = other.state[flat(other)[0]]
    assert "ema.average" not in state
    assert float(state["step"]) == 2
    advance(other, 2)


# Modifiers that a user writes


class Halved(Modifier):
    factor: float = hyper(default=0.5, at_least=0)

    @staticmethod
    def gradient(h: Any, p: Any, g: Any, s: Any, t: Any) -> Any:
        return h.factor * g


class TowardsZero(Modifier):
    """Decays only where the change goes towards zero."""

    sees_change = True

    @staticmethod
    def parameter(h: Any, p: Any, u: Any, s: Any, t: Any) -> Any:
        return where(u * p < 0, p * (1 - 0.1 * h.lr), p)


class WarmCautious(Modifier):
    @staticmethod
    def change(h: Any, p: Any, g: Any, u: Any, s: Any, t: Any) -> Any:
        agrees = u * g < 0
        return where(t > 2, where(agrees, u, 0.0) / larger(mean(agrees), 0.1), u)


class EveryThird(Modifier):
    @staticmethod
    def change(h: Any, p: Any, g: Any, u: Any, s: Any, t: Any) -> Any:
        return where(t % 3 == 0, 2 * u, u) / (1 + 0 * t)


class InnerCount(Modifier):
    @staticmethod
    def gradient(h: Any, p: Any, g: Any, s: Any, number: Any) -> Any:
        return (lambda: g * number)()


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("rule", [steprule.SGD, steprule.Muon])
def test_a_modifier_knows_the_step_with_rules_that_do_not_count(rule: Any, runner: str) -> None:
    if rule is steprule.Muon and runner == "lists":
        return  # a step on whole matrices has none
    param = nn.Parameter(torch.zeros(2, 2))
    optimizer = rule([param], lr=1.0, weight_decay=0, modifiers=[EveryThird()], **RUNNERS[runner])
    plain = rule([nn.Parameter(torch.zeros(2, 2))], lr=1.0, weight_decay=0, **RUNNERS[runner])
    for step in range(1, 5):
        moved: list[torch.Tensor] = []
        for own in (optimizer, plain):
            (p,) = flat(own)
            before, p.grad = p.detach().clone(), torch.eye(2)
            own.step()
            moved.append(p.detach() - before)
        torch.testing.assert_close(moved[0], (2 if step == 3 else 1) * moved[1])
    assert InnerCount.counts_steps
    assert not Halved.counts_steps


def test_what_cannot_know_the_step_says_so() -> None:
    update = staticmethod(lambda h, p, g, s, t: -g / t)
    with pytest.raises(TypeError, match=r"Own: update uses the number of the step, but counts_steps is False"):
        type("Own", (steprule.Elementwise,), {"update": update, "counts_steps": False})
    with pytest.raises(TypeError, match=r"Up: climb uses t\. It is no step"):
        type("Up", (Modifier,), {"climb": staticmethod(lambda h, p, g, s, t: p + t * g)})
    with pytest.raises(TypeError, match=r"Now: acts is 'last'\. .* `every`"):
        type("Now", (Modifier,), {"gradient": staticmethod(lambda h, p, g, s, t: g), "acts": "last"})

    class Branch(Modifier):
        @staticmethod
        def change(h: Any, p: Any, g: Any, u: Any, s: Any, t: Any) -> Any:
            return u if t == 1 else 2 * u

    with pytest.raises(TypeError, match=r"^Branch\.change: 'if' on t == 1"):
        steprule.AdamW([nn.Parameter(torch.ones(3))], modifiers=[Branch()])


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_modifier_of_a_users_own(runner: str) -> None:
    param = nn.Parameter(numbers((40, 3), torch.float64, seed=1))
    theta = param.detach().clone()
    modifiers = [Halved(0.25), TowardsZero(), WarmCautious()]
    optimizer = steprule.SGD([param], lr=0.5, modifiers=modifiers, **RUNNERS[runner])
    for t in range(1, 5):
        g = numbers((40, 3), torch.float64, seed=10 + t)
        param.grad = g.clone()
        optimizer.step()
        u = -0.5 * 0.25 * g
        agrees = u * 0.25 * g < 0
        u = torch.where(agrees, u, 0.0) / agrees.double().mean().clamp(min=0.1) if t > 2 else u
        theta = torch.where(u * theta < 0, theta * (1 - 0.1 * 0.5), theta) + u
    torch.testing.assert_close(param.detach(), theta, rtol=1e-12, atol=1e-12)


def test_a_wrong_declaration_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="has none of the methods gradient, change"):
        type("Nothing", (Modifier,), {"changes": staticmethod(lambda h, p, g, u, s, t: u)})
    with pytest.raises(TypeError, match=r"It must be change\(h, p, g, u, s, t\)"):
        type("Few", (Modifier,), {"change": staticmethod(lambda h, p, u: u)})
    with pytest.raises(TypeError, match="must be a static method"):
        type("Bound", (Modifier,), {"change": lambda h, p, g, u, s, t: u})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (lambda h, p, g, s, t: None, r"Odd\.gradient returned None; it must return the gradient"),
        (lambda h, p, g, s, t: g * h.speed, r"Odd\.gradient: no hyper-parameter 'h\.speed'"),
        (lambda h, p, g, s, t: g + s.memory, r"Odd\.gradient: no slot 'memory'"),
    ],
)
def test_errors_name_the_modifier_and_its_method(written: Any, message: str) -> None:
    odd = type("Odd", (Modifier,), {"gradient": staticmethod(written)})
    with pytest.raises((TypeError, AttributeError), match=message):
        steprule.AdamW([nn.Parameter(torch.ones(3))], modifiers=[odd()])
