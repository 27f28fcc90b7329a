"""Warnings name the line of the user's code, whatever is between it and the warning."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import steprule


class Own(steprule.AdamW):
    """A subclass in the user's own file."""


def param(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    made = nn.Parameter(torch.ones(100, dtype=dtype))
    made.grad = torch.ones_like(made)
    return made


def loses_updates() -> Any:
    return steprule.SGD([param(torch.bfloat16)], lr=1e-6)


def scheduled(optimizer: Any) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()


def scaled(optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones((), requires_grad=True)).backward()
    scaler.step(optimizer)


def other_names() -> None:
    saved = steprule.AdamW([("a", param())])
    saved.init_state()
    steprule.AdamW([("b", param())]).load_state_dict(saved.state_dict())


WARNINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "step": (lambda: loses_updates().step(), "rounded away"),
    "closure": (lambda: loses_updates().step(lambda: None), "rounded away"),
    "scheduler": (lambda: scheduled(loses_updates()), "rounded away"),
    "scaler": (lambda: scaled(loses_updates()), "rounded away"),
    "curvature": (lambda: steprule.AdaHessian([param()]).step(), "never called"),
    "scheduled curvature": (lambda: scheduled(steprule.AdaHessian([param()])), "never called"),
    "load": (other_names, "no parameter name"),
    "constructor": (lambda: steprule.AdamW([param()] * 2), "duplicate parameters"),
    "subclass": (lambda: Own([param()] * 2), "duplicate parameters"),
    "create": (lambda: steprule.create("adamw", [param()] * 2), "duplicate parameters"),
    "group": (lambda: steprule.SGD([param()]).add_param_group({"params": [param()] * 2}), "duplicate"),
    "LBFGS": (lambda: steprule.LBFGS([param()]).step(lambda: torch.tensor(torch.nan)), "NaN or infinite"),
}
# Where these call torch.
THROUGH = {"scaler": scaled, "scheduler": scheduled, "scheduled curvature": scheduled, "load": other_names}


@pytest.mark.parametrize("name", WARNINGS)
def test_the_line_is_that_of_the_caller(name: str) -> None:
    call, message = WARNINGS[name]
    with pytest.warns(Warning, match=message) as caught:
        call()
    (own,) = [x for x in caught if message in str(x.message)]
    lines, first = inspect.getsourcelines(THROUGH.get(name, call))
    assert own.filename == __file__
    assert first <= own.lineno < first + len(lines)


def test_a_step_that_torch_compiler_leaves_alone() -> None:
    pytest.importorskip("torch._dynamo")
    with pytest.warns(UserWarning, match="rounded away") as caught:
        loses_updates().step()
    assert [x.filename for x in caught] == [__file__]
