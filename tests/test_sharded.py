"""Sharded parameters: two processes that each hold a part come to the numbers of one that holds all."""

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

# Parts of unequal size, parts that end within a block, and one of which the second process has nothing.
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
    """Step every rule in every storage on shards, beside the whole, and refuse the first difference."""
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
    """The rows that are this process's own."""
    parts = whole.chunk(2)
    return parts[rank] if rank < len(parts) else whole[:0]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_every_rule_in_every_storage_on_shards(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    script = "import sys, test_sharded as t; t.compare(int(sys.argv[1]), sys.argv[2])"
    command = ("-W", "ignore", "-c", script)
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(started(*command, str(rank), str(tmp_path), env=environment))
            for rank in range(2)
        ]
        for rank in ranks:
            finish(rank)


def test_codes_refuse_shards() -> None:
    class Part(nn.Parameter):
        """What is known of a DTensor."""

        def to_local(self) -> None:
            raise AssertionError("nothing is read")

    part = Part(torch.zeros(100, 100))
    with pytest.raises(ValueError, match=r"'int8' does not go with parameter 0 .* which is sharded"):
        steprule.AdamW([part], state_dtype="int8")
