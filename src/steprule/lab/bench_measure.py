"""How a step is measured: which optimizers take part, in which order, the floor, and the memory."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import random
import statistics
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steprule.engine.optimizer import CheckedOptimizer
from steprule.engine.rule import RuleOptimizer
from steprule.engine.runners import choice
from steprule.lab.bench_models import mlp
from steprule.lab.bench_modified import Modified
from steprule.lab.errors import LabError

__all__ = [
    "OURS",
    "STATES",
    "WITHOUT",
    "Entrants",
    "Mover",
    "Rule",
    "Timing",
    "bytes_moved",
    "cold_samples",
    "entrants",
    "iterations",
    "peak_bytes",
    "ratio",
    "rehearse",
    "runner_of",
    "sample_seconds",
    "samples_of",
]

OURS = "steprule"
# The default again, with its state in fewer bits.
STATES = {f"{OURS} {kind} state": kind for kind in ("bf16", "int8")}
# Beside a rule with modifiers.
WITHOUT = f"{OURS} without"
SAMPLE_SECONDS = 0.02
# More than the caches hold, as forward and backward passes touch between two steps; and how many steps after
# that make a sample.
ELSEWHERE_BYTES = 80 * 10**6
COLD_STEPS = 5
BATCH = 32

Action = Callable[[], object]


class Rule(Protocol):
    """A rule of the catalogue, or one with modifiers."""

    __name__: str

    def __call__(self, *arguments: Any, **options: Any) -> CheckedOptimizer:
        """The optimizer, from parameters and hyper-parameters."""
        ...


class Steps(Protocol):
    """What can be measured."""

    def step(self) -> object:
        """Take a step."""
        ...


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of the samples, and their first and third quartile."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """The quartiles of these samples."""
        return Timing(*statistics.quantiles(samples, n=4, method="inclusive"))


def ratio(samples: Sequence[float], to: Sequence[float]) -> float:
    """How many times as long the first took: the median of the ratios in each round."""
    return statistics.median(a / b for a, b in zip(samples, to, strict=True))


# Which optimizers take part


@dataclass
class Entrants:
    """The optimizers that could be built and stepped, and why the others could not."""

    optimizers: dict[str, Any]
    absent: dict[str, str]


def runner_of(optimizer: Optimizer) -> str:
    """Which runner steps the optimizer's first group."""
    if not isinstance(optimizer, RuleOptimizer):
        return "its own"
    group = optimizer.param_groups[0]
    return choice.choose(optimizer.composition(group), group).runner.name


