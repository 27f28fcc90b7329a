"""State in fewer bits and 16-bit parameters: what is stored, what is refused, what survives."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import python
from rules import LOOPS, Case, can_store, each, estimate_curvature

import steprule
from steprule.engine import blocks, storage
from steprule.engine.fields import Slot, parameter

BIG = (70, 90)
HALF = [torch.bfloat16, torch.float16]


ELEMENTWISE = [c for c in LOOPS if c.elementwise and not c.sparse_only and not c.closure]


def feed(optimizer: Any, steps: int, first: int = 0) -> None:
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        estimate_curvature(optimizer)
        optimizer.step()


def make(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in (BIG, (5,))]
    return case.rule(params, **case.options, **options)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "int8"])
@each(among=ELEMENTWISE)
def test_a_resumed_run_goes_on_bit_for_bit(case: Case, kind: str) -> None:
    if not can_store(case, kind):
        pytest.skip("it has no slot that may be kept so")
    optimizer = make(case, state_dtype=kind)
    feed(optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = make(case, state_dtype=kind)
    for p, q in zip(again.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(torch.load(file, weights_only=True))
    for one in (optimizer, again):
        feed(one, 2, first=2)
    saved, resaved = (x.state_dict()["state"] for x in (optimizer, again))
    for i, entries in saved.items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resaved[i][key])), key
            assert type(value) is type(resaved[i][key])
    for p, q in zip(again.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


@each(lambda case: can_store(case, "int8"), among=ELEMENTWISE)
def test_eight_bits_are_kept_for_large_tensors_only(case: Case) -> None:
    optimizer = make(case, state_dtype="int8")
    optimizer.init_state()
    large, small = (optimizer.state[p] for p in optimizer.param_groups[0]["params"])
    for slot in case.rule.slots.values():
        whole = slot.per_tensor or slot.starts is parameter
        if whole or not slot.exists(optimizer.param_groups[0]):
            continue
        wanted = torch.uint8 if slot.never_negative else torch.int8
        assert large[f"{slot.key}_codes"].dtype == wanted
        assert large[f"{slot.key}_scale"].shape == blocks.layout((70, 90)).scales
        assert small[slot.key].dtype == torch.float32


@pytest.mark.parametrize("signed", [True, False])
@given(data=st.data())
@settings(max_examples=30)
def test_codes_come_back_within_an_eighth(signed: bool, data: Any) -> None:
    size = data.draw(st.integers(storage.SMALLEST, storage.SMALLEST + 600))
    spread = data.draw(st.floats(-20, 20))
    seed = data.draw(st.integers(0, 1000))
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal(size)).float() * 2.0**spread
    x = x if signed else x.abs()
    x[:: data.draw(st.integers(1, 9))] = 0.0
    param = torch.nn.Parameter(torch.zeros(size))
    state = storage.create(Slot("x", never_negative=not signed), param, {"state_dtype": "int8"})
    state |= storage.create_for_parameter(param, {"state_dtype": "int8"}, state, 0)
    storage.store(state, "x", x)
    back = storage.load(state, "x")
    scale = storage.powers(state["x_scale"]).repeat_interleave(blocks.layout((size,)).block)[:size]
    smallest = scale * 2.0 ** (-18 if signed else -34)
    # Three bits of mantissa: a code is at most an eighth away, plus float32's own roundings.
    assert ((back - x).abs() <= x.abs() * 0.1251 + smallest * 1.001).all()
    assert (back[x == 0] == 0).all()
    assert signed or (back[x > 0] > 0).all()
    assert (torch.signbit(back) == torch.signbit(x)).all()


def codes(size: int, signed: bool, kind: str = "int8") -> dict[str, Any]:
    """The state of a slot with this many elements, in codes."""
    param, group = torch.nn.Parameter(torch.zeros(size)), {"state_dtype": kind}
    state = storage.create(Slot("x", never_negative=not signed), param, group)
    return state | storage.create_for_parameter(param, group, state, 1)


@pytest.mark.parametrize("signed", [True, False])
def test_random_rounding_of_codes_has_no_bias(signed: bool) -> None:
    state = codes(8192, signed)
    x = torch.rand(8192) * 0.5
    x[:: blocks.BLOCK] = 1.0
    total = torch.zeros(8192)
    for _ in range(400):
        storage.store(state, "x", x)
        storage.next_keys(state)
        total += storage.load(state, "x")
    assert abs(((total / 400).sum() / x.sum()).item() - 1) < 1e-3
    assert ((total / 400 - x).abs().max() / x.max()) < 2e-2


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_that_does_not_change_keeps_its_code(signed: bool) -> None:
    """Whatever the largest element of its block does, as long as it does not shrink."""
    state = codes(8192, signed)
    x = torch.rand(8192)
    storage.store(state, "x", x)
    kept = storage.load(state, "x")
    torch.manual_seed(0)
    for _ in range(100):
        now = kept.clone()
        now[:: blocks.BLOCK] = 1.0 + 3 * torch.rand(64)
        storage.next_keys(state)
        storage.store(state, "x", now)
        back = storage.load(state, "x")
        # Only the offset of code 0 changes a little when the scale doubles.
        tiny = 2.0**-13 if signed else 2.0**-29
        apart = ((back - now).abs() > tiny * 4).view(-1, blocks.BLOCK)[:, 1:]
        assert apart.float().mean() < 0.01


@pytest.mark.parametrize(("kind", "spread"), [("int8", 0.3), ("bf16", 0.1)])
def test_a_slow_average_stays_near_the_average(kind: str, spread: float) -> None:
    """Rounded to the nearest, 0.999·v is v again in bf16, and no average ever falls."""
    state = codes(8192, signed=False, kind=kind)
    storage.store(state, "x", torch.full((8192,), 30.0))
    generator = torch.Generator().manual_seed(0)
    wide = torch.full((8192,), 30.0)
    for _ in range(4000):
        squares = torch.randn(8192, generator=generator) ** 2
        wide = 0.999 * wide + 0.001 * squares
        storage.next_keys(state)
        storage.store(state, "x", 0.999 * storage.load(state, "x").float() + 0.001 * squares)
    ratio = storage.load(state, "x") / wide
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    assert ratio.std().item() < spread


def test_what_is_not_finite_spoils_its_block_and_no_other() -> None:
    state = codes(8192, signed=False)
    for bad in (float("inf"), float("nan")):
        x = torch.ones(8192)
        x[700] = bad
        storage.store(state, "x", x)
        lost = storage.load(state, "x").isnan().view(-1, blocks.BLOCK)
        assert lost[700 // blocks.BLOCK].all()
        assert lost.sum() == blocks.BLOCK


@pytest.mark.parametrize("rule", [steprule.Adagrad, steprule.SparseAdam])
def test_codes_refuse_sparse_gradients_and_nothing_moves(rule: Any) -> None:
    p = torch.nn.Parameter(torch.randn(100, 50))
    before = p.detach().clone()
    optimizer = rule([p], state_dtype="int8")
    p.grad = torch.zeros(100, 50).index_fill_(0, torch.tensor([3]), 1.0).to_sparse(1)
    with pytest.raises(RuntimeError, match=f"{rule.__name__}: state_dtype='int8' does not go with the sparse"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    "options", [{"state_dtype": "int8"}, {"state_dtype": {"exp_avg": "bf16"}}, {"low_precision": "kahan"}]
)
def test_a_step_on_the_tape_refuses_what_rounds_by_itself(options: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.zeros(100, 50))]
    with pytest.raises(ValueError, match=r"Adam: differentiable=True does not go with .* Use fp32"):
        steprule.Adam(params, differentiable=True, **options)
    live = steprule.Adam(params, state_dtype="int8")
    feed(live, 1)
    live.param_groups[0]["differentiable"] = True
    before = params[0].detach().clone()
    conflict = r"differentiable=True does not go with state_dtype='int8' \(parameter group 0\)"
    with pytest.raises(ValueError, match=conflict):
        live.step()
    assert torch.equal(params[0], before)
    assert live.state[params[0]]["step"] == 1


@each(among=ELEMENTWISE)
def test_what_a_step_divides_by_is_refused_in_fp16(case: Case) -> None:
    """Squares of gradients below 2e-4 would be 0 there, and the step infinite."""
    params = [torch.nn.Parameter(torch.zeros(3))]
    for slot in case.rule.slots.values():
        if slot.never_negative:
            with pytest.raises(
                ValueError, match=f"{case.name}: '{slot.key}' cannot be kept in fp16: .* Use bf16"
            ):
                case.rule(params, **case.options, state_dtype={slot.key: "fp16"})


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (
            "Rprop",
            {"state_dtype": {"step_size": "int8"}},
            "Rprop: 'step_size' cannot be kept in int8: .* Use bf16",
        ),
        (
            "AdEMAMix",
            {"state_dtype": "int8"},
            "AdEMAMix: 'exp_avg_slow' cannot be kept in int8: .* Use bf16",
        ),
        ("ASGD", {"state_dtype": "int8"}, "ASGD: 'ax' cannot be kept in int8: .* Use bf16"),
        *(
            (
                "RMSprop",
                {"centered": True, "state_dtype": {key: kind}},
                f"RMSprop: '{key}' cannot be kept in {kind}: 'grad_avg' is subtracted from .* Use fp32",
            )
            for key, kind in (("square_avg", "bf16"), ("grad_avg", "int8"), ("grad_avg", "fp16"))
        ),
    ],
)
def test_slots_that_few_bits_spoil_are_refused_by_name(rule: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(steprule, rule)([torch.nn.Parameter(torch.zeros(3))], **options)


def test_no_other_rule_refuses() -> None:
    def refused(kind: str) -> set[str]:
        return {str(case) for case in ELEMENTWISE if not can_store(case, kind)}

    # Some have no slots, or only one that starts as the parameter.
    nothing_to_store = {"SGD-loop", "ScheduleFreeSGD-loop", "ScheduleFreeSGD-loop-options"}
    assert refused("bf16") == {"RMSprop-loop-options", *nothing_to_store}
    int8 = {"AdEMAMix", "Adan", "ASGD", "MADGRAD", "Rprop"}
    assert {name.partition("-")[0] for name in refused("int8") - refused("bf16")} == int8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": "int4"}, r"state_dtype = 'int4', must be one of fp32, bf16, fp16, int8"),
        (
            {"state_dtype": {"exp_av": "bf16"}},
            r"'exp_av', which is not a slot of AdamW.*'exp_avg'",
        ),
        ({"state_dtype": {"exp_avg": "x"}}, r"state_dtype = 'x', must be one of"),
        (
            {"low_precision": "Kahan"},
            r"low_precision = 'Kahan', must be one of none, stochastic, kahan, master",
        ),
    ],
)
def test_wrong_names_are_refused(options: dict[str, Any], message: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match=message):
        steprule.AdamW(params, **options)
    with pytest.raises(ValueError, match=message):
        steprule.AdamW([{"params": params, **options}])


def test_state_dtype_may_differ_per_slot_and_group() -> None:
    a, b = (torch.nn.Parameter(torch.randn(BIG)) for _ in range(2))
    optimizer = steprule.AdamW(
        [{"params": [a], "state_dtype": {"exp_avg": "fp16"}}, {"params": [b], "state_dtype": "bf16"}]
    )
    feed(optimizer, 1)
    assert optimizer.state[a]["exp_avg"].dtype == torch.float16
    assert optimizer.state[a]["exp_avg_sq"].dtype == torch.float32
    assert optimizer.state[b]["exp_avg"].dtype == torch.bfloat16


# 16-bit parameters


@each(among=ELEMENTWISE)
def test_master_is_the_fp32_run_seen_through_16_bits(case: Case) -> None:
    """Exact: the bf16 weight and its lower half are the fp32 weight of a run on the same gradients."""
    low = make(case, torch.bfloat16, low_precision="master", state_dtype="fp32", foreach=False)
    wide = make(case, torch.float32, foreach=False)
    for p, q in zip(wide.param_groups[0]["params"], low.param_groups[0]["params"], strict=True):
        p.data.copy_(q.data.float())
    for number in range(4):
        feed(low, 1, first=number)
        for p, q in zip(wide.param_groups[0]["params"], low.param_groups[0]["params"], strict=True):
            p.grad = q.grad.float()
        estimate_curvature(wide)
        wide.step()
    for p, q in zip(wide.param_groups[0]["params"], low.param_groups[0]["params"], strict=True):
        assert torch.equal(storage.load_parameter(q.detach(), low.state[q]), p)
        assert ((q.float() - p).abs() <= p.abs() * 2.0**-8).all()


@pytest.mark.parametrize("low_precision", ["stochastic", "kahan", "master"])
@pytest.mark.parametrize("dtype", HALF)
def test_small_updates_arrive(dtype: torch.dtype, low_precision: str) -> None:
    if dtype == torch.float16 and low_precision != "kahan":
        with pytest.raises(ValueError, match=f"low_precision='{low_precision}' needs bfloat16"):
            steprule.SGD([torch.nn.Parameter(torch.ones(3, dtype=dtype))], low_precision=low_precision)
        return
    lost, kept = (torch.nn.Parameter(torch.ones(4096, dtype=dtype)) for _ in range(2))
    plain = steprule.SGD([lost], lr=1e-4, low_precision="none")
    careful = steprule.SGD([kept], lr=1e-4, low_precision=low_precision)
    for _ in range(500):
        for optimizer, p in ((plain, lost), (careful, kept)):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert (lost == 1).all()
    assert kept.float().mean().item() == pytest.approx(0.95, abs=2e-3)


def test_updates_that_round_away_are_told_once() -> None:
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = steprule.SGD([p], lr=1e-4)
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"100% of the updates of parameter 0 .* low_precision='kahan'"):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("rule", [steprule.ADOPT, steprule.SOAP])
def test_a_rule_whose_first_step_moves_nothing_is_watched_in_the_second(rule: Any) -> None:
    p = torch.nn.Parameter(torch.ones(10, 10, dtype=torch.bfloat16))
    optimizer = rule([p], lr=1e-5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"100% of the updates of parameter 0 .* low_precision='kahan'"):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("together", [True, False])
def test_updates_that_round_away_are_seen_behind_other_parameters(together: bool) -> None:
    wide, narrow = (torch.nn.Parameter(torch.ones(100, dtype=d)) for d in (torch.float32, torch.bfloat16))
    groups = [{"params": [wide, narrow]}] if together else [{"params": [wide]}, {"params": [narrow]}]
    optimizer = steprule.SGD(groups, lr=1e-4)
    for p in (wide, narrow):
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"100% of the updates of parameter 1 "):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("switches", [{"foreach": False}, {}])
@pytest.mark.parametrize("options", [{"state_dtype": "bf16"}, {"state_dtype": "int8"}, {}])
def test_random_rounding_does_not_follow_the_seed(options: dict[str, Any], switches: dict[str, Any]) -> None:
    """Processes that train copies of one model use different seeds, to see different data."""
    low = {} if options else {"low_precision": "stochastic"}
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        params = [torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(3)]
        optimizer = steprule.AdamW(params, lr=0.1, **options, **low, **switches)
        feed(optimizer, 3)
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(p, other) is (p is other) for other in runs[0])


def test_noise_comes_from_the_place_not_from_who_has_state_already() -> None:
    """One process may have had a gradient that the other has not had yet."""
    made: list[Any] = []
    for first in (0, 1):
        params = [torch.nn.Parameter(torch.ones(5000)) for _ in range(2)]
        optimizer = steprule.AdamW([{"params": [p]} for p in params], state_dtype="bf16")
        params[first].grad = torch.ones(5000)
        optimizer.step()
        optimizer.init_state()
        made.append((optimizer, params))
    (one, (a, b)), (other, (c, d)) = made
    assert one.state[a]["slot_rounding_key"] != one.state[b]["slot_rounding_key"]
    storage.next_keys(one.state[b])
    storage.next_keys(other.state[c])
    for p, q in ((a, c), (b, d)):
        assert torch.equal(one.state[p]["slot_rounding_key"], other.state[q]["slot_rounding_key"])


def test_two_parameters_do_not_round_alike() -> None:
    a, b = (torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = steprule.SGD([a, b], lr=1e-3, low_precision="stochastic")
    for p in (a, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(a, b)


def test_a_parameter_and_its_slots_do_not_round_alike() -> None:
    p = torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
    optimizer = steprule.AdamW([p], low_precision="stochastic", state_dtype="bf16")
    optimizer.init_state()
    state, noises = optimizer.state[p], list[torch.Tensor]()
    for _ in range(3):
        keys = [
            int(state["rounding_key"]),
            *(int(state["slot_rounding_key"]) ^ storage.salt_of(i) for i in (0, 1)),
        ]
        noises += [storage.noise_for(key, p) for key in keys]
        storage.next_keys(state)
    assert len({tuple(noise.reshape(-1)[:4].tolist()) for noise in noises}) == 9


# The report


@each(among=ELEMENTWISE)
@pytest.mark.parametrize("kind", [None, "bf16", "int8"])
def test_the_memory_report_is_what_then_exists(case: Case, kind: str | None) -> None:
    if kind is not None and not can_store(case, kind):
        pytest.skip("it has no slot that may be kept so")
    optimizer = make(case, state_dtype=kind)
    report = steprule.memory_report(optimizer)
    assert bool(optimizer.state) == case.starts_with_state
    optimizer.init_state()
    entries = [v for state in optimizer.state.values() for v in state.values()]
    assert report.state_bytes == sum(v.numel() * v.element_size() for v in entries)
    assert str(report.state_bytes)[:1] in str(report)


def test_eight_bit_adamw_takes_two_bytes_per_parameter() -> None:
    optimizer = steprule.AdamW([torch.nn.Parameter(torch.zeros(1000, 1000))], state_dtype="int8")
    report = steprule.memory_report(optimizer)
    assert report.state_bytes / report.parameters <= 2.1
    assert report.torch_state_bytes == pytest.approx(8e6, rel=1e-4)


def test_a_state_of_codes_continues_in_a_new_process(tmp_path: Any) -> None:
    script = """
import sys, torch, steprule
torch.manual_seed(0)
p = torch.nn.Parameter(torch.randn(64, 80).bfloat16())
o = steprule.AdaBelief([p], state_dtype="int8", low_precision="stochastic")
first, last, load, save = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if load != "-":
    saved = torch.load(load, weights_only=True)
    p.data.copy_(saved["p"]); o.load_state_dict(saved["o"])
for n in range(first, last):
    p.grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(n)).bfloat16()
    o.step()
torch.save({"p": p.detach(), "o": o.state_dict()}, save)
"""
    whole, half, rest = (str(tmp_path / name) for name in ("whole", "half", "rest"))
    for arguments in (["0", "4", "-", whole], ["0", "2", "-", half], ["2", "4", half, rest]):
        python("-c", script, *arguments)
    one, other = (torch.load(x, weights_only=True) for x in (whole, rest))
    assert torch.equal(one["p"], other["p"])
    for key, value in one["o"]["state"][0].items():
        assert torch.equal(value, other["o"]["state"][0][key]), key
