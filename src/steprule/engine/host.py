"""State in main memory: parameters and gradients are copied there, stepped by CPU kernels, and copied back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steprule import errors as messages
from steprule import process_errors as errors
from steprule.engine import gradients
from steprule.engine.beside import Beside
from steprule.engine.checkpoint.state_dicts import tensors_in
from steprule.engine.elsewhere import Elsewhere, Purpose
from steprule.engine.rule import RuleOptimizer
from steprule.engine.runners import sharing
from steprule.engine.sharding import parts

# How many elements are stepped together beside a backward pass: of fewer, a step takes longer in Python than in
# its kernel.
PORTION = 1 << 22


@dataclass
class _Twin:
    """A parameter and its copy in main memory, with room for the gradient.

    pinned: whether the device copies without a detour. used: whether the copy has to have the values.
    """

    param: Tensor
    here: Tensor
    pinned: bool
    used: bool = False
    gradient: Tensor | None = None
    version: int = 0


@dataclass
class Portion:
    """Parameters of one group that are stepped together beside a backward pass, once all have gradients.

    ids: of the parameters, in their order. few: the optimizer as it is for them (`SomeParameters`).
    arrived: the copies of those that have gradients so far.
    """

    ids: list[int]
    few: Any
    arrived: dict[int, _Twin] = field(default_factory=dict[int, _Twin])

    def take(self) -> list[_Twin]:
        """The copies that have arrived, in their order; the next backward pass begins with none."""
        found = [self.arrived[x] for x in self.ids if x in self.arrived]
        self.arrived.clear()
        return found


def portions(params: Sequence[Any]) -> list[list[Any]]:
    """Parameters that are stepped together: backward passes begin with the last ones."""
    found: list[list[Any]] = []
    room = 0
    for param in reversed(params):
        if room <= 0:
            found.append([])
            room = PORTION
        found[-1].insert(0, param)
        room -= 0 if is_lazy(param) else param.numel()
    return found


class OnHost(Elsewhere):
    """How the state of one optimizer is kept in main memory."""

    state_is: ClassVar[str] = "in main memory"

    def __init__(self) -> None:
        super().__init__()
        self._twins: dict[int, _Twin] = {}
        self._beside = Beside()
        # By device, the copies of steps beside the backward pass.
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # What still waits for gradients, by id. Each device has a thread of the backward pass.
        self._waiting: dict[int, Portion] = {}
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        # Of an optimizer that is copied or pickled: the copies belong to its parameters.
        return OnHost, ()

    def check(self, optimizer: Any, group: dict[str, Any], index: int) -> None:
        """Refuse a group whose parameters cannot be stepped in main memory."""
        problem = _problem(optimizer, group)
        if problem is None:
            others = [p for other in optimizer.param_groups if other is not group for p in other["params"]]
            if sharing.memory([*others, *group["params"]]):
                problem = "parameters overlap in memory", "Make them one parameter, or leave state_on_host out."
        if problem is not None:
            raise errors.not_on_host(optimizer.who(group), index, *problem)

    @contextmanager
    def inside(self, optimizer: Any, to: Purpose = "look") -> Generator[None]:
        """In the `with` block, the optimizer has copies of the parameters in main memory, and its state there.

        What changes is copied back, whatever the purpose: new storage may change parameters, too.
        """
        self.wait()
        for index, group in enumerate(optimizer.param_groups):
            check_options(optimizer, group, index)
        twins = self._of(optimizer)
        self._fetch(optimizer, twins, to)
        self._exchange(optimizer, {id(x.param): x.here for x in twins})
        try:
            move_state(optimizer)
            yield
        finally:
            self._exchange(optimizer, {id(x.here): x.param for x in twins})
            with torch.no_grad():
                for twin in twins:
                    _bring_back(twin)

    def begin(self, optimizer: Any, param: Tensor, portion: Portion) -> None:
        """Copy a parameter to main memory during the backward pass, which is calling this.

        With the last one of its portion, a thread begins to step these.
        """
        twin = self._twins[id(param)] = self._twin(param, optimizer)
        # As if it had moved now: what still wants to read the old values is told.
        torch.autograd.graph.increment_version([param])
        stream = self._stream(param.device) if twin.pinned else None
        with _on(stream), torch.no_grad():
            self._fetch_one(optimizer, twin, with_gradient=True)
        with self._lock:
            portion.arrived[id(param)] = twin
            self._waiting[id(portion)] = portion
            if len(portion.arrived) == len(portion.ids):
                self._start(portion)

    def _start(self, portion: Portion) -> None:
        """Have the thread step the parameters of a portion that have gradients."""
        self._waiting.pop(id(portion), None)
        twins = portion.take()
        streams = [self._streams[x] for x in dict.fromkeys(x.param.device for x in twins if x.pinned)]
        # Blocking: the thread does not spin while it waits.
        arrived: list[Any] = [x.record_event(torch.cuda.Event(blocking=True)) for x in streams]
        take = partial(_take_step, twins, portion.few.take_step_with, self._streams, arrived)
        if all(x.pinned or x.param.device.type == "cpu" for x in twins):
            self._beside.begin(take)
        else:
            take()

    def wait(self) -> None:
        """Wait for all steps that were begun. Raises: what one of them has raised."""
        self.settle()
        self._beside.complain()

    def settle(self) -> None:
        """Wait for them, and leave it to `wait` to raise. Portions are begun with the gradients they have."""
        with self._lock:
            for portion in list(self._waiting.values()):
                self._start(portion)
        if self._beside.settle():
            for stream in self._streams.values():
                stream.synchronize()

    def told(self, group: dict[str, Any]) -> list[str]:
        """What a step copies."""
        size = sum(p.numel() * p.element_size() for p in group["params"] if p.requires_grad and not is_lazy(p))
        there, back = messages.counted(2 * size, "byte"), messages.counted(size, "byte")
        return [f"state in main memory; steps there, {there} to it and {back} back each time"]

    def _of(self, optimizer: Any) -> list[_Twin]:
        """The twins of all parameters that have elements."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        found = [self._twin(p, optimizer) for p in params if not (is_lazy(p) or p.is_meta)]
        self._twins = {id(x.param): x for x in found}
        return found

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream for copies, which waits for what the current one has been given so far."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]

    def _twin(self, param: Tensor, optimizer: Any) -> _Twin:
        # Nothing reads the others: memory that nobody touches is never taken, unless it is pinned.
        used = param.requires_grad or param.grad is not None or bool(optimizer.state.get(param))
        pinned = used and param.is_cuda
        known = self._twins.get(id(param))
        if known is None or known.pinned < pinned or not _alike(known.here, param):
            known = _Twin(param, nn.Parameter(_room(param, pinned), param.requires_grad), pinned)
        known.here.requires_grad_(param.requires_grad)
        known.used = used
        return known

    @torch.no_grad()
    def _fetch(self, optimizer: Any, twins: list[_Twin], to: Purpose) -> None:
        """Copy what is read, and wait for it."""
        devices: set[torch.device] = set()
        for twin in twins:
            # One that is left from a step that failed here.
            twin.here.grad = None
            twin.version = twin.here._version
            # A step has no use for parameters without gradients.
            if twin.used and not (to == "step" and twin.param.grad is None):
                self._fetch_one(optimizer, twin, with_gradient=to == "step")
                devices |= {twin.param.device} if twin.pinned else set()
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def _fetch_one(self, optimizer: Any, twin: _Twin, with_gradient: bool) -> None:
        """Begin to copy a parameter."""
        # At every step, since no version tells of what was written by `.data`.
        twin.here.copy_(twin.param, non_blocking=twin.pinned)
        twin.version = twin.here._version
        if with_gradient and twin.param.grad is not None:
            gradients.check_writable(optimizer, type(optimizer).__name__, twin.param)
            self._fetch_gradient(twin, twin.param.grad)

    def _fetch_gradient(self, twin: _Twin, given: Tensor) -> None:
        twin.here.grad_dtype = twin.param.grad_dtype
        if given.layout != torch.strided:
            twin.here.grad = given.detach().to("cpu")
            return
        if twin.gradient is None or not _alike(twin.gradient, given):
            twin.gradient = _room(given, twin.pinned)
        twin.gradient.copy_(given, non_blocking=twin.pinned)
        if twin.pinned:
            # It may be freed before the copy is made.
            given.record_stream(torch.cuda.current_stream(given.device))
        twin.here.grad = twin.gradient


