"""Hutchinson's estimate of the diagonal of the Hessian."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rules import numbers
from torch import Tensor, nn

from steprule import hutchinson


def parameters(dtype: torch.dtype = torch.float32, *, shapes: Any) -> list[Any]:
    return [nn.Parameter(numbers(shape, dtype, seed=i)) for i, shape in enumerate(shapes)]


def quadratic(matrix: Tensor, *params: Tensor) -> Tensor:
    """A loss whose Hessian is the matrix."""
    whole = torch.cat([p.reshape(-1) for p in params])
    return 0.5 * whole @ matrix @ whole


def symmetric(size: int) -> Tensor:
    half = numbers((size, size), torch.float64, 3)
    return half + half.T


def test_a_diagonal_hessian_is_found_exactly() -> None:
    params = parameters(torch.float64, shapes=((2, 3), (4,), ()))
    wanted = numbers((11,), torch.float64, 5)
    loss = quadratic(wanted.diag(), *params)
    found = hutchinson(loss, iter(params))
    assert list(found) == params
    for param, part in zip(params, wanted.split([6, 4, 1]), strict=True):
        assert found[param].shape == param.shape
        assert not found[param].requires_grad
        torch.testing.assert_close(found[param].reshape(-1), part)
    loss.backward()
    assert params[0].grad is not None


def test_it_is_the_sign_times_the_hessian_times_the_sign() -> None:
    params = parameters(torch.float64, shapes=((2, 3), (4,)))
    matrix, generator = symmetric(10), torch.Generator().manual_seed(8)
    before = torch.get_rng_state()
    found = hutchinson(quadratic(matrix, *params), params, probes=3, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    generator.manual_seed(8)
    wanted = torch.zeros(10, dtype=torch.float64)
    for _ in range(3):
        drawn = [torch.randint(0, 2, p.shape, generator=generator) for p in params]
        z = torch.cat([x.reshape(-1) for x in drawn]).double() * 2 - 1
        wanted += z * (matrix @ z) / 3
    torch.testing.assert_close(torch.cat([found[p].reshape(-1) for p in params]), wanted)


def test_its_mean_is_the_diagonal() -> None:
    (param,) = parameters(torch.float64, shapes=((6,),))
    matrix = symmetric(6)
    torch.manual_seed(0)
    found = hutchinson(quadratic(matrix, param), [param], probes=4000)[param]
    # The standard deviation of one probe is the norm of the rest of the row.
    error = (found - matrix.diag()).abs() / (matrix - matrix.diag().diag()).norm(dim=1)
    assert 0.0 < error.max() < 4 / math.sqrt(4000)


def test_the_draws_are_torchs() -> None:
    (param,) = parameters(torch.float64, shapes=((6,),))
    found: list[Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(hutchinson(quadratic(symmetric(6), param), [param])[param])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_where_the_loss_is_straight_there_is_no_curvature() -> None:
    curved, straight = parameters(shapes=((3,), (2,)))
    found = hutchinson((curved**3).sum() + 2 * straight.sum(), [curved, straight])
    torch.testing.assert_close(found[curved], 6 * curved.detach())
    assert torch.equal(found[straight], torch.zeros(2))
    assert torch.equal(hutchinson(straight.sum(), [straight], probes=2)[straight], torch.zeros(2))


def test_16_bits_are_averaged_in_single_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        (param,) = parameters(dtype, shapes=((3,),))
        found = hutchinson((1.5 * param**2).sum(), [param], probes=3)[param]
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.full((3,), 3.0))


def test_a_complex_number_is_two_real_ones() -> None:
    (pairs,) = parameters(torch.float64, shapes=((4, 2),))
    whole = nn.Parameter(torch.view_as_complex(pairs.detach().clone()))
    matrix = symmetric(8)
    generator = torch.Generator()
    found = hutchinson(quadratic(matrix, pairs), [pairs], 2, generator.manual_seed(1))[pairs]
    loss = quadratic(matrix, torch.view_as_real(whole))
    given = hutchinson(loss, [whole], 2, generator.manual_seed(1))[whole]
    torch.testing.assert_close(torch.view_as_real(given), found)


@pytest.mark.parametrize(
    ("loss", "params", "probes", "message"),
    [
        (
            lambda p: p.sum().detach(),
            lambda p: [p],
            1,
            "the loss has no graph. Compute it .*outside of torch.no_grad",
        ),
        (
            lambda p: p * p,
            lambda p: [p],
            1,
            r"the loss is torch.float32 of shape \(3,\). It must be one real number",
        ),
        (lambda p: (p * p).sum(), lambda p: [], 1, "params is empty. Was a generator used up"),
        (
            lambda p: (p * p).sum(),
            lambda p: [p, torch.ones(2)],
            1,
            "parameter 1 does not require a gradient. Leave",
        ),
        (
            lambda p: (p * p).sum(),
            lambda p: [p, nn.Parameter(torch.ones(2))],
            1,
            r"the loss does not depend on parameter 1, of shape \(2,\). Leave it out",
        ),
        (lambda p: (p * p).sum(), lambda p: [p], 0, "probes = 0. It must be at least 1"),
    ],
)
def test_what_has_no_diagonal_is_refused(loss: Any, params: Any, probes: int, message: str) -> None:
    (param,) = parameters(shapes=((3,),))
    with pytest.raises(ValueError, match=f"^hutchinson: {message}"):
        hutchinson(loss(param), params(param), probes)


def test_errors_of_torch_say_what_to_do() -> None:
    (param,) = parameters(shapes=((1, 2, 4, 8),))
    loss = (param**3).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time") as caught:
        hutchinson(loss, [param])
    assert "call it before loss.backward()" in caught.value.__notes__[0]
    attention = nn.functional.scaled_dot_product_attention(param, param, param, is_causal=True)
    with pytest.raises(RuntimeError, match="not implemented") as caught:
        hutchinson(attention.square().mean(), [param])
    assert "SDPBackend.MATH" in caught.value.__notes__[0]