def rehearse(rule: Rule, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
    """Try the rule on tiny parameters with the same numbers of dimensions.

    Raises `LabError` with the rule's own message if it cannot step them.
    """
    small = sorted({tuple(min(size, 2) for size in shape) for shape in shapes})
    params = [nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in small]
    for param in params:
        param.grad = torch.ones_like(param)
    _enter(Entrants({}, {}), OURS, lambda: rule(params))


def entrants(rule: Rule, params: list[nn.Parameter]) -> Entrants:
    """steprule's default, foreach, reference and smaller states; torch's for-loop, foreach and fused.

    Each has taken one step, so its state exists and its kernel is compiled. All share the parameters and
    the gradients. Raises `LabError` with the rule's own message if it cannot step these parameters.
    """
    found = Entrants({}, {})
    _enter(found, OURS, lambda: rule(params))
    runner = runner_of(found.optimizers[OURS])
    switches = {"foreach": {"foreach": True}, "reference": {"foreach": False, "fused": False}}
    for name, given in switches.items():
        if name == runner:
            found.absent[f"{OURS} {name}"] = "is the default here"
        else:
            _enter(found, f"{OURS} {name}", lambda given=given: rule(params, **given))
    for name, kind in STATES.items():
        if _keeps_nothing(found.optimizers[OURS], params):
            found.absent[name] = "keeps no state per element"
        else:
            _enter(found, name, lambda kind=kind: rule(params, state_dtype=kind))
    if isinstance(rule, Modified):
        plain: Any = rule.rule
        _enter(found, WITHOUT, lambda: plain(params))
        _enter(found, "torch fused", lambda: rule.by_hand(params))
        return found
    theirs: Any = getattr(torch.optim, rule.__name__, None)
    variants = {"for-loop": _off(theirs), "foreach": {"foreach": True}, "fused": {"fused": True}}
    for name, given in variants.items():
        if theirs is None:
            found.absent[f"torch {name}"] = f"torch.optim has no {rule.__name__}"
        else:
            _enter(found, f"torch {name}", lambda given=given: theirs(params, **given))
    return found


def _keeps_nothing(optimizer: Optimizer, params: list[nn.Parameter]) -> bool:
    largest = max(params, key=Tensor.numel)
    kept = [x for x in optimizer.state[largest].values() if isinstance(x, Tensor)]
    return all(x.numel() < largest.numel() for x in kept)


def _off(theirs: Any) -> dict[str, bool]:
    """The arguments that make torch's class use its for-loop."""
    known = inspect.signature(theirs).parameters if theirs else ()
    return {name: False for name in ("foreach", "fused") if name in known}


def _enter(found: Entrants, name: str, make: Callable[[], Steps]) -> None:
    """Build an optimizer and step it once. If that fails, it is absent, unless it is steprule's default."""
    try:
        optimizer = make()
        _begin(optimizer.step)
    except torch.OutOfMemoryError as error:
        raise LabError(f"the device does not have enough memory for this model: {_line(error)}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        if name == OURS:
            raise LabError(_line(error)) from error
        found.absent[name] = _line(error)
    else:
        found.optimizers[name] = optimizer


def _begin(action: Action) -> None:
    """Do it for the first time, without warnings about steps that hardly learn, which do not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        action()


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


# The order


def samples_of(
    actions: Mapping[str, Action], repeats: int, device: torch.device, after_round: Callable[[], None]
) -> dict[str, list[float]]:
    """Milliseconds of one call of each action, a sample per round.

    They take turns in every round, in a new random order, so whatever slows the machine for a while slows all
    of them. A sample of a short action is the mean of many calls, after one that is not counted, so that its
    memory is in the caches.
    """
    calls = {name: _calls(action, device) for name, action in actions.items()}
    samples: dict[str, list[float]] = {name: [] for name in actions}
    names, order = list(actions), random.Random(0)
    for _ in range(repeats):
        order.shuffle(names)
        for name in names:
            if calls[name] > 1:
                actions[name]()
            samples[name].append(_seconds(actions[name], calls[name], device) * 1000)
        after_round()
    return samples


def sample_seconds(action: Action, device: torch.device) -> float:
    """About how long a sample of this action takes."""
    once = _seconds(action, 1, device)
    return max(once, SAMPLE_SECONDS + once)


def _calls(action: Action, device: torch.device) -> int:
    """How many calls make a sample that the clock can measure well."""
    shortest = min(_seconds(action, 1, device) for _ in range(2))
    return max(1, math.ceil(SAMPLE_SECONDS / max(shortest, 1e-6)))


def _seconds(action: Action, calls: int, device: torch.device) -> float:
    """Seconds per call, with the device idle before and after."""
    _wait_for(device)
    started = time.perf_counter()
    for _ in range(calls):
        action()
    _wait_for(device)
    return (time.perf_counter() - started) / calls


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def cold_samples(optimizers: Mapping[str, Any], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of a step after other work on the CPU, a sample per round, of the defaults and torch's.

    Nothing for tensors that the caches could not hold anyway.
    """
    own = optimizers[OURS]
    names = [name for name in optimizers if name in (OURS, WITHOUT) or name.startswith("torch")]
    if bytes_moved(own) > ELSEWHERE_BYTES:
        return {}
    elsewhere, cpu = torch.zeros(ELSEWHERE_BYTES // 4), torch.device("cpu")
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(repeats):
        order.shuffle(names)
        for name in names:
            seconds = 0.0
            for _ in range(COLD_STEPS):
                elsewhere.add_(1.0)
                seconds += _seconds(optimizers[name].step, 1, cpu)
            samples[name].append(seconds / COLD_STEPS * 1000)
    return samples


# The floor


class Mover:
    """Moves as many bytes as a step has to, and does nothing else: the time for that is the floor.

    A step reads the parameter, the gradient and the slots that its program reads, and writes what its
    program writes. Here torch's own `mul_` and `add_` read and write as much: one buffer is changed in place,
    and another one, which is only read, is added to it.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device):
        self.bytes, in_place, alone = _traffic(optimizer)
        self._written = torch.zeros(max(1, in_place // 4), device=device)
        self._read = torch.zeros(alone // 4, device=device)
        self._scale = self.bytes / (8 * self._written.numel() + 4 * self._read.numel())

    def __call__(self) -> None:
        """Move the bytes once."""
        for piece in torch.split(self._read, self._written.numel()):
            self._written[: piece.numel()].add_(piece)
        self._written[self._read.numel() :].mul_(1.0)

    def floor(self, samples: Sequence[float]) -> list[float]:
        """Convert the milliseconds of moving to those that the step's bytes would take at that bandwidth."""
        return [milliseconds * self._scale for milliseconds in samples]


def bytes_moved(optimizer: Optimizer) -> int:
    """The bytes that a step reads and writes."""
    return _traffic(optimizer)[0]


def _traffic(optimizer: Optimizer) -> tuple[int, int, int]:
    """The bytes that a step reads and writes in total, those it changes in place, and those it only reads."""
    total = in_place = alone = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            read, written = _columns(optimizer, group, param)
            sizes = _sizes(optimizer, param)
            read_here = [sum(sizes[x] for x in _with_what_is_beside(sweep, sizes)) for sweep in read]
            written_here = sum(sizes[x] for x in _with_what_is_beside(written, sizes))
            total += sum(read_here) + written_here
            in_place += written_here
            alone += max(0, sum(read_here) - written_here)
    return total, in_place, alone


def _columns(optimizer: Optimizer, group: dict[str, Any], param: Tensor) -> tuple[list[set[str]], set[str]]:
    """What each sweep reads, and what a step writes: 'p', 'g', and the keys of slots.

    A rule that is not traced reads and writes all of them, once.
    """
    if isinstance(optimizer, RuleOptimizer):
        program = optimizer.program(group).of(param)
        keys = {letter: slot.key for letter, slot in program.slots.items()} | {"p": "p", "g": "g"}
        read = [{keys[letter] for letter in sweep.inputs} for sweep in program.passes]
        return read, {keys[letter] for letter in program.outputs}
    everything = set(_sizes(optimizer, param))
    return [everything], everything - {"g"}


def _with_what_is_beside(keys: set[str], sizes: Mapping[str, int]) -> set[str]:
    """The keys of what is read or written, with codes and scales for slots and the extra bits of 'p'."""
    beside = {f"{key}_{what}" for key in keys for what in ("codes", "scale")}
    beside |= {"compensation", "low_bits"} if "p" in keys else set[str]()
    return (keys | beside) & sizes.keys()


def _sizes(optimizer: Optimizer, param: Tensor) -> dict[str, int]:
    """The bytes of the parameter, its gradient and its slots."""
    state: dict[str, Any] = optimizer.state[param]
    tensors: dict[str, Any] = {"p": param, "g": param.grad, **state}
    return {key: x.numel() * x.element_size() for key, x in tensors.items() if isinstance(x, Tensor)}


# The memory


def peak_bytes(step: Action, device: torch.device) -> int:
    """The most memory that a step adds to what it began with: torch's, and Python's and numpy's."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before + (_peak_on_cpu(step) if device.type == "cpu" else _peak_on_device(step, device))


def _peak_on_device(step: Action, device: torch.device) -> int:
    _wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    _wait_for(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(step: Action) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((x for x in events if x["name"] == "[memory]"), key=lambda x: x["ts"])
    held = peak = 0
    for change in changes:
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return peak


# A whole iteration


def iterations(rule: Rule, dtype: torch.dtype, device: torch.device) -> dict[str, Action]:
    """Forward, backward and step of a small network, with steprule's default, torch's default, torch's fused.

    Each has its own copy of the network.
    """
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    layers: list[nn.Module] = []
    for outputs, inputs in mlp():
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    network = nn.Sequential(*layers[:-1]).to(device, dtype)
    last, first = mlp()[-1][0], mlp()[0][1]
    batch = torch.randn(BATCH, first, device=device, dtype=dtype), torch.arange(BATCH, device=device) % last
    theirs: Any = getattr(torch.optim, rule.__name__, None)
    makers: dict[str, Callable[[Any], Optimizer]] = {OURS: rule}
    if theirs is not None:
        makers["torch default"] = theirs
        if "fused" in inspect.signature(theirs).parameters:
            makers["torch fused"] = lambda params: theirs(params, fused=True)
    made: dict[str, Action] = {}
    for name, make in makers.items():
        try:
            action = _iteration(make, copy.deepcopy(network), batch)
            _begin(action)
        except (TypeError, ValueError, RuntimeError) as error:
            if name == OURS:
                raise LabError(f"the small network cannot be trained: {_line(error)}") from error
        else:
            made[name] = action
    return made


def _iteration(make: Callable[[Any], Optimizer], network: nn.Module, batch: tuple[Tensor, Tensor]) -> Action:
    optimizer = make(network.parameters())
    given, target = batch

    def iterate() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(given).float(), target)
        torch.autograd.backward(loss)
        optimizer.step()

    return iterate
