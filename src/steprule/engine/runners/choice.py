"""Which runner steps a group, and why the others do not.

With `fused=None, foreach=None` it is the first of `RUNNERS` that can. torch's switches change that:
`fused=True` and `foreach=True` ask for a runner and raise if it cannot run, `fused=False` skips the kernels,
and `foreach=False` alone means the for-loop, which is the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from steprule import errors
from steprule.engine.composition import Composition
from steprule.engine.runners.kernels.runner import CpuKernels, GpuKernels
from steprule.engine.runners.lists import Lists
from steprule.engine.runners.one_by_one import Reference
from steprule.engine.runners.runner import Runner

REFERENCE = Reference()
RUNNERS: tuple[Runner, ...] = (CpuKernels(), GpuKernels(), Lists())


class Choice(NamedTuple):
    """The runner of a group and, for each faster one, why it is not used."""

    runner: Runner
    passed_over: dict[str, str]


def choose(own: Composition, group: dict[str, Any]) -> Choice:
    """The runner for this group as it is now.

    own: what the group steps with.

    Raises: RuntimeError if `fused=True` or `foreach=True` names a runner that cannot run here.
    """
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    passed: dict[str, str] = {}
    for runner in RUNNERS:
        if not runner.on(device):
            continue
        reason = runner.why_not(own, group)
        asked = group.get(runner.switch)
        if asked and reason is not None and not _is_only_a_hint(own.rule, runner):
            raise errors.runner_unavailable(own.rule.__name__, f"{runner.switch}=True", reason)
        reason = _not_wanted(runner, group) or reason
        if reason is None:
            return Choice(runner, passed)
        passed[runner.name] = reason
    return Choice(REFERENCE, passed)


def _not_wanted(runner: Runner, group: dict[str, Any]) -> str | None:
    """Why the group's switches pass this runner over, or None."""
    asked, other = group.get(runner.switch), "foreach" if runner.switch == "fused" else "fused"
    if asked is False:
        return f"{runner.switch}=False"
    if not asked and group.get(other):
        return f"{other}=True"
    if not asked and runner.switch == "fused" and group.get("foreach") is False:
        return "foreach=False asks for the for-loop"
    return None


def _is_only_a_hint(rule: Any, runner: Runner) -> bool:
    """Whether torch's rule on matrices has this switch; ours steps one matrix after another in any case."""
    return (rule.sums_as_torch or rule.on_matrices) and runner.switch in rule.torch_flags
