"""What the tests of the GPU kernels share: a GPU, or Triton's interpreter where there is none."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from kernels import with_one_nan
from rules import Case, assert_same, flat, numbers, uses_curvature
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from steprule.engine import blocks, storage
from steprule.engine.runners.kernels import batch, counters, runner
from steprule.engine.runners.kernels.gpu import counters as gpu_counters
from steprule.engine.runners.kernels.gpu import launch as gpu_launch
from steprule.engine.runners.kernels.runner import CpuKernels, GpuKernels

pytest.importorskip("triton", reason="Triton makes the GPU kernels, and is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


CHUNK, BLOCK = 256, 128
# 0-dim, one, none, less than a block, a block and one, a chunk in many dimensions, over two and a bit.
SHAPES = ((), (1,), (0,), (3,), (BLOCK + 1,), (2, CHUNK // 4, 2), (2 * CHUNK + 21,))


@contextlib.contextmanager
def small_chunks(chunk: int = CHUNK, block: int = BLOCK) -> Iterator[None]:
    """Small tensors are split as large ones are, and the interpreter has the hardware's multiply-add."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(gpu_launch, "CHUNK", chunk)
        patch.setattr(gpu_launch, "BLOCK", block)
        if INTERPRETED:
            import triton.language as tl
            from triton.runtime import interpreter

            assert type(tl.sum).__name__ == "InterpretedFunction", "Triton is not an interpreter"
            patch.setattr(interpreter.InterpreterBuilder, "create_fma", _fused_multiply_add)
            patch.setattr(interpreter, "_patch_lang", partial(_patch_once, interpreter._patch_lang))
        yield


def pretend_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Tensors in the memory of the host are stepped as those on a GPU are."""
    patch.setattr(CpuKernels, "on", lambda self, device: False)
    patch.setattr(GpuKernels, "on", lambda self, device: True)


def _patch_once(patch_language: Any, function: Any) -> Any:
    """Triton patches its language at every call of a function, which takes a third of the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    seen = [module for module in (tl, tl.core) if module in function.__globals__.values()]
    if any(tl.core.is_builtin(module.load) for module in seen):
        return patch_language(function)
    return interpreter._LangPatchScope()


def _fused_multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    operands = [torch.tensor(operand.data) for operand in (z, x, y)]
    return type(z)(_as_array(torch.addcmul(*operands)), z.dtype.scalar)


_as_array = Tensor.numpy


def parameters(shapes: Any, dtype: torch.dtype, device: Any = DEVICE) -> list[nn.Parameter]:
    return [nn.Parameter(numbers(shape, dtype, 100 + i).to(device)) for i, shape in enumerate(shapes)]


def give(optimizer: Any, step: int, scale: float = 1.0) -> None:
    """Give every parameter the gradient of this number, times the scale."""
    for place, param in enumerate(flat(optimizer)):
        gradient = numbers(tuple(param.shape), param.dtype, 1000 * step + place) * scale
        param.grad = gradient.to(param.device)


def assert_same_numbers(given: Any, wanted: Any, signed_zeros: bool = True) -> None:
    """The same parameters and state to the last bit, wherever they are; any NaN is as good as another."""
    for place, (one, other) in enumerate(zip(flat(given), flat(wanted), strict=True)):
        assert set(given.state[one]) == set(wanted.state[other])
        pairs = {"parameter": (one.detach(), other.detach())}
        pairs |= {key: (given.state[one][key], value) for key, value in wanted.state[other].items()}
        for name, pair in pairs.items():
            clean = [with_one_nan(x).cpu() for x in pair]
            assert_same(*(clean if signed_zeros else [x + 0.0 for x in clean]), f"{name} {place}")


def assert_close_numbers(given: Any, wanted: Any, tolerance: float) -> None:
    """Parameters that are this close."""
    for one, other in zip(flat(given), flat(wanted), strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=tolerance, atol=tolerance)


