"""Steps of AdamW with shared state, beside whole state and ZeroRedundancyOptimizer, in the same processes.

    python benchmarks/shared_state.py [--processes 2] [--repeats 15] [--out FILE.json]

Each process is one of gloo's, with one thread, and has the whole model: two blocks of GPT-2 and an embedding of
16,000 × 768. All optimizers take turns in random order; a step ends when all processes have ended it. Times are
medians and quartiles of the first process, a ratio is the median of those to `shard_state` within each turn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import steprule
from steprule.lab.bench_machine import facts

BLOCK = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)] * 2
SHAPES = [(16_000, 768), *BLOCK]
OURS = "shard_state"


def makers() -> dict[str, Any]:
    """What makes each optimizer of parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return {
        "whole state": steprule.AdamW,
        OURS: lambda params: steprule.shard_state(steprule.AdamW(params)),
        "ZeroRedundancyOptimizer": lambda params: ZeroRedundancyOptimizer(params, steprule.AdamW, lr=1e-3),
        "ZeroRedundancyOptimizer, bucket views": lambda params: ZeroRedundancyOptimizer(
            params, steprule.AdamW, lr=1e-3, parameters_as_bucket_view=True
        ),
        "ZeroRedundancyOptimizer, torch's AdamW": lambda params: ZeroRedundancyOptimizer(
            params, torch.optim.AdamW, lr=1e-3
        ),
    }


def state_bytes(optimizer: Any) -> int:
    """How much state this process keeps."""
    state = getattr(optimizer, "optim", optimizer).state
    tensors = [x for own in state.values() for x in own.values() if torch.is_tensor(x)]
    local = [getattr(x, "_local_tensor", x) for x in tensors]
    return sum(x.numel() * x.element_size() for x in local)


def measure(rank: int, processes: int, repeats: int, folder: str) -> None:
    """One of the processes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    optimizers: dict[str, Any] = {}
    for name, make in makers().items():
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers[name] = make(params)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(repeats + 2):
        names = list(optimizers)
        # In the same order in all processes, in another one each time.
        random.Random(turn).shuffle(names)
        for name in names:
            dist.barrier()
            begin = time.perf_counter()
            optimizers[name].step()
            dist.barrier()
            if turn > 1:
                times[name].append(1e3 * (time.perf_counter() - begin))
    kept: list[Any] = [None] * processes
    dist.all_gather_object(kept, {name: state_bytes(optimizer) for name, optimizer in optimizers.items()})
    if rank == 0:
        rows = [_row(name, own, times[OURS], [x[name] for x in kept]) for name, own in times.items()]
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _row(name: str, times: list[float], ours: list[float], kept: list[int]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(a / b for a, b in zip(times, ours, strict=True))
    row = {
        "optimizer": name,
        "ms": middle,
        "quartiles": [low, high],
        "to_shard_state": ratio,
        "state_bytes": kept,
    }
    sizes = ", ".join(f"{x / 1e6:.1f}" for x in kept)
    print(f"{name:40} {middle:8.1f} ms ({low:.1f} to {high:.1f}), {ratio:.2f} x, MB of state: {sizes}")
    return row


def main() -> None:
    """Start the processes, and write what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (given.processes, given.repeats, folder)
        context = multiprocessing.get_context("spawn")
        started = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(given.processes)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise SystemExit("a process has failed")
        rows = json.loads((Path(folder) / "rows.json").read_text())
    if given.out:
        result = {
            "facts": facts(torch.device("cpu")) | {"date": time.strftime("%Y-%m-%d"), "threads": 1},
            "processes": given.processes,
            "rows": rows,
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
