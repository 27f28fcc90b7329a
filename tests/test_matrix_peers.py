"""benchmarks/matrix_peers.py knows when SOAP refreshes, and measures without other libraries."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import steprule

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import matrix_peers


def test_refreshes() -> None:
    param = nn.Parameter(torch.zeros(4, 3))
    optimizer: Any = steprule.SOAP([param], every=3)
    found: list[int] = []
    before = torch.eye(4)
    for step in range(1, 12):
        param.grad = torch.randn(4, 3)
        optimizer.step()
        basis = optimizer.state[param]["left_basis"].clone()
        if not torch.equal(basis, before) and step > 1:
            found.append(step)
        before = basis
    assert found == [step for step in range(1, 12) if matrix_peers.refreshes(step, 3)] == [4, 7, 10]


def test_rows() -> None:
    rows = matrix_peers.measured([(4, 4), (4, 4), (6, 2)], ["Muon", "SOAP"], every=2, periods=1, peers={})
    assert [row["what"] for row in rows if "products" in row] == ["torch Muon", "Muon", "SOAP"]
    assert [row["what"] for row in rows if "with_refreshes" in row] == ["SOAP"]
    assert all(row["ms"] >= 0 for row in rows)
