"""Shards on a GPU step as whole tensors do there, bit for bit; sums and matrices are sent from its memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from torch import Tensor, nn

import steprule

SHAPES = ((64, 48), (7,), (33, 16), (128, 128), (5, 3, 2), (256,))
MATRICES = ("muon", "soap", "kron")
NAMES = ("sgd", "adamw", "lamb", "adafactor", "prodigy", "adamw+global_norm_clip", *MATRICES)
CASES = [*((name, "fp32") for name in NAMES), ("adamw", "int8"), ("lamb", "int8"), ("muon", "int8")]
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("device", "backend", "count"),
    [
        ("cpu", "gloo", 1),
        pytest.param("cuda", "nccl", 1, marks=ON_A_GPU),
        # NCCL takes one process per GPU.
        pytest.param("cuda", "gloo", 2, marks=ON_A_GPU),
    ],
)
def test_shards_step_as_whole_tensors(device: str, backend: str, count: int, tmp_path: Path) -> None:
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    answer = python("-W", "ignore", __file__, device, backend, str(count), str(tmp_path / "store"), env=path)
    assert answer.splitlines() == [f"{name} {kept}" for name, kept in CASES]


def main(rank: int, device: str, backend: str, count: int, store: str) -> None:
    """One of the processes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=count)
    mesh = init_device_mesh(device, (count,))
    for name, kept in CASES:
        step(name, kept, device, mesh)
        if rank == 0:
            print(name, kept, flush=True)
    dist.barrier()
    dist.destroy_process_group()


def step(name: str, kept: str, device: str, mesh: Any) -> None:
    """Three steps of one rule, with shards and with the whole; matrix rules take the matrices."""
    from torch.distributed.tensor import DTensor, Shard

    def own(x: Tensor) -> Tensor:
        found = x.detach().chunk(mesh.size())
        return found[mesh.get_rank()].contiguous()

    def sharded(x: Tensor) -> Any:
        layout: Any = {"shape": x.shape, "stride": x.stride(), "run_check": False}
        return DTensor.from_local(own(x), mesh, [Shard(0)], **layout)

    def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

    shapes = [x for x in SHAPES if len(x) == 2 or name not in MATRICES]
    whole = [nn.Parameter(drawn(shape, i)) for i, shape in enumerate(shapes)]
    shards = [nn.Parameter(sharded(p)) for p in whole]
    one, other = (steprule.create(name, params, state_dtype=kept) for params in (shards, whole))
    for number in range(3):
        for place, (p, q) in enumerate(zip(shards, whole, strict=True)):
            q.grad = drawn(tuple(q.shape), 100 * (number + 1) + place)
            p.grad = sharded(q.grad)
        one.step()
        other.step()
    for p, q in zip(shards, whole, strict=True):
        assert torch.equal(p.to_local(), own(q)), (name, kept, tuple(q.shape))


if __name__ == "__main__":
    kind, way, processes, file = sys.argv[1:]
    given = (kind, way, int(processes), file)
    if processes == "1":
        main(0, *given)
    else:
        torch.multiprocessing.spawn(main, args=given, nprocs=int(processes))
