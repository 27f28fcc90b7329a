"""`torch.compile` around a training step that contains `optimizer.step()`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steprule


# The compiler warns about what it skips.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}])
def test_a_compiled_training_step_is_compiled_once_whatever_the_schedule(options: dict[str, bool]) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    compiled = torch.compile(train, backend=counter)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        optimizer = steprule.NAdam(model.parameters(), lr=0.1, **options)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        runs.append((model, optimizer, schedule))
    (model, optimizer, schedule), (twin, other, plan) = runs
    frames: list[int] = []
    for step in range(6):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        compiled(model, optimizer, x)
        train(twin, other, x)
        schedule.step()
        plan.step()
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1]
    assert torch.equal(model.weight, twin.weight)


def test_importing_the_library_imports_no_compiler() -> None:
    import subprocess
    import sys

    script = (
        "import sys, torch; before = set(sys.modules); import steprule; new = set(sys.modules) - before;"
        "p = torch.nn.Parameter(torch.ones(3)); o = steprule.SGD([p], foreach=False);"
        "p.grad = torch.ones(3); o.step();"
        "print(sorted(n for n in new if n.split('.')[0] in ('numba', 'llvmlite', 'triton', 'rich', 'typer')))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
