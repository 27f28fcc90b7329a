"""Sharded parameters: two processes that each hold a part get the results of one that holds all."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import finish, started
from rules import LOOPS, assert_same, flat, numbers
from test_storage_runners import STORAGES, can_keep
from torch import nn

import steprule
from steprule.declare import Matrix
from steprule.engine import storage
from steprule.words import largest, mean, norm

# Parts of unequal size, parts that end within a block, and one that is empty in the second process.
SHAPES = ((101, 64), (7,), (1, 5))
JOBS = [
    (case, name)
    for case in LOOPS
    for name, (_, options) in STORAGES.items()
    if case.elementwise
    and not case.sparse_only
    and can_keep(case, name)
    and options.get("state_dtype") != "int8"
]


def compare(rank: int, folder: str) -> None:
    """Step every rule in every storage on shards and on whole tensors, and fail at the first difference."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def shards(x: torch.Tensor) -> Any:
        return distribute_tensor(x, mesh, [Shard(0)])

    for case, name in JOBS:
        dtype, options = STORAGES[name]
        whole = [nn.Parameter(numbers(shape, dtype, i)) for i, shape in enumerate(SHAPES)]
        parts = [nn.Parameter(shards(p.detach().clone())) for p in whole]
        torch.manual_seed(7)
        loop = case.rule(whole, **case.options, **options, foreach=False)
        given = case.rule(parts, **case.options, **options)
        for number in range(3):
            for place, (p, q) in enumerate(zip(whole, parts, strict=True)):
                p.grad = numbers(tuple(p.shape), dtype, 10 * number + place)
                q.grad = shards(p.grad)
            for optimizer in (loop, given):
                case.step(optimizer)
        for p, q in zip(flat(loop), flat(given), strict=True):
            assert_same(q.to_local().detach(), part_of(p.detach(), rank), f"{case} in {name}, rank {rank}")
            for key, value in loop.state[p].items():
                own = given.state[q][key]
                pair = (own.to_local(), part_of(value, rank)) if value.shape == p.shape else (own, value)
                assert_same(*pair, f"{case} in {name}, rank {rank}: {key}")
    dist.destroy_process_group()


def part_of(whole: torch.Tensor, rank: int) -> torch.Tensor:
    """The rows that this process holds."""
    parts = whole.chunk(2)
    return parts[rank] if rank < len(parts) else whole[:0]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_every_rule_in_every_storage_on_shards(tmp_path: Path) -> None:
    in_two_processes("compare", tmp_path)


def in_two_processes(what: str, folder: Path, module: str = "test_sharded") -> None:
    """Run `what(rank, folder)` of a module of tests in two processes; if one fails, so does this."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    script = f"import sys, {module} as t; t.{what}(int(sys.argv[1]), sys.argv[2])"
    command = ("-W", "ignore", "-c", script)
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(started(*command, str(rank), str(folder), env=environment)) for rank in range(2)
        ]
        for rank in ranks:
            finish(rank)


class Reduces(steprule.Elementwise):
    """A user's rule with sums over the whole tensor."""

    lr: float = steprule.hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * (g - mean(g)) / (norm(g) + largest(abs(g)))


def refuse_or_agree(rank: int, folder: str) -> None:
    """Rules on matrices refuse parts and step what is whole; a user's reductions are over the whole tensor."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for rule in (steprule.Muon, steprule.Adafactor, steprule.LBFGS, UserMatrix):
        for placement in (Shard(0), Shard(1)):
            part = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [placement]))
            with pytest.raises(ValueError, match=f"{rule.__name__}: parameter 0 .*is a DTensor that is split"):
                rule([part])
            named = [("weight", part)]
            with pytest.raises(ValueError, match=f"{rule.__name__}: 'weight' .*is a DTensor that is split"):
                rule(named)
            rows = [steprule.Centralize()]
            with pytest.raises(
                ValueError, match=r"AdamW\+Centralize: parameter 0 .*is a DTensor that is split"
            ):
                steprule.AdamW([part], modifiers=rows)
    for rule in (steprule.Muon, steprule.Adafactor, UserMatrix, Reduces):
        for placement in (Replicate(), *([Shard(0), Shard(1)] if rule is Reduces else [])):
            for shape in ((7, 5), (1, 5)):
                x, g = (numbers(shape, torch.float32, seed) for seed in (1, 2))
                whole, given = nn.Parameter(x), nn.Parameter(distribute_tensor(x.clone(), mesh, [placement]))
                whole.grad, given.grad = g, distribute_tensor(g, mesh, [placement])
                for optimizer in (rule([whole]), rule([given])):
                    optimizer.step()
                assert torch.allclose(given.full_tensor(), whole, rtol=1e-6, atol=1e-7)
    dist.destroy_process_group()


class UserMatrix(Matrix):
    """A user's rule on matrices."""

    lr: float = steprule.hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        return -h.lr * g


def stay_equal(rank: int, folder: str) -> None:
    """Replicas under DDP in processes with different seeds."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for dtype, options in ((torch.float32, "int8"), (torch.float32, "bf16"), (torch.bfloat16, None)):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(128, 64).to(dtype))
        x = torch.randn(8, 128, dtype=dtype)
        torch.manual_seed(100 + rank)
        low = "stochastic" if options is None else None
        optimizer = steprule.AdamW(model.parameters(), lr=1e-2, state_dtype=options, low_precision=low)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - 1).float().square().mean().backward()
            optimizer.step()
        own = model.module.weight.detach().float()
        everyone = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(everyone, own)
        assert torch.equal(*everyone), options
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("what", ["refuse_or_agree", "stay_equal"])
def test_in_two_processes(what: str, tmp_path: Path) -> None:
    in_two_processes(what, tmp_path)


def test_a_parameter_that_becomes_split_is_refused_before_anything_moves() -> None:
    optimizer = steprule.Muon([nn.Parameter(torch.ones(4, 4))])
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "split", lambda tensor: True)
        with pytest.raises(RuntimeError, match="Muon: parameter 0 is a DTensor that is split"):
            optimizer.step()
    assert torch.equal(param, torch.ones(4, 4))


def test_codes_refuse_shards() -> None:
    class Part(nn.Parameter):
        """Stands in for a DTensor."""

        def to_local(self) -> None:
            raise AssertionError("nothing is read")

    part = Part(torch.zeros(100, 100))
    with pytest.raises(ValueError, match=r"'int8' does not go with parameter 0 .* which is sharded"):
        steprule.AdamW([part], state_dtype="int8")


def test_a_curvature_that_is_no_dtensor_is_refused() -> None:
    class Part(nn.Parameter):
        """Stands in for a DTensor."""

        def to_local(self) -> None:
            raise AssertionError("nothing is read")

    part = Part(torch.zeros(3))
    with pytest.raises(ValueError, match="the curvature of parameter 0 is a plain tensor, must be a DTensor"):
        steprule.AdaHessian([part]).update_hessian({part: torch.ones(3)})