@torch.no_grad()
def _take_step(
    twins: list[_Twin],
    step: Callable[[Sequence[Tensor], Sequence[Tensor]], None],
    streams: dict[torch.device, torch.cuda.Stream],
    arrived: list[Any],
) -> None:
    """Take a step with the copies of parameters, once they have arrived there."""
    for event in arrived:
        event.synchronize()
    try:
        step([x.param for x in twins], [x.here for x in twins])
    finally:
        for twin in twins:
            with _on(streams[twin.param.device] if twin.pinned else None):
                _bring_back(twin)


def _on(stream: torch.cuda.Stream | None) -> Any:
    # Without one, CUDA is not to be initialized.
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _bring_back(twin: _Twin) -> None:
    """Copy a parameter back, if it has changed."""
    twin.here.grad = None
    if twin.here._version != twin.version:
        twin.param.copy_(twin.here, non_blocking=twin.pinned)


def _room(like: Tensor, pinned: bool) -> Tensor:
    """Main memory for a tensor, whose elements lie in the same order: sums depend on it."""
    with torch.inference_mode(False):
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu", pin_memory=pinned)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def move_state(optimizer: Any) -> None:
    """Have all state in main memory, wherever it was made, loaded or moved to."""
    for state in filter(_is_dict, optimizer.state.values()):
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
                state[key] = value.to("cpu")


