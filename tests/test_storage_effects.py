"""What optimizers report about storage: options without effect, memory, torch dtypes, state that is 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rules import RULES, Case, numbers
from torch import nn

import steprule
from steprule import AdamW
from steprule.declare import Matrix, hyper, slot
from steprule.engine import storage


def param(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(numbers(shape, dtype, 1))


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: AdamW([param(3)], low_precision="kahan"), "kahan: parameters are fp32, nothing to do"),
        (
            lambda: AdamW([param(3), param(4, dtype=HALF)], low_precision="master"),
            "master: 1 parameter is fp32, nothing to do",
        ),
        (
            lambda: AdamW([param(80, 80), param(3), param(4), param(4095)], state_dtype="int8"),
            "int8: 3 parameters of fewer than 4,096 elements stay fp32",
        ),
        (
            lambda: AdamW([param(3), param(4, dtype=HALF)], state_dtype="int8"),
            "int8: 2 parameters of fewer than 4,096 elements stay fp32 or bf16",
        ),
        (
            lambda: AdamW([param(80, 80, dtype=torch.complex64)], state_dtype="bf16"),
            "bf16: 1 parameter stays complex64",
        ),
        (lambda: AdamW([param(3)], state_dtype="fp32"), "fp32: parameters are fp32, nothing to do"),
        (
            lambda: AdamW([param(3)], state_dtype={"max_exp_avg_sq": "bf16"}),
            "bf16: amsgrad is off, so there is no max_exp_avg_sq",
        ),
        (
            lambda: steprule.SGD([param(3)], state_dtype="int8"),
            "int8: there are no slots that it",
        ),
        (
            lambda: steprule.Adafactor([param(3, 3)], state_dtype="bf16"),
            "bf16: there are no slots that it",
        ),
        (lambda: AdamW([param(3)], capturable=True), "capturable: parameters are on the CPU, nothing to do"),
    ],
)
def test_an_option_without_effect_says_so(make: Any, line: str) -> None:
    assert line in make().explain()


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdamW([param(64, 64)]),
        lambda: AdamW([param(64, 64)], state_dtype="int8"),
        lambda: AdamW([param(3)], state_dtype="bf16"),
        lambda: AdamW([param(3, dtype=HALF)], low_precision="kahan", state_dtype="bf16"),
        lambda: AdamW([param(3)], low_precision="none"),
    ],
)
def test_an_option_with_effect_does_not(make: Any) -> None:
    assert "nothing to do" not in make().explain()
    assert "stay" not in make().explain()


def test_an_option_that_came_too_late_says_so() -> None:
    optimizer = AdamW([param(64, 64)])
    optimizer.init_state()
    optimizer.param_groups[0]["state_dtype"] = "int8"
    assert "int8: exp_avg was created as fp32 and stays that way, for 1 parameter" in optimizer.explain()


# The report


class UserMatrix(Matrix):
    """A user's rule on matrices, with a slot that vectors do not have."""

    lr: float = hyper(0.1)
    m = slot("m")
    rows = slot("rows", per="left")

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        s.m = g
        return -h.lr * g


class ByHand(steprule.GenericAdaptiveOptimizer):
    """A rule written by hand, with state in a list."""

    def init_state(self, state: dict[str, Any], group: dict[str, Any], param: torch.Tensor) -> None:
        state["m"] = torch.zeros_like(param)
        state["pair"] = [torch.zeros_like(param), torch.zeros(3)]

    def step_param(self, state: Any, group: Any, grad: torch.Tensor, param: torch.Tensor) -> None:
        param.add_(grad, alpha=-group["lr"])


class Measuring(ByHand):
    """Its state depends on elements, which a meta tensor does not have."""

    def init_state(self, state: dict[str, Any], group: dict[str, Any], param: torch.Tensor) -> None:
        state["m"] = torch.zeros(int(param.abs().sum().item()))


@pytest.mark.parametrize("rule", [*RULES.values(), UserMatrix, ByHand], ids=lambda rule: rule.__name__)
def test_every_optimizer_has_a_memory_report(rule: Any) -> None:
    """Known before the first step, and then equal to what exists."""
    case = Case(rule)
    optimizer = case.make([param(6, 4), param(3, 2)], **({"history_size": 2} if case.closure else {}))
    before = steprule.memory_report(optimizer)
    assert "group 0" in optimizer.explain()
    for number in range(5 if case.closure else 1):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p).to_sparse(1) if case.sparse_only else torch.ones_like(p)
        case.advance(optimizer, 1, first=number) if case.closure else case.step(optimizer)
    after = steprule.memory_report(optimizer)
    exists = sum(x.numel() * x.element_size() for x in tensors_in(list(optimizer.state.values())))
    assert after.state_bytes == exists if not case.closure else after.state_bytes >= exists
    assert before.state_bytes == pytest.approx(after.state_bytes, abs=64 if case.closure else 0)
    assert "bytes of state per parameter" in str(after)


def test_state_that_needs_numbers_is_reported_once_it_exists() -> None:
    optimizer = Measuring([param(6, 4)])
    assert steprule.memory_report(optimizer).state_bytes == 0
    optimizer.param_groups[0]["params"][0].grad = torch.ones(6, 4)
    optimizer.step()
    assert steprule.memory_report(optimizer).state_bytes > 0


