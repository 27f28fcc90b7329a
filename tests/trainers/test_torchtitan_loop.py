"""A loop as torchtitan and torchtune write it, which need more than a CPU themselves.

`fully_shard` with mixed precision, switches in every group, clipping, accumulation, and torch's distributed
checkpoints with a flat state dict whose state is there before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import in_processes, whole
from small import OPTIMIZERS, Network, assert_same, examples
from torch import nn

import steprule

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)
BF16 = torch.bfloat16


class Trained:
    """A sharded model and its optimizer, as one object that a checkpoint saves."""

    def __init__(self, make: Callable[..., Any], dtype: torch.dtype = torch.float32):
        from torch.distributed.checkpoint import state_dict
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.torchs = state_dict
        self.options = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
        self.model: Any = Network(dtype)
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
        for layer in self.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(self.model, mp_policy=policy)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        # As torchtitan gives them to every rule.
        self.optimizer = make([{"params": named, "fused": True, "foreach": False}])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 3))

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.torchs.get_model_state_dict(self.model),
            "optimizer": self.torchs.get_optimizer_state_dict(self.model, self.optimizer, options=self.options),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.torchs.set_model_state_dict(self.model, state["model"])
        self.torchs.set_optimizer_state_dict(
            self.model, self.optimizer, state["optimizer"], options=self.options
        )
        self.schedule.load_state_dict(state["schedule"])

    def train(self, steps: range) -> None:
        import torch.distributed as dist

        x, y = examples()
        own = slice(dist.get_rank(), None, dist.get_world_size())
        for step in steps:
            for half in (0, 1):
                self.model.set_requires_gradient_sync(half == 1)
                rows = slice(32 * half + 8 * (step % 4), 32 * half + 8 * (step % 4) + 8)
                scores = self.model(x[rows][own])
                (nn.functional.cross_entropy(scores.float(), y[rows][own]) / 2).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def weights(self) -> list[torch.Tensor]:
        return [whole(p.detach()) for p in self.model.parameters()]


def the_numbers_of_torch(rank: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (BF16, 1e-2)):
        made = [Trained(partial(rule, lr=0.01), dtype) for rule in (steprule.AdamW, torch.optim.AdamW)]
        for one in made:
            one.train(range(4))
        for p, x, y in zip(Network(dtype).parameters(), *(one.weights() for one in made), strict=True):
            assert x.dtype == dtype
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
            assert not torch.allclose(x, p, rtol=1e-2)


def a_resumed_run(rank: int, folder: Path) -> None:
    from torch.distributed import checkpoint

    for number, make in enumerate(OPTIMIZERS.values()):
        straight, first, resumed = Trained(make), Trained(make), Trained(make)
        straight.train(range(6))
        first.train(range(3))
        checkpoint.save(first.state_dict(), checkpoint_id=folder / str(number))
        state = resumed.state_dict()
        checkpoint.load(state, checkpoint_id=folder / str(number))
        resumed.load_state_dict(state)
        resumed.train(range(3, 6))
        assert_same(resumed.weights(), straight.weights())


def everything(rank: int) -> None:
    import tempfile

    import torch.distributed as dist

    the_numbers_of_torch(rank)
    with tempfile.TemporaryDirectory() as folder:
        names = [folder]
        dist.broadcast_object_list(names)
        a_resumed_run(rank, Path(names[0]))
        dist.barrier()


def test_two_processes(tmp_path: Path) -> None:
    in_processes(2, "everything", tmp_path, "test_torchtitan_loop")
