"""The runners that step all parameters of a group with fused kernels, one for each kind of device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steprule import errors
from steprule.engine import lines, storage
from steprule.engine.blocks import Region
from steprule.engine.composition import Composition
from steprule.engine.program.program import Program
from steprule.engine.runners.runner import Prepared, Runner, installed, only_the_reference

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Ready(NamedTuple):
    """What steps some parameters: kernels, what is counted once per tensor, and the keys of random numbers."""

    launch: Any
    counters: Any
    rounding: Any


class Kernels(Runner):
    """Fused kernels on one kind of device.

    The libraries that print, compile and launch them are optional, so they are imported when they are needed.
    """

    switch = "fused"
    plans = True

    def why_not(self, own: Composition, group: dict[str, Any]) -> str | None:
        """Why no kernel can run this in this group, or None."""
        params = group["params"]
        reason = only_the_reference(own.rule, group)
        # If only some parameters have another dtype, the step leaves them to the reference.
        if reason is None and params and params[0].dtype not in FLOATS:
            return f"the kernel computes fp32, fp64, fp16 and bf16, but the parameters are {params[0].dtype}"
        device = params[0].device if params else torch.device("cpu")
        return reason or self.missing(device)

    @abstractmethod
    def missing(self, device: torch.device) -> str | None:
        """Why no kernel can be made for this device, or None."""

    @abstractmethod
    def ready(
        self,
        program: Program,
        dtypes: Mapping[str, torch.dtype],
        states: Sequence[dict[str, Any]],
        shapes: Sequence[Sequence[int]],
        wholes: Sequence[Sequence[int]],
        regions: Sequence[Region],
        device: torch.device,
        counts_there: bool,
    ) -> Ready:
        """What steps parameters of these shapes, all with the same dtypes.

        wholes: the shapes of the whole parameters, of which these may be parts. regions: which parts they are.
        dtypes: of 'p', 'g' and every slot letter, and of what is stored with them. counts_there: whether what
        is kept once per tensor is on the device.

        Raises: NoKernel if a kernel cannot be compiled here.
        """

    def prepare(
        self, optimizer: Any, group: dict[str, Any], program: Program | None, after: dict[str, float]
    ) -> Prepared:
        """Prepare a step of every parameter of the group that the kernel can take."""
        from steprule.engine.runners.kernels import fused

        assert program is not None
        parts, left = fused.prepare(optimizer, group, program, after, self)
        if left and group.get("fused"):
            name, reason = next(iter(fused.reasons(optimizer, group).items()))
            raise errors.runner_unavailable(optimizer.who(group), "fused=True", f"{name}: {reason}")
        return parts, left

    def explain(self, optimizer: Any, group: dict[str, Any]) -> list[str]:
        """Of the last step: where the kernels can be read, what the reference stepped, and why."""
        from steprule.engine.runners.kernels import fused

        return fused.explain(optimizer, group)


class CpuKernels(Kernels):
    """Kernels compiled by LLVM, on torch's own threads."""

    name = "cpu_kernel"

    def on(self, device: torch.device) -> bool:
        """Whether this is the CPU."""
        return device.type == "cpu"

    def missing(self, device: torch.device) -> str | None:
        """Why no kernel can be made here, or None."""
        return None if installed("llvmlite") else "llvmlite is not installed (pip install llvmlite)"

    def ready(
        self,
        program: Program,
        dtypes: Mapping[str, torch.dtype],
        states: Sequence[dict[str, Any]],
        shapes: Sequence[Sequence[int]],
        wholes: Sequence[Sequence[int]],
        regions: Sequence[Region],
        device: torch.device,
        counts_there: bool,
    ) -> Ready:
        """What steps parameters in the memory of the host."""
        from steprule.engine.runners.kernels.counters import Counters, Keys, keys_of
        from steprule.engine.runners.kernels.cpu.launch import Launch

        counted = keys_of(program, states[0])
        keys = [key for key in storage.KEYS if key in states[0]]
        return Ready(
            Launch(program, dtypes, shapes, regions),
            Counters(program, facts_of(program, dtypes, wholes), counted, columns(states, counted)),
            Keys(dict(zip(keys, columns(states, keys), strict=True))),
        )


class GpuKernels(Kernels):
    """Kernels compiled by Triton."""

    name = "gpu_kernel"
    unscales = True

    def on(self, device: torch.device) -> bool:
        """Whether this is a device with memory of its own."""
        return device.type != "cpu"

    def missing(self, device: torch.device) -> str | None:
        """Why no kernel can be made for this device, or None."""
        if not installed("numpy"):
            return "numpy is not installed (pip install numpy)"
        from steprule.engine.runners.kernels.gpu import launch

        return launch.missing(device)

    def ready(
        self,
        program: Program,
        dtypes: Mapping[str, torch.dtype],
        states: Sequence[dict[str, Any]],
        shapes: Sequence[Sequence[int]],
        wholes: Sequence[Sequence[int]],
        regions: Sequence[Region],
        device: torch.device,
        counts_there: bool,
    ) -> Ready:
        """What steps parameters in the memory of a GPU."""
        from steprule.engine.runners.kernels.counters import Counters, keys_of
        from steprule.engine.runners.kernels.gpu.counters import DeviceCounters, DeviceKeys, SentCounters
        from steprule.engine.runners.kernels.gpu.launch import Launch

        counted = keys_of(program, states[0])
        launch = Launch(program, dtypes, shapes, regions, device)
        facts = facts_of(program, dtypes, wholes)
        given = program, facts, counted, columns(states, counted)
        if counts_there:
            counters: Any = DeviceCounters(program, states, device, launch.dtype, facts)
        elif len(program.scalars) > 1:
            counters = SentCounters(*given, device)
        else:
            counters = Counters(*given)
        return Ready(launch, counters, DeviceKeys(states, device))


def facts_of(
    program: Program, dtypes: Mapping[str, torch.dtype], shapes: Sequence[Sequence[int]]
) -> list[dict[str, float]]:
    """What a program asks about each of these tensors."""
    return [lines.facts(shape, torch.float64 in dtypes.values(), program.facts) for shape in shapes]


def columns(states: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[list[Tensor]]:
    """For each key, the entry of every state."""
    return [[state[key] for state in states] for key in keys]