@pytest.mark.parametrize("function", [steprule.memory_report, steprule.explain])
def test_other_optimizers_are_refused_by_name(function: Any) -> None:
    with pytest.raises(TypeError, match="takes an optimizer of steprule, got Adam"):
        function(torch.optim.Adam([param(3)]))


def tensors_in(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(entry)


# torch dtypes instead of names


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.bfloat16, "bf16"),
        (torch.float32, "fp32"),
        (torch.int8, "int8"),
        ({"exp_avg": torch.float16}, {"exp_avg": "fp16"}),
        ({"exp_avg": "int8", "exp_avg_sq": torch.bfloat16}, {"exp_avg": "int8", "exp_avg_sq": "bf16"}),
    ],
)
def test_dtypes_of_torch_are_understood(given: Any, kept: Any) -> None:
    one, other = AdamW([param(80, 80)], state_dtype=given), AdamW([param(80, 80)], state_dtype=kept)
    in_group = AdamW([{"params": [param(80, 80)], "state_dtype": given}])
    for optimizer in (one, other, in_group):
        optimizer.init_state()
        assert optimizer.state_dict()["param_groups"][0]["state_dtype"] == kept
    kinds = [{k: x.dtype for k, x in next(iter(o.state.values())).items()} for o in (one, other, in_group)]
    assert kinds[0] == kinds[1] == kinds[2]


@pytest.mark.parametrize("given", [torch.float64, torch.int32, {"exp_avg": torch.float64}])
def test_other_dtypes_are_refused(given: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"state_dtype = torch\..*must be one of fp32"):
        AdamW([param(3)], state_dtype=given)


# fp16


@pytest.mark.parametrize("switches", [{"foreach": False}, {"foreach": True}, {}])
def test_state_in_fp16_that_rounds_to_nothing_is_told(switches: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(100, dtype=torch.float16))
    optimizer = steprule.Adam([p], lr=1e-2, low_precision="none", **switches)
    p.grad = torch.full_like(p, 1e-4)
    told = r"Adam: in the first step 100% of 'exp_avg_sq' of parameter 0 \(torch.float16\) rounded to 0"
    with pytest.warns(UserWarning, match=told):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("options", [{"state_dtype": "fp32"}, {"state_dtype": "bf16"}, {"eps": 0.1}])
def test_state_that_does_not_round_to_nothing_is_no_matter(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(100, dtype=torch.float16))
    optimizer = steprule.Adam([p], lr=1e-2, low_precision="none", **options)
    p.grad = torch.full_like(p, 1e-4 if "eps" not in options else 1.0)
    p.grad[:10] = 0
    optimizer.step()


# Files


def test_the_older_format_of_torch_is_read(tmp_path: Path) -> None:
    file = tmp_path / "old.pt"
    torch.save({"a": torch.arange(3.0), "b": [1]}, file, _use_new_zipfile_serialization=False)
    read = steprule.load_checkpoint(file)
    assert torch.equal(read["a"], torch.arange(3.0))
    assert read["b"] == [1]


class Foreign:
    """Not a plain object."""


@pytest.mark.parametrize("harm", ["cut", "code", "no dict"])
def test_an_older_file_that_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, harm: str) -> None:
    file = tmp_path / "old.pt"
    held = {"cut": {"a": torch.ones(2000)}, "code": {"a": Foreign()}, "no dict": [1]}[harm]
    torch.save(held, file, _use_new_zipfile_serialization=False)
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"older format and could not be read safely: .*save it again"):
        steprule.load_checkpoint(file)


def test_slot_keys_that_storage_needs_are_taken() -> None:
    with pytest.raises(TypeError, match="slot key 'm_codes' is taken"):

        class Clash(steprule.Elementwise):
            m = slot("m")
            codes = slot("m_codes")

            @staticmethod
            def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
                return -g


# 8 bits in edge cases


@pytest.mark.parametrize("size", [0, 1, 255, 4095, 4096, 4097, 4351, 4352, 4353])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_every_size_come_back(size: int, signed: bool) -> None:
    from steprule.engine.fields import Slot

    state = {"x": numbers((size,), torch.float32, 1) if signed else numbers((size,), torch.float32, 1).abs()}
    given = state["x"].clone()
    storage.recode(state, Slot("x", never_negative=not signed), torch.int8 if signed else torch.uint8)
    assert state["x_codes"].shape == (size,)
    back = storage.load(state, "x")
    assert torch.allclose(back, given, rtol=0.07, atol=1e-4)


def test_codes_of_a_group_that_comes_later() -> None:
    first, later = param(80, 80), param(70, 90)
    optimizer = AdamW([first], state_dtype="int8")
    for p in (first, later):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.add_param_group({"params": [later], "state_dtype": "bf16"})
    optimizer.step()
    assert optimizer.state[first]["exp_avg_codes"].dtype == torch.int8
    assert optimizer.state[later]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[first]["slot_rounding_key"] != optimizer.state[later]["slot_rounding_key"]