class Kernels:
    """Steps an optimizer of one group only by its kernels, with its counts on the host or on the device."""

    def __init__(self, optimizer: Any, counts: str = "host"):
        self.optimizer = optimizer
        (self.group,) = optimizer.param_groups
        self.params = [p for p in self.group["params"] if p.grad is not None]
        self.states = [optimizer.state_of(p, self.group) for p in self.params]
        self.program = optimizer.program(self.group)
        self.columns = {"p": self.params, "g": [p.grad for p in self.params]}
        for letter, declared in self.program.slots.items():
            self.columns[letter] = [state[storage.entry_of(state, declared.key)] for state in self.states]
        self.keys = gpu_counters.DeviceKeys(self.states, DEVICE)
        for name, key in batch.beside(self.program, self.states[0]).items():
            self.columns[name] = [state[key] for state in self.states]
        dtypes = {name: column[0].dtype for name, column in self.columns.items()}
        shapes = [p.shape for p in self.params]
        self.facts = runner.facts_of(self.program, dtypes, shapes)
        regions = [blocks.whole(x) for x in shapes]
        self.launch = gpu_launch.Launch(self.program, dtypes, shapes, regions, DEVICE)
        arguments = (self.program, self.states, DEVICE, self.launch.dtype, self.facts)
        self.counters: Any = gpu_counters.DeviceCounters(*arguments) if counts == "device" else None

    def step(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        self.columns["g"] = [p.grad for p in self.params]
        for name, column in self.columns.items():
            self.launch.place(name, [x.data_ptr() for x in column])
        with torch.no_grad():
            if self.counters is None:
                self._host_step()
                self.keys.advance()
                return
            scaling = None
            if (grad_scale, found_inf) != (None, None):
                scaling = self.counters.scaling(grad_scale, found_inf)
            self.counters.next(self.group)
            self._sweeps(scaling)
            self.counters.count(scaling)
            self.keys.advance(scaling)

    def _host_step(self) -> None:
        """A step whose first scalars are computed one tensor at a time."""
        counted = counters.keys_of(self.program, self.states[0])
        counts = [[state[key] for state in self.states] for key in counted]
        if len(self.program.scalars) > 1:
            self.counters = gpu_counters.SentCounters(self.program, self.facts, counted, counts, DEVICE)
            self.counters.next(self.group)
            self._sweeps(None)
            self.counters.count()
            self.counters = None
            return
        self.launch.run([self.scalars(s) for s in self.states], list(range(len(self.states))))

    def _sweeps(self, scaling: Tensor | None) -> None:
        program, counters, launch = self.program, self.counters, self.launch
        reduced: dict[int, Any] = {}
        for number in range(max(map(len, (program.passes, program.scalars, program.columns)))):
            if 0 < number < len(program.scalars):
                counters.add(number, reduced)
            given = counters.table, counters.rows, scaling
            found: list[Any] = []
            if number < len(program.columns) and program.columns[number] is not None:
                found += zip(
                    program.columns[number].reductions, launch.run_columns(*given, number), strict=True
                )
            if number < len(program.passes) and not program.passes[number].idle:
                found += zip(program.passes[number].reductions, launch.run(*given, number), strict=True)
            reduced |= {x.index: launch.finished(x, shares) for x, shares in found}

    def scalars(self, state: dict[str, Any]) -> list[float]:
        """The scalars of one tensor's next step, which is counted."""
        state.get("step", torch.zeros(())).add_(1)
        own = {letter: state[slot.key].item() for letter, slot in self.program.scalar_slots.items()}
        t = state["step"].item() if "step" in state else math.nan
        (stage,) = self.program.scalars
        operands, new = stage.function(self.group, t, own)
        for letter, value in zip(stage.slots, new, strict=True):
            state[self.program.scalar_slots[letter].key].fill_(value)
        return [float(x) for x in operands]


def both(case: Case, dtype: torch.dtype, shapes: Any = SHAPES, **options: Any) -> tuple[Any, Any]:
    """The same optimizer twice: one for the kernels, one for the loop that they must equal."""
    made = [
        case.rule(parameters(shapes, dtype, where), **case.settings, **options) for where in (DEVICE, "cpu")
    ]
    made[1].param_groups[0]["foreach"] = False
    return made[0], made[1]


def advance(case: Case, given: Any, loop: Any) -> None:
    """Three steps of both from the same gradients."""
    give(given, 0)
    # On a GPU an estimate keeps its own tables of what it counts, which no kernels but those of a step follow.
    own = by_shape(case) or (uses_curvature(case.rule) and not INTERPRETED)
    kernels = None if own else Kernels(given)
    with pytest.MonkeyPatch.context() as patch:
        if kernels is None and INTERPRETED:
            pretend_a_gpu(patch)
        for step in range(3):
            for optimizer in (given, loop):
                give(optimizer, step)
                case.prepare(optimizer)
            given.step() if kernels is None else kernels.step()
            loop.step()


def by_shape(case: Case) -> bool:
    """Whether what steps a parameter depends on its shape, so that an optimizer has to sort them out."""
    optimizer = case.make()
    programs = optimizer.program(optimizer.param_groups[0]).kinds
    return len(programs) > 1 or programs[0].lined


class NoLooking(TorchDispatchMode):
    """Refuses everything that reads a value of a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), f"{name} waits"
        return func(*args, **(kwargs or {}))
