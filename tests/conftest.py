"""Settings for every test."""

from __future__ import annotations

import gc
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from rules import ALWAYS, RULES

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when Triton is imported, by whichever test comes first
# The tensors here are tiny: threads would only wait for each other.
torch.set_num_threads(1)

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


# A test has many cases from this number on, and a part is one of so many.
MANY = 40
PART = 8
# These hold the rules to their papers and to torch: always all of it. The last chooses its cases itself.
WHOLE = {"test_rules.py", "test_papers.py", "test_torch_parity.py", "test_golden.py", "test_combinations.py"}


@pytest.fixture
def iterations_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words on whole matrices that iterate in bfloat16 do so in double, as transcriptions do."""
    monkeypatch.setattr("steprule.matrix.words.NARROW", torch.float64)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="every case of every test, of every rule")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out a part of the cases of tests that have very many, always the same ones."""
    if config.getoption("whole") or config.getoption("keyword") or any("[" in x for x in config.args):
        return
    cases = Counter(item.nodeid.partition("[")[0] for item in items)
    left_out = [item for item in items if not _is_taken(item.nodeid, cases)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(map(id, left_out))
        items[:] = [item for item in items if id(item) not in gone]


def _is_taken(node: str, cases: Counter[str]) -> bool:
    test, _, case = node.partition("[")
    if cases[test] <= MANY or Path(test.partition("::")[0]).name in WHOLE:
        return True
    rules = RULES.keys() & set(re.split(r"[^A-Za-z0-9]", case))
    return rules <= ALWAYS or zlib.crc32(node.encode()) % PART == 0


def pytest_collection_finish() -> None:
    """What is imported and collected stays: garbage collections need not look through all of it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers() -> Iterator[None]:
    """A test never depends on the tests that ran before it."""
    # torch.manual_seed formats a stack for a GPU that is not there: in 10,000 tests that is a minute.
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(0)
    path = sys.path.copy()
    yield
    sys.path[:] = path  # where a test loads a user's file, the folder of that file is added
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The GPU kernels in Triton's interpreter."""
    if torch.cuda.is_available() or os.environ.setdefault("TRITON_INTERPRET", "1") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from gpu import pretend_a_gpu, small_chunks

    pretend_a_gpu(monkeypatch)
    with small_chunks(2048, 512):
        yield {}
