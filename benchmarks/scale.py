"""Bytes that each process keeps and sends in a step, from 8 to 16,384 processes, without having them.

    python benchmarks/scale.py [--out benchmarks/results/scale.json] [--page docs/ideas/scale.md]

The parameters of the two models are sharded by rows over torch's fake process group, on the device `meta`; the
optimizer is made of them and gives them their state. What a step sends follows from owners and shards, which
are those of the library; `tests/test_scale.py` compares the sums with what its exchange sends in small groups.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import steprule
from steprule.engine.program import decisions
from steprule.engine.program.program import Program
from steprule.engine.runners import matrices
from steprule.engine.sharding import exchange, operands, owners, parts
from steprule.lab.bench_machine import facts

Shape = tuple[int, ...]
# Of Llama 2: layers, width, width of the feed-forward part, width of keys and values. 32,000 tokens.
MODELS = {"7B": (32, 4096, 11008, 4096), "70B": (80, 8192, 28672, 1024)}
TOKENS = 32_000
RULES: dict[str, Any] = {"AdamW": steprule.AdamW, "Muon": steprule.Muon, "SOAP": steprule.SOAP}
# Processes with the same part (copies of the model), and processes that share a copy.
MESHES = [(1, 8), (1, 64), (1, 512), (1, 1024), (8, 128), (1, 4096), (32, 128), (1, 16384), (128, 128)]
# Of one direction, in bytes per second; the sources are on the page.
NETWORK = 50e9
BEGIN, END = "<!-- Written by benchmarks/scale.py. -->", "<!-- The end of what it writes. -->"


class Shapes(NamedTuple):
    """The parameters of a model: matrices of a layer, how many layers, and all others."""

    hidden: list[Shape]
    layers: int
    others: list[Shape]


# A tensor that is laid out as what moves, and the precision of what moves.
Like = tuple[Any, torch.dtype]


class Moved(NamedTuple):
    """What of a parameter goes to its owner in a step, and what comes back, by name."""

    param: Any
    program: Program
    out: dict[str, Like]
    back: dict[str, Like]


class Counted(NamedTuple):
    """Bytes by process, in the order of ranks. wholes: the most that it has at once of operands and slots."""

    sent: Tensor
    received: Tensor
    wholes: Tensor


def shapes_of(model: str) -> Shapes:
    """The parameters of a model."""
    layers, width, inner, keys = MODELS[model]
    square = [(width, width), (keys, width), (keys, width), (width, width)]
    hidden = [*square, (inner, width), (inner, width), (width, inner)]
    return Shapes(hidden, layers, [(TOKENS, width)] * 2 + [(width,)] * (2 * layers + 1))


@contextmanager
def pretended(replicas: int, shards: int, rank: int = 0) -> Iterator[Any]:
    """A mesh of so many processes, of which only this one is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = replicas * shards
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", (replicas, shards) if replicas > 1 else (shards,))
    finally:
        dist.destroy_process_group()


def made(rule: Any, shapes: Shapes, mesh: Any, device: str = "meta") -> Any:
    """An optimizer of one layer and of all other parameters; AdamW steps what no rule on matrices is for."""
    hidden, others = ([_parameter(x, mesh, device) for x in own] for own in (shapes.hidden, shapes.others))
    return rule([{"params": hidden}, {"params": others, "rule": steprule.AdamW}])


def _parameter(shape: Shape, mesh: Any, device: str) -> nn.Parameter:
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    region = parts.region_at(shape, placements, tuple(mesh.shape), tuple(mesh.get_coordinate()))
    part = torch.zeros(region.shape, device=device)
    stride = tuple(torch.empty(shape, device="meta").stride())
    layout = {"shape": torch.Size(shape), "stride": stride, "run_check": False}
    return nn.Parameter(DTensor.from_local(part, mesh, placements, **layout))


def moved(optimizer: Any) -> list[Moved]:
    """What moves for each parameter that has an owner, in a step by kernels that does no more than most do."""
    found: list[Moved] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            program = decisions.chosen(optimizer.program(group), group, p, state, t=3)
            if parts.split(p) and any(program.stages):
                stages = [i for i, stage in enumerate(program.stages) if stage is not None]
                dtypes = {"g": p.dtype, **matrices.dtypes_of(program, p.dtype)}
                out: dict[str, Like] = {}
                back: dict[str, Like] = {}
                for moves in (operands.moves_of(program, number) for number in stages):
                    out |= {x: (p, dtypes[x]) for x in moves.takes}
                    out |= {f"state.{x}": (state[x], state[x].dtype) for x in moves.read}
                    back |= {x: (p, dtypes[x]) for x in moves.gives}
                    back |= {f"state.{x}": (state[x], state[x].dtype) for x in moves.stored}
                found.append(Moved(p, program, out, back))
    return found


def owners_of(entries: Sequence[Moved], world: int) -> list[int]:
    """Who owns each of these."""
    order = owners.turns(entries[0].param, range(world)) if entries else []
    return owners.owners([x.param.shape for x in entries], order)


