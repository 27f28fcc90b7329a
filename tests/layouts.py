"""Ways to shard a tensor over processes, and processes that do it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from processes import finish, started
from torch import Tensor


def in_processes(count: int, what: str, folder: Path, module: str) -> None:
    """Run `what(rank, count)` of a module of tests in so many processes; if one fails, so does this."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = (
        f"import sys, layouts, {module} as t\n"
        f"with layouts.joined(int(sys.argv[1]), {count}, sys.argv[2]): t.{what}(int(sys.argv[1]), {count})"
    )
    command = ("-W", "ignore", "-c", script)
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(started(*command, str(rank), str(folder), env=environment))
            for rank in range(count)
        ]
        for rank in ranks:
            finish(rank)


@contextlib.contextmanager
def joined(rank: int, count: int, folder: str) -> Iterator[None]:
    """One of so many processes that talk to each other."""
    from datetime import timedelta

    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=120)
    )
    yield
    dist.destroy_process_group()


def layouts(count: int) -> dict[str, Callable[[Tensor], Any]]:
    """What shards a whole tensor over so many processes, by name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = init_device_mesh("cpu", (count,))
    found: dict[str, Callable[[Tensor], Any]] = {
        "rows": lambda x: distribute_tensor(x, line, [Shard(0)]) if x.dim() else distribute_tensor(x, line, [Replicate()]),
        "columns": lambda x: distribute_tensor(x, line, [Shard(x.dim() - 1)]) if x.dim() else distribute_tensor(x, line, [Replicate()]),
        "repeated": lambda x: distribute_tensor(x, line, [Replicate()]),
    }
    if count == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        found["hsdp"] = lambda x: distribute_tensor(x, grid, [Replicate(), Shard(0)]) if x.dim() else distribute_tensor(x, grid, [Replicate(), Replicate()])
        found["grid"] = lambda x: distribute_tensor(x, grid, [Shard(0), Shard(x.dim() - 1)]) if x.dim() else distribute_tensor(x, grid, [Replicate(), Replicate()])
    return found
