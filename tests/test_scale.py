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
from steprule.engine.sharding.owners import Wholes

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


def compare(replicas: int, shards: int) -> None:
    """Have each of the processes send, and compare with what is counted."""
    own = scale()
    # torch's stand-in for processes refuses an exchange in which this one gives nothing.
    torch.distributed.all_to_all_single = lambda *given, **options: None
    shapes = own.Shapes([(9, 4), (4, 12), (3, 3)], 1, [(7, 2), (5,)])
    for rule in (steprule.AdamW, steprule.Muon, steprule.SOAP):
        for rank in range(replicas * shards):
            with own.pretended(replicas, shards, rank) as mesh:
                optimizer = own.made(rule, shapes, mesh, device="cpu")
                entries = own.entries_of(optimizer)
                count = own.counted(entries, replicas, shards)
                if entries:
                    route = Wholes(Processes(mesh), entries)
                    route.give_back(route.collect(entries), entries)
                    assert route.sent == count.sent[rank], (rule, rank)
        assert bool(count.sent.any()) == (rule is not steprule.AdamW)
        assert count.sent.sum() == count.received.sum()


@pytest.mark.parametrize(("replicas", "shards"), [(1, 4), (2, 3)])
def test_what_is_counted_is_what_is_sent(replicas: int, shards: int) -> None:
    python("-W", "ignore", "-c", f"import test_scale as t; t.compare({replicas}, {shards})", cwd=ROOT / "tests")


def test_the_page_has_the_numbers_of_the_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text(encoding="utf-8"))
    assert scale().on_page(result) in (ROOT / "docs" / "ideas" / "scale.md").read_text(encoding="utf-8")
