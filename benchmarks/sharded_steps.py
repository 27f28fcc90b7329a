"""Steps of sharded parameters beside steps of plain tensors of the same local sizes, in the same processes.

    python benchmarks/sharded_steps.py [--processes 2] [--repeats 15] [--out FILE.json]

Each process is one of gloo's, with one thread. Plain and sharded optimizers take turns; the times are medians
of the first process, the ratio is the median of the ratios within each turn. Whole parameters at their owners
are compared with a step of all of them in one process, on one thread; `bytes` is what one process sends.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import steprule
from steprule.engine import plans
from steprule.lab.bench_machine import facts

SMALL = [(64, 64), (64,)] * 200
BLOCK = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)] * 2
MATRICES = [(256, 256)] * 24


def in_8_bits(params: Any) -> Any:
    """AdamW with its state in 8 bits."""
    return steprule.AdamW(params, state_dtype="int8")


# Name, shapes, optimizer, and whether plain tensors have the sizes of the parts or of the wholes.
CASES: list[tuple[str, list[Any], Any, str]] = [
    ("AdamW, 400 small tensors", SMALL, steprule.AdamW, "parts"),
    ("AdamW, two blocks of GPT-2", BLOCK, steprule.AdamW, "parts"),
    ("AdamW in int8, two blocks of GPT-2", BLOCK, in_8_bits, "parts"),
    ("Muon, 24 matrices", MATRICES, steprule.Muon, "wholes"),
    ("LAMB, two blocks of GPT-2", BLOCK, steprule.LAMB, "parts"),
]


def measure(rank: int, processes: int, repeats: int, folder: str) -> None:
    """One of the processes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    rows: list[dict[str, Any]] = []
    for name, shapes, make, plain_sizes in CASES:
        wholes = [torch.randn(shape) for shape in shapes]
        parts = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in wholes]
        own = wholes if plain_sizes == "wholes" else [x._local_tensor.detach().clone() for x in parts]  # type: ignore[attr-defined]
        plain = [nn.Parameter(x) for x in own]
        for p in (*plain, *parts):
            p.grad = torch.ones_like(p)
        optimizers = make(plain), make(parts)
        times: list[list[float]] = [[], []]
        for turn in range(repeats + 2):
            for optimizer, found in zip(optimizers, times, strict=True):
                dist.barrier()
                # Of wholes, one process alone steps them all: it has no other to wait for.
                if optimizer is optimizers[0] and plain_sizes == "wholes" and rank:
                    continue
                begin = time.perf_counter()
                optimizer.step()
                if turn > 1:
                    found.append(1e3 * (time.perf_counter() - begin))
        if rank == 0:
            routes = plans.of(optimizers[1]).here._routes.values()
            rows.append(
                {
                    "case": name,
                    "plain_ms": statistics.median(times[0]),
                    "sharded_ms": statistics.median(times[1]),
                    "ratio": statistics.median(b / a for a, b in zip(*times, strict=True)),
                    "bytes": sum(x.sent for x in routes),
                    "plain": "the same local sizes" if plain_sizes == "parts" else "all in one process",
                }
            )
            print(
                "{case:36} {plain_ms:8.2f} ms {plain}, {sharded_ms:8.2f} ms sharded, {ratio:.2f} x".format(
                    **rows[-1]
                )
            )
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


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
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(
            json.dumps(
                {"facts": facts(torch.device("cpu")), "processes": given.processes, "rows": rows}, indent=1
            )
        )


if __name__ == "__main__":
    main()
