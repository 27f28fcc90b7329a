"""Ray Train: two workers with replicas of the model, their report and their checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from processes import python
from small import Network, assert_close, examples, needs
from torch import nn

import steprule

pytestmark = needs("ray")


def loop(config: dict[str, Any]) -> None:
    """What each worker runs."""
    import tempfile

    import ray.train
    import torch.distributed as dist
    from ray.train.torch import prepare_model

    model = prepare_model(Network())
    rule = steprule.AdamW if config["ours"] else torch.optim.AdamW
    optimizer = rule(model.parameters(), lr=0.01)
    x, y = (z[dist.get_rank() :: 2] for z in examples())
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        state = {"model": list(model.module.parameters()), "optimizer": optimizer.state_dict()}
        torch.save(state, f"{folder}/state.pt")
        saved = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({}, checkpoint=saved if dist.get_rank() == 0 else None)


def everything(folder: str) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=paths)
    made: list[list[torch.Tensor]] = []
    for ours in (True, False):
        trainer = TorchTrainer(
            loop,
            train_loop_config={"ours": ours},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=folder, name=str(ours)),
        )
        with trainer.fit().checkpoint.as_directory() as there:
            state = torch.load(f"{there}/state.pt")
        made.append([p.detach() for p in state["model"]])
        steprule.AdamW(Network().parameters()).load_state_dict(state["optimizer"])
    assert_close(*made)
    ray.shutdown()
    print("equal")


def test_two_workers(tmp_path: Path) -> None:
    script = "import sys, test_ray as t; t.everything(sys.argv[1])"
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert "equal" in python("-W", "ignore", "-c", script, str(tmp_path), env=paths)
