"""Measures what a new process waits for: its imports, and the first step of a rule. Run as a script.

The imports are inside the function, where they are measured.

    python -P bench_first_step.py RULE DTYPE DEVICE
"""

from __future__ import annotations


def main() -> None:
    """Print the milliseconds as JSON."""
    import json
    import sys
    import time

    rule, dtype, device = sys.argv[1:]
    started = time.perf_counter()
    import torch

    with_torch = time.perf_counter()
    import steprule

    with_steprule = time.perf_counter()
    parameter = torch.nn.Parameter(torch.ones(64, 64, dtype=getattr(torch, dtype), device=device))
    parameter.grad = torch.ones_like(parameter)
    before = time.perf_counter()
    steprule.create(rule, [parameter]).step()
    if device != "cpu":
        torch.cuda.synchronize()
    after = time.perf_counter()
    measured = {
        "import_torch": with_torch - started,
        "import_steprule": with_steprule - with_torch,
        "first_step": after - before,
    }
    print(json.dumps({name: 1000 * seconds for name, seconds in measured.items()}))


if __name__ == "__main__":
    main()
