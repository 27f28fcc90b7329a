"""Ways to shard a tensor over processes, and processes that do it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from processes import python
from torch import Tensor

Put = Callable[[Tensor], Any]


def in_processes(count: int, what: str, folder: Path, module: str, *more: str | int) -> None:
    """Run `what(rank, *more)` of a module of tests in so many processes; if one fails, so does this."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = (
        f"import layouts, {module} as t\n"
        f"layouts.in_copies({count}, {str(folder)!r}, lambda rank: t.{what}(rank, *{more!r}))"
    )
    python("-W", "ignore", "-c", script, env=environment)


def in_copies(count: int, folder: str, run: Callable[[int], None]) -> None:
    """Run a function in so many copies of this process: each on its own would import torch for seconds."""
    copies: set[int] = set()
    for rank in range(count):
        copy = os.fork()
        if copy == 0:
            _as_one_of(rank, count, folder, run)
        copies.add(copy)
    while copies:
        copy, status = os.wait()
        copies.remove(copy)
        if status:
            # The others would wait for it.
            for other in copies:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def _as_one_of(rank: int, count: int, folder: str, run: Callable[[int], None]) -> NoReturn:
    code = 1
    try:
        with joined(rank, count, folder):
            run(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread of gloo that is still there would abort an orderly end, once in many runs.
    os._exit(code)


@contextlib.contextmanager
def joined(rank: int, count: int, folder: str) -> Iterator[None]:
    """One of so many processes that talk to each other."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=180)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=patience)
    yield
    dist.destroy_process_group()


@cache
def layouts() -> dict[str, Put]:
    """What shards a whole tensor over all processes, by name; a single number is repeated."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    count = dist.get_world_size()

    def put(mesh: Any, *dims: int | None) -> Put:
        def sharded(x: Tensor) -> Any:
            last = x.dim() - 1
            wanted = [Replicate() if d is None or last < 0 else Shard(min(d, last)) for d in dims]
            return distribute_tensor(x, mesh, wanted)

        return sharded

    line = init_device_mesh("cpu", (count,))
    found = {"rows": put(line, 0), "columns": put(line, 1), "repeated": put(line, None)}
    if count == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        found |= {"hsdp": put(grid, None, 0), "grid": put(grid, 0, 1), "strided": strided(grid)}
    return found


def strided(grid: Any) -> Put:
    """What shards rows as `fully_shard` does over the first dimension of a mesh, after tensor parallelism."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    outer, inner = grid.get_coordinate()
    _, count = grid.shape

    def sharded(x: Tensor) -> Any:
        layout: Any = {"shape": x.shape, "stride": x.stride(), "run_check": False}
        if not x.dim():
            return DTensor.from_local(x, grid, [Replicate(), Replicate()], **layout)
        own = share(share(x, count, inner), grid.shape[0], outer)
        return DTensor.from_local(own, grid, [_StridedShard(0, split_factor=count), Shard(0)], **layout)

    return sharded


def share(x: Tensor, count: int, place: int) -> Tensor:
    """One of so many parts of the rows, as torch makes them: the last ones may be empty."""
    found = x.chunk(count)
    return found[place].contiguous() if place < len(found) else x[:0]


def whole(x: Any) -> Tensor:
    """All of a tensor."""
    if not hasattr(x, "full_tensor"):
        return x
    # gloo does not send 16-bit integers.
    return x.to(torch.int32).full_tensor().to(x.dtype) if x.dtype == torch.int16 else x.full_tensor()
