"""What benchmarks/scale.py counts is what the exchange sends, and what the page says is what it counted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python

import steprule
from steprule.engine.sharding.exchange import Processes
from steprule.engine.sharding.owners import Routes
from steprule.engine.sharding.parts import local

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)


def scale() -> Any:
    """benchmarks/scale.py as a module."""
    spec: Any = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Over:
    """An exchange that is over."""

    def wait(self) -> None:
        """Nothing."""


def compare(replicas: int, shards: int) -> None:
    """Have each of the processes send, and compare with what is counted."""
    own, world = scale(), replicas * shards
    # torch's stand-in for processes refuses an exchange in which this one gives nothing.
    torch.distributed.all_to_all_single = lambda *given, **options: Over()
    shapes = own.Shapes([(9, 4), (4, 12), (3, 3)], 1, [(7, 2), (5,)])
    for rule in (steprule.AdamW, steprule.Muon, steprule.NorMuon, steprule.SOAP):
        for rank in range(world):
            with own.pretended(replicas, shards, rank) as mesh:
                entries = own.moved(own.made(rule, shapes, mesh, device="cpu"))
                count = own.counted(entries, replicas, shards)
                if entries:
                    assert sent(own.owners_of(entries, world), entries, mesh) == count.sent[rank], (rule, rank)
        assert bool(count.sent.any()) == (rule is not steprule.AdamW)
        assert count.sent.sum() == count.received.sum()


def sent(owner: Any, entries: Any, mesh: Any) -> int:
    """What the exchange sends."""
    processes = Processes(mesh)
    out, back = ([{key: like for key, (like, _) in x.items()} for x in own] for own in both(entries))
    routes = Routes(processes, owner, out, back)
    given, wanted = ([made(x, lambda like: local(like).shape) for x in own] for own in both(entries))
    mine = [i for i, x in enumerate(owner) if x == processes.here]
    came, made_of_it = ({i: made(own[i], lambda like: like.shape) for i in mine} for own in both(entries))
    first, then = routes.collect(given, came).end(), routes.give_back(made_of_it, wanted).end()
    return first + then + routes.pass_on(wanted)


def both(entries: Any) -> Any:
    return [x.out for x in entries], [x.back for x in entries]


def made(own: Any, shape: Any) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape(like), dtype=dtype) for key, (like, dtype) in own.items()}


@pytest.mark.parametrize(("replicas", "shards"), [(1, 4), (2, 3)])
def test_what_is_counted_is_what_is_sent(replicas: int, shards: int) -> None:
    python("-W", "ignore", "-c", f"import test_scale as t; t.compare({replicas}, {shards})", cwd=ROOT / "tests")


def test_the_page_has_the_numbers_of_the_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text(encoding="utf-8"))
    assert scale().on_page(result) in (ROOT / "docs" / "ideas" / "scale.md").read_text(encoding="utf-8")
