"""Shared state of replicas: every process has the whole model, and keeps the state of some rows only (ZeRO-1).

While it steps, the optimizer has a DTensor in place of each parameter, of which the part here is a view of the
parameter's rows. So it steps as any other optimizer of sharded parameters, and then gets everybody's rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from steprule import process_errors as errors
from steprule.engine import plans, storage
from steprule.engine.elsewhere import Elsewhere, Purpose
from steprule.engine.rule import RuleOptimizer
from steprule.engine.sharding import exchange, parts

# Of smaller parameters every process keeps all: to send them would take longer than to step them.
SMALLEST = 4096


class _Twin(NamedTuple):
    """A parameter, the DTensor in its place, the address that both have, and the rows of each process."""

    param: Tensor
    sharded: Any
    address: int
    rows: list[Tensor]


class Shares(Elsewhere):
    """How the state of one optimizer is shared."""

    state_is: ClassVar[str] = "shared"

    def __init__(self, mesh: Any):
        super().__init__()
        self.mesh = mesh
        self._processes = exchange.Processes(mesh)
        self._twins: dict[int, _Twin] = {}
        # In a step, the twins by their DTensors, and who has stepped all of which.
        self._by_sharded: dict[int, _Twin] = {}
        self._owners: dict[int, int] = {}

    def __reduce__(self) -> Any:
        # Of an optimizer that is copied or pickled: process groups cannot be.
        return Shares, (self.mesh,)

    def __deepcopy__(self, memo: Any) -> Shares:
        return Shares(self.mesh)

    def check(self, optimizer: RuleOptimizer, group: dict[str, Any], index: int) -> None:
        """Refuse a group whose state cannot be kept as it asks for if each process keeps a share of it."""
        own = optimizer.composition(group)
        twins = [self._twin(p).sharded if self._is_shared(p) else p for p in group["params"]]
        storage.check_parameters(own.rule.__name__, own.slots, {**group, "params": twins}, index)

    @contextmanager
    def inside(self, optimizer: Any, to: Purpose = "look") -> Generator[None]:
        """In the `with` block, the optimizer has DTensors in place of the parameters that are shared.

        After the block, everybody gets the rows that have moved.
        """
        twins = self._of(optimizer)
        self._by_sharded = {id(x.sharded): x for x in twins}
        self._owners = {}
        if to == "step":
            for twin in twins:
                twin.sharded.grad = self._gradient(optimizer, twin)
        self._exchange(optimizer, {id(x.param): x.sharded for x in twins})
        try:
            yield
        finally:
            self._exchange(optimizer, {id(x.sharded): x.param for x in twins})
            for twin in twins:
                twin.sharded.grad = None
        if to != "look":
            with exchange.others_wait():
                self._processes.spread(self._moved(twins))
            # Nothing else tells autograd of rows that were stepped here.
            torch.autograd.graph.increment_version([twin.param for twin in twins])

    def _moved(self, twins: Sequence[_Twin]) -> list[list[Tensor]]:
        """What each process has stepped for all: its rows, and the parameters that it owns."""
        found: list[list[Tensor]] = [[] for _ in range(len(self._processes))]
        for twin in twins:
            owner = self._owners.get(id(twin.sharded))
            if owner is not None:
                found[owner].append(twin.param.detach())
            else:
                for own, rows in zip(found, twin.rows, strict=True):
                    own.append(rows)
        return found

    def replica(self, other: Tensor) -> Tensor | None:
        """The parameter in whose place a DTensor is."""
        twin = self._by_sharded.get(id(other))
        return None if twin is None else twin.param

    def owned(self, other: Tensor, owner: int, new: Tensor | None) -> None:
        """Have its owner send everybody all of a parameter."""
        self._owners[id(other)] = owner
        if new is not None:
            self._by_sharded[id(other)].param.detach().copy_(new)

    def cut_state(self, optimizer: Any) -> None:
        """Inside, keep what belongs here of entries that are whole, as those of a loaded checkpoint may be."""
        with torch.no_grad():
            for group in optimizer.param_groups:
                for param in filter(parts.sharded, group["params"]):
                    state = optimizer.state.get(param)
                    if state:
                        new = optimizer.state_to_come(param, group, {}, optimizer.place_of(param))
                        state.update({key: _cut(x, new.get(key)) for key, x in state.items()})

    def _of(self, optimizer: Any) -> list[_Twin]:
        """The twins of all parameters that are shared."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        found = [self._twin(p) for p in params if self._is_shared(p)]
        self._twins = {id(x.param): x for x in found}
        return found

    def _is_shared(self, param: Tensor) -> bool:
        if is_lazy(param) or parts.sharded(param) or param.numel() < SMALLEST:
            return False
        return param.dim() > 0 and param.shape[0] >= len(self._processes)

    def _twin(self, param: Tensor) -> _Twin:
        known = self._twins.get(id(param))
        if known is not None and known.address == param.data_ptr() and known.sharded.shape == param.shape:
            return known
        from torch.distributed.tensor import DTensor, Shard

        count = len(self._processes)
        regions = [parts.region_at(param.shape, [Shard(0)], (count,), (at,)) for at in range(count)]
        rows = [param.detach()[parts.within(x)] for x in regions]
        layout = {"shape": param.shape, "stride": param.stride(), "run_check": False}
        made = cast(Any, DTensor).from_local(rows[self._processes.here], self.mesh, [Shard(0)], **layout)
        return _Twin(param, nn.Parameter(made, param.requires_grad), param.data_ptr(), rows)

    def _gradient(self, optimizer: Any, twin: _Twin) -> Tensor | None:
        gradient = twin.param.grad
        if gradient is None:
            return None
        if gradient.layout != torch.strided:
            raise errors.shared_and_sparse(type(optimizer).__name__, optimizer.name_of(twin.param))
        own, here = twin.sharded._local_tensor, parts.within(parts.region_of(twin.sharded))
        return parts.like(twin.sharded, parts.in_order(gradient.detach()[here], own), gradient.shape)


