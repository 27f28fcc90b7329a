"""How long training iterations take with the optimizer's state in main memory, on a GPU.

    python benchmarks/host_steps.py [--out FILE.json]

The model is 12 layers of a transformer of width 768 (85 million parameters), with bf16 autocast and batches of
8 times 1,024 tokens. AdamW steps on the GPU, in main memory after the backward pass (`state_on_host`), and
there beside it (`step_in_backward`), in fp32 and in 8 bits. Milliseconds are the median of ten iterations.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import steprule
from steprule.lab.bench_machine import facts

WHERE = ("on the GPU", "in main memory", "beside the backward pass")


def model() -> nn.Module:
    """Twelve layers, on the GPU."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).cuda()


def iteration_ms(where: str, options: dict[str, Any], iterations: int = 10) -> float:
    """The median time of an iteration, of several after the first three."""
    torch.manual_seed(0)
    net = model()
    optimizer: Any = steprule.AdamW(net.parameters(), lr=1e-4, **options)
    if where != WHERE[0]:
        steprule.state_on_host(optimizer)
    if where == WHERE[2]:
        steprule.step_in_backward(net, optimizer)
    inputs = torch.randn(8, 1024, 768, device="cuda")
    times: list[float] = []
    for _ in range(3 + iterations):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = net(inputs).float().square().mean()
        loss.backward()
        optimizer.step()  # has nothing left to do beside the backward pass
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[3:])


def main() -> None:
    """Measure, print, and write a file."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, help="a JSON file for the results")
    out: Path | None = arguments.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("host_steps.py: torch finds no CUDA device here.")
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **facts(torch.device("cuda")),
        "iterations": [],
    }
    for kept in ("fp32", "int8"):
        for where in WHERE:
            ms = round(iteration_ms(where, {} if kept == "fp32" else {"state_dtype": kept}), 1)
            result["iterations"].append({"state": kept, "where": where, "ms": ms})
            print(f"{kept} state, steps {where}: {ms} ms", flush=True)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