def _is_dict(x: Any) -> bool:
    return isinstance(x, dict)


def check_options(optimizer: Any, group: dict[str, Any], index: int) -> None:
    """Refuse a group whose options, which may have changed, do not allow a step in main memory."""
    if problem := _problem(optimizer, group):
        raise errors.not_on_host(optimizer.who(group), index, *problem)


def _problem(optimizer: Any, group: dict[str, Any]) -> tuple[str, str] | None:
    """Why a group cannot be stepped in main memory, and what to do."""
    if any(map(parts.sharded, group["params"])):
        fix = "Leave state_on_host out; fully_shard with CPUOffloadPolicy() keeps them in main memory."
        return "parameters are DTensors", fix
    for option, reason in (("differentiable", "autograd"), ("capturable", "a CUDA graph")):
        if group.get(option):
            return f"{option}=True, and {reason} cannot record a step there", f"Pass {option}=False."
    if hasattr(optimizer.rule_of(group), "estimate"):
        return "its rule uses estimates of the curvature, which are on the device", "Use another rule."
    for name, value in group.items():
        if name != "params" and any(x.device.type != "cpu" for x in tensors_in(value)):
            return f"{name} is a tensor on a device", f"Pass {name} as a number, or as a tensor on the CPU."
    return None


def state_on_host(optimizer: Any) -> Any:
    """Keep the state in main memory and step there, where the parameters are on a GPU.

    Use it if the state does not fit beside the model: the GPU's memory then has none of it. At each step
    parameters and gradients are copied to main memory, the CPU's kernels step there, in any storage, 8 bits
    included, and the parameters are copied back. The numbers are those of a step on the CPU.

        model.cuda()
        optimizer = steprule.state_on_host(steprule.AdamW(model))

    A step takes longer than on the GPU: the copies, and the work of the CPU. Rules that step each parameter on
    its own can do both beside the backward pass, in a thread: `step_in_backward(model, optimizer)`. Main memory
    has a copy of the parameters and one of the gradients besides, pinned if these are on CUDA. Checkpoints stay
    as they are, and load with and without `state_on_host`. `memory_report` counts the state only.

    optimizer: of any rule that is stated in an `update` and steps with gradients alone. Its state may exist.
    On the CPU it works, too, and only takes longer.

    Returns the optimizer. Raises: TypeError for anything but an optimizer of steprule; ValueError for
    parameters that are DTensors or overlap in memory, for differentiable and capturable steps, for rules that
    use the curvature, for options that are tensors on a device, and if the state is shared or on the host.
    Source: Ren et al. 2021, "ZeRO-Offload", §3, https://arxiv.org/abs/2101.06840
    """
    who = type(optimizer).__name__
    if not isinstance(optimizer, RuleOptimizer):
        raise errors.no_stated_rule("state_on_host", who)
    if optimizer.elsewhere is not None:
        problem = f"it is {optimizer.elsewhere.state_is} already"
        raise errors.not_on_host(who, None, problem, "Call either state_on_host or shard_state, once.")
    host = OnHost()
    for index, group in enumerate(optimizer.param_groups):
        host.check(optimizer, group, index)
    optimizer.elsewhere = host
    optimizer.reload_state()  # to where the parameters are inside
    return optimizer