def counted(entries: Sequence[Moved], replicas: int, shards: int) -> Counted:
    """What the steps of these parameters send, by the rules of `engine/sharding/owners.py`."""
    world = replicas * shards
    sent, received, wholes = (torch.zeros(world, dtype=torch.int64) for _ in range(3))
    shares = [matrices.Shares(matrices.BYTES) for _ in range(world)]
    rounds: Counter[tuple[int, int]] = Counter()
    for own, owner in zip(entries, owners_of(entries, world), strict=True):
        first = owner - owner % shards
        copy = slice(first, first + shards)
        # What later words of the same step need is kept for them.
        in_rounds = sum(stage is not None for stage in own.program.stages) == 1
        share = shares[owner].share_of(own.program, own.param, {}) if in_rounds else 0
        # The shards of the owner's own copy come to it and go back from it; then they go to all copies.
        for like, dtype in own.out.values():
            room = _rooms(tuple(like.shape), dtype.itemsize, like.placements, shards)
            total, mine = int(room.sum()), int(room[owner - first])
            sent[copy] += room
            sent[owner] -= mine
            received[owner] += total - mine
            rounds[owner, share] += like.numel() * dtype.itemsize
        for like, dtype in own.back.values():
            room = _rooms(tuple(like.shape), dtype.itemsize, like.placements, shards)
            total, mine = int(room.sum()), int(room[owner - first])
            sent[owner] += total - mine
            sent[copy] += room * (replicas - 1)
            received += room.repeat(replicas)
            received[owner] -= mine
    for (owner, _), size in rounds.items():
        wholes[owner] = max(int(wholes[owner]), size)
    return Counted(sent, received, wholes)


def _room(elements: int, size: int) -> int:
    return elements * size + -elements * size % exchange.ALIGNED


@cache
def _rooms(shape: Shape, size: int, placements: Any, shards: int) -> Tensor:
    """What the shard of each process of one copy takes in a message."""
    cuts = placements[-1:]
    sizes = [parts.region_at(shape, cuts, (shards,), (at,)).shape for at in range(shards)]
    return torch.tensor([_room(torch.Size(x).numel(), size) for x in sizes])


def kept(optimizer: Any, layers: int) -> dict[str, int]:
    """Bytes of parameters and of state in the first process, which has the largest shards."""
    found = {"parameters": 0, "state": 0}
    for group, times in zip(optimizer.param_groups, (layers, 1), strict=True):
        states = [x for p in group["params"] for x in optimizer.state[p].values() if isinstance(x, Tensor)]
        for key, tensors in (("parameters", group["params"]), ("state", states)):
            found[key] += times * sum(parts.local(x).numel() * x.element_size() for x in tensors)
    return found


def measured(model: str, rule: str, replicas: int, shards: int) -> dict[str, Any]:
    """One row of the result."""
    begin = time.perf_counter()
    with pretended(replicas, shards) as mesh:
        shapes = shapes_of(model)
        optimizer = made(RULES[rule], shapes, mesh)
        entries = moved(optimizer) * shapes.layers
        count = counted(entries, replicas, shards)
        row = {"model": model, "rule": rule, "replicas": replicas, "shards": shards, "matrices": len(entries)}
        row |= kept(optimizer, shapes.layers)
    row |= {"owners": int((count.wholes > 0).sum()), "sent_mean": int(count.sent.double().mean())}
    row |= {f"{name}_most": int(x.max()) for name, x in count._asdict().items()}
    print(f"{model} {rule} {replicas} × {shards}: {time.perf_counter() - begin:.1f} s", flush=True)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of Markdown."""
    head = (
        "| Model, rule | Processes | Parameters | State | Sent, mean | Sent, most | On the network | Wholes |"
    )
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        copies = f"{row['replicas']} × " if row["replicas"] > 1 else ""
        cells = [
            f"{row['model']}, {row['rule']}",
            f"{copies}{row['shards']:,}",
            *(_bytes(row[key]) for key in ("parameters", "state", "sent_mean", "sent_most")),
            _seconds(max(row["sent_most"], row["received_most"]) / NETWORK),
            _bytes(row["wholes_most"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    if not count:
        return "0"
    unit, size = next(x for x in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if count >= x[1])
    return f"{count / size:.3g} {unit}" if count / size < 100 else f"{count / size:.0f} {unit}"


def _seconds(time: float) -> str:
    if not time:
        return "0"
    return f"{time:.2g} s" if time >= 1 else f"{1e3 * time:.2g} ms" if time < 0.1 else f"{1e3 * time:.0f} ms"


def on_page(result: dict[str, Any]) -> str:
    """What the page has between its two marks."""
    where = result["facts"]
    said = f"Counted at commit {where['commit'][:12]} with torch {where['torch']} on {where['date'][:10]}."
    return f"{BEGIN}\n\n{table(result['rows'])}\n\n{said}\n\n{END}"


def main() -> None:
    """Count everything, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    rows = [measured(*x, *mesh) for x in itertools.product(MODELS, RULES) for mesh in MESHES]
    date = {"date": time.strftime("%Y-%m-%d")}
    result = {"facts": facts(torch.device("cpu")) | date, "network": NETWORK, "rows": rows}
    print(table(rows))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.page:
        text = given.page.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        given.page.write_text(before + on_page(result) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
