"""A process is killed in the middle of a step: the other ends with an error, and the last checkpoint loads."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import whole
from processes import PATIENCE, started
from rules import assert_same, numbers
from torch import nn

import steprule
from steprule.engine.sharding import exchange
from steprule.engine.sharding.here import Here

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and hasattr(signal, "SIGKILL")), reason="needs processes to kill"
)
# Seconds after which a process whose partner is gone must have ended; gloo would wait for three minutes.
SOON = 60
# Rule, and where in its step a process dies: results of words and wholes on their way back, sums, and where
# nothing is sent.
WHERE: dict[str, tuple[Any, Any, str, int]] = {
    "results": (steprule.Muon, exchange.Processes, "passing", 2),
    "wholes": (steprule.Adafactor, exchange.Processes, "passing", 2),
    "sums": (steprule.LAMB, exchange.Processes, "added", 1),
    "nothing": (steprule.AdamW, Here, "prepare", 1),
}


def build(rule: Any) -> tuple[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 90), nn.ReLU(), nn.Linear(90, 5))
    fully_shard(model)
    return model, rule(model)


def train(model: Any, optimizer: Any, steps: range) -> None:
    for number in steps:
        optimizer.zero_grad()
        model(numbers((8, 6), torch.float32, number)).square().mean().backward()
        optimizer.step()


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as torchs

    return {
        "model": torchs.get_model_state_dict(model),
        "optimizer": torchs.get_optimizer_state_dict(model, optimizer),
    }


def dies(rank: int, where: str, folder: str) -> None:
    """Save after two steps, and have the second process die in the third."""
    from torch.distributed import checkpoint

    rule, owner, name, call = WHERE[where]
    model, optimizer = build(rule)
    train(model, optimizer, range(2))
    checkpoint.save(state_of(model, optimizer), checkpoint_id=f"{folder}/saved")
    if rank == 1:
        calls, before = [0], getattr(owner, name)

        def killed(*given: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(*given)

        setattr(owner, name, killed)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        train(model, optimizer, range(2, 5))
    print(time.monotonic() - begin, flush=True)
    os._exit(0)  # an orderly end would wait for the other


def resumes(rank: int, where: str, folder: str) -> None:
    """Load what was saved, and go on as if nothing had happened."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as torchs

    straight, resumed = build(WHERE[where][0]), build(WHERE[where][0])
    train(*straight, range(4))
    state = state_of(*resumed)
    checkpoint.load(state, checkpoint_id=f"{folder}/saved")
    torchs.set_model_state_dict(resumed[0], state["model"])
    torchs.set_optimizer_state_dict(*resumed, state["optimizer"])
    train(*resumed, range(2, 4))
    for p, q in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert_same(whole(q.detach()), whole(p.detach()), where)


def ranks_of(what: str, where: str, folder: Path, store: Path) -> tuple[list[str], list[int]]:
    """What two processes print, errors included, and their exit codes."""
    store.mkdir()
    script = (
        "import sys, layouts, test_killed as t\n"
        f"rank = int(sys.argv[1])\nwith layouts.joined(rank, 2, {str(store)!r}): "
        f"t.{what}(rank, {where!r}, {str(folder)!r})"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        command = ("-W", "ignore", "-c", script)
        both = [stack.enter_context(started(*command, str(rank), env=environment)) for rank in (0, 1)]
        said = [process.communicate(timeout=PATIENCE) for process in both]
        return [err + out for out, err in said], [process.returncode for process in both]


@pytest.mark.parametrize("where", WHERE)
def test_the_other_process_ends_and_the_checkpoint_loads(where: str, tmp_path: Path) -> None:
    said, (survivor, killed) = ranks_of("dies", where, tmp_path, tmp_path / "first")
    assert killed == -signal.SIGKILL
    assert survivor == 0, said
    assert float(said[0].splitlines()[-1]) < SOON
    said, codes = ranks_of("resumes", where, tmp_path, tmp_path / "second")
    assert codes == [0, 0], said
