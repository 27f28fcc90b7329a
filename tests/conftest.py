"""Settings for every test."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

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
