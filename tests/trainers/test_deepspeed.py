"""DeepSpeed with an optimizer of the user's, at every stage of ZeRO, in one process on the CPU.

Its stages give an optimizer one vector for all parameters of a group, so only rules of elements go with them.
It compiles a part of itself when it first runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from processes import python
from small import Network, assert_close, assert_same, examples, needs
from torch import nn

import steprule

pytestmark = needs("deepspeed")


def run(rule: Any, stage: int, folder: Path, steps: range) -> list[torch.Tensor]:
    """Train and save; load what was saved if these are not the first steps."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
    }
    model = Network()
    optimizer = rule(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if steps.start:
        engine.load_checkpoint(str(folder))
    x, y = examples()
    for step in steps:
        rows = slice(16 * (step % 4), 16 * (step % 4) + 16)
        engine.backward(nn.functional.cross_entropy(engine(x[rows]), y[rows]))
        engine.step()
    engine.save_checkpoint(str(folder))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return [p.detach().clone() for p in model.parameters()]


def everything(folder: Path) -> None:
    """All stages, in a process of their own, which DeepSpeed changes for good."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    for stage in range(4):
        own = folder / str(stage)
        straight = run(steprule.AdamW, stage, own / "straight", range(8))
        assert_close(straight, run(torch.optim.AdamW, stage, own / "torch", range(8)))
        run(steprule.AdamW, stage, own / "halves", range(4))
        assert_same(run(steprule.AdamW, stage, own / "halves", range(4, 8)), straight)
        print(f"stage {stage} is equal")
    dist.destroy_process_group()


def test_every_stage(tmp_path: Path) -> None:
    script = "import sys, pathlib, test_deepspeed as t; t.everything(pathlib.Path(sys.argv[1]))"
    said = python(
        "-W",
        "ignore",
        "-c",
        script,
        str(tmp_path),
        env={"PYTHONPATH": os.pathsep.join(sys.path), "LOCAL_RANK": "0"},
    )
    assert [f"stage {stage} is equal" in said for stage in range(4)] == [True] * 4
