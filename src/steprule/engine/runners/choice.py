"""Which runner steps a group, and why the others do not.

With `fused=None, foreach=None` it is the first one that can: a fused kernel, then lists of tensors, then the
reference. torch's switches change that: `fused=True` and `foreach=True` ask for a runner and raise if it cannot
run, `fused=False` skips the kernels, and `foreach=False` alone means the for-loop, which is the reference.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steprule import errors

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    """The runner of a group and, for each faster one, why it is not used."""

    runner: str
    passed_over: dict[str, str]


def choose(rule: Any, group: dict[str, Any]) -> Choice:
    """The runner for this group as it is now.

    Raises: RuntimeError if `fused=True` or `foreach=True` names a runner that cannot run here.
    """
    fused, foreach = group.get("fused"), group.get("foreach")
    passed: dict[str, str] = {}
    always = _never_listed(rule, group)
    kernel = kernel_for(_device(group["params"]))
    for runner, asked, reason in (
        (kernel, fused, always or _no_kernel(kernel, group["params"])),
        ("foreach", foreach, always or _not_in_lists(group)),
    ):
        flag = "fused" if runner == kernel else "foreach"
        other = "foreach" if runner == kernel else "fused"
        if asked and reason is not None and not _is_only_a_hint(rule, flag):
            raise errors.runner_unavailable(rule.__name__, f"{flag}=True", reason)
        if asked is False:
            reason = f"{flag}=False"
        elif not asked and group.get(other):
            reason = f"{other}=True"
        elif runner == kernel and foreach is False and not asked:
            reason = "foreach=False asks for the for-loop"
        if reason is None:
            return Choice(runner, passed)
        passed[runner] = reason
    return Choice("reference", passed)


def _is_only_a_hint(rule: Any, flag: str) -> bool:
    """Whether torch's rule on matrices has this switch; ours steps one matrix after another in any case."""
    return not rule.traced and flag in rule.torch_flags


def kernel_for(device: torch.device) -> str:
    """The kernel runner for tensors on this device."""
    return "cpu_kernel" if device.type == "cpu" else "gpu_kernel"


def counts_on_device(group: dict[str, Any]) -> bool:
    """Whether step counts are on the device, where steps that are captured or may be skipped can count."""
    return bool(group.get("capturable") or group.get("fused"))


def _never_listed(rule: Any, group: dict[str, Any]) -> str | None:
    """Why only the reference can run this, whatever the device."""
    if not rule.traced:
        return f"{rule.__name__} works on whole matrices"
    if rule.gradients == "rows only":
        return f"{rule.__name__} steps single rows"
    if group.get("differentiable"):
        return "differentiable=True records the step for autograd"
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.requires_grad:
        return "lr requires a gradient"
    return None


def _not_in_lists(group: dict[str, Any]) -> str | None:
    kept = str(group.get("state_dtype"))
    if group.get("low_precision") not in (None, "none") or "int8" in kept or "bf16" in kept:
        return "torch's lists of tensors cannot round at random or keep 8-bit codes"
    return None


def _device(params: list[Tensor]) -> torch.device:
    return params[0].device if params else torch.device("cpu")


def _no_kernel(kernel: str, params: list[Tensor]) -> str | None:
    # If only some parameters have another dtype, the step leaves them to the reference.
    if params and params[0].dtype not in FLOATS:
        return f"the kernel computes fp32, fp64, fp16 and bf16, but the parameters are {params[0].dtype}"
    if kernel == "cpu_kernel":
        return None if _installed("numba") else "numba is not installed (pip install 'steprule[cpu]')"
    if not _installed("numpy"):
        return "numpy is not installed (pip install numpy)"
    from steprule.engine.runners.kernels.gpu import launch as gpu_launch  # numpy is optional

    return gpu_launch.missing(_device(params))


@cache
def _installed(library: str) -> bool:
    return find_spec(library) is not None
