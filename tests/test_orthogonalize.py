"""The words that make matrices orthogonal, against the singular value decomposition in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from papers.orthogonalize import JORDAN, orthogonalized

from steprule.matrix import words

SHAPES = ((4, 7), (7, 4), (6, 6), (1, 5), (5, 1), (3, 8, 6), (2, 3, 5, 4))


def by_word(x: torch.Tensor, method: str, steps: int = 5) -> torch.Tensor:
    if method == "exact":
        return words.polar_factor.function(x)
    if method == "polar_express":
        return words.polar_express.function(x, float(steps), 1e-7)
    return words.newton_schulz.function(x, JORDAN, float(steps), 1e-7)


def given(shape: Any, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def lengths(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(x.double())


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 7, 8, 11])
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
def test_iterations_are_near_their_transcription(
    method: str, shape: Any, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 nearly, most of all in the first steps of "polar_express"; in double to the last bits."""
    x = torch.from_numpy(given(shape))
    wanted = orthogonalized(x.numpy(), method, steps)
    made = by_word(x, method, steps).double().numpy()
    assert np.linalg.norm(made - wanted) < 0.15 * np.linalg.norm(wanted)
    monkeypatch.setattr(words, "NARROW", torch.float64)
    np.testing.assert_allclose(by_word(x, method, steps).numpy(), wanted, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_exact_one_is_u_times_v(shape: Any, dtype: torch.dtype, tolerance: float) -> None:
    x = torch.from_numpy(given(shape)).to(dtype)
    made = by_word(x, "exact")
    assert made.dtype == dtype
    np.testing.assert_allclose(made.numpy(), orthogonalized(x.double().numpy(), "exact"), atol=tolerance)


@pytest.mark.parametrize("method", words.METHODS)
def test_matrices_of_a_stack_do_not_see_each_other(method: str) -> None:
    stack = torch.from_numpy(given((3, 6, 4))).float() * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    made = by_word(stack, method)
    alone = torch.stack([by_word(x, method) for x in stack])
    torch.testing.assert_close(made, alone, atol=1e-5 if method == "exact" else 2e-2, rtol=0)


def test_each_method_is_nearer_than_the_one_before() -> None:
    x = torch.from_numpy(given((64, 48))).float()
    far = [float((lengths(by_word(x, method)) - 1).abs().max()) for method in words.METHODS]
    assert far[0] < 0.6
    assert far[1] < far[0] / 2
    assert far[2] < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_directions_without_length_stay_zero(rank: int, dtype: torch.dtype, size: float) -> None:
    x = torch.from_numpy(size * given((7, rank)) @ given((rank, 5), seed=1)).to(dtype)
    found = lengths(by_word(x, "exact"))
    torch.testing.assert_close(found, (torch.arange(5) < rank).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", words.METHODS)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (4, 0), (2, 3, 4)])
def test_zeros_stay_zero(method: str, shape: Any) -> None:
    made = by_word(torch.zeros(shape), method)
    assert made.shape == shape
    assert not made.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", words.METHODS)
def test_a_matrix_that_is_not_finite_spoils_no_other(method: str, bad: float) -> None:
    stack = torch.from_numpy(given((3, 4, 5))).float()
    alone = by_word(stack, method)
    stack[1, 2, 3] = bad
    made = by_word(stack, method)
    assert made[1].isnan().all()
    torch.testing.assert_close(made[[0, 2]], alone[[0, 2]], atol=1e-2, rtol=0)