def _cut(value: Any, like: Any) -> Any:
    """What belongs here of a whole entry, kept as another entry is."""
    if not isinstance(value, Tensor) or parts.sharded(value) or not parts.sharded(like):
        return value
    from torch.distributed.tensor import DTensor

    part = value[parts.within(parts.region_of(like))].clone()
    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return cast(Any, DTensor).from_local(part, like.device_mesh, like.placements, **layout)


def shard_state(optimizer: Any, mesh: Any = None) -> Any:
    """Have each process keep a part of the state only, where all processes have the whole model.

    Use it under DistributedDataParallel if the state takes too much memory: each process keeps an equal share
    of it, the numbers stay those of the whole state to the bit, and after each step every process gets the
    rows that the others have stepped. With `fully_shard` there is no need for it.

        model = DistributedDataParallel(model)
        optimizer = steprule.shard_state(steprule.AdamW(model))

    The state is then made of DTensors: `get_optimizer_state_dict` and `torch.distributed.checkpoint` save and
    load it, with any number of processes, also without `shard_state`. `load_state_dict` takes whole state, too.
    Of parameters of fewer than 4,096 elements, or of fewer rows than there are processes, all keep all of it.
    Weights to evaluate with are made by all processes together: call `eval()` and `train()` in each.

    optimizer: of any rule that is stated in an `update` and steps with gradients alone. Its state may exist.
    mesh: of one dimension, the processes that have the same parameters and gradients; all if left out.

    Returns the optimizer. Raises: TypeError for anything but an optimizer of steprule; ValueError for
    parameters that are DTensors, for differentiable steps, for rules that use the curvature, and for state in
    8 bits whose blocks would be cut; RuntimeError without a process group.
    Source: Rajbhandari, Rasley, Ruwase, He 2020, "ZeRO", §5.1, https://arxiv.org/abs/1910.02054
    """
    import torch.distributed as dist

    who = type(optimizer).__name__
    if not isinstance(optimizer, RuleOptimizer):
        raise errors.no_stated_rule("shard_state", who)
    if not dist.is_available() or not dist.is_initialized():
        raise errors.no_processes(who)
    _check(who, optimizer, mesh)
    if mesh is None:
        from torch.distributed.device_mesh import init_device_mesh

        device = next(p.device.type for group in optimizer.param_groups for p in group["params"])
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    before = {param: dict(state) for param, state in optimizer.state.items()}
    shares = Shares(mesh)
    for index, group in enumerate(optimizer.param_groups):
        shares.check(optimizer, group, index)
    plans.forget(optimizer)
    try:
        with shares.inside(optimizer):
            shares.cut_state(optimizer)
            optimizer.init_state()
    except BaseException:
        optimizer.state = defaultdict(dict, before)
        raise
    optimizer.elsewhere = shares
    return optimizer


def _check(who: str, optimizer: RuleOptimizer, mesh: Any) -> None:
    if optimizer.elsewhere is not None:
        problem = f"its state is {optimizer.elsewhere.state_is} already"
        raise errors.not_shared(who, problem, "Call either shard_state or state_on_host, once.")
    if mesh is not None and getattr(mesh, "ndim", None) != 1:
        raise errors.not_shared(
            who, "the mesh has not one dimension", "Give one of its dimensions: mesh['name']."
        )
    if parts.any_sharded(optimizer.param_groups):
        problem = "some parameters are DTensors, whose state is sharded as they are"
        raise errors.not_shared(who, problem, "Leave shard_state out.")
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            problem = "a differentiable step needs whole tensors"
            raise errors.not_shared(who, problem, "Pass differentiable=False.")
        if hasattr(optimizer.composition(group).rule, "estimate"):
            problem = "estimates of the curvature are of whole parameters"
            raise errors.not_shared(who, problem, "Use another rule, or fully_shard.")
