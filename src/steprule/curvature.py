"""Estimates of the diagonal of the Hessian, for `optimizer.update_hessian`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from steprule import curvature_errors as errors

HALF = (torch.float16, torch.bfloat16)


def hutchinson(
    loss: Tensor, params: Iterable[Tensor], probes: int = 1, generator: torch.Generator | None = None
) -> dict[Tensor, Tensor]:
    """Estimate the diagonal of the Hessian of a loss: z⊙(Hz), where every element of z is -1 or 1 by chance.

    It is right on average, and exact if the Hessian is diagonal. Call it before `loss.backward()`, which works
    afterwards: it takes the gradient with `torch.autograd.grad(loss, params, create_graph=True)` and then, for
    each probe, the gradient of z·gradient. That is about three backward passes, and takes more memory than one.
    Give it the loss as it is, before a GradScaler scales it. On several processes, average what it returns over
    them, so that all take the same step.

    params: those whose curvature is wanted; the loss must depend on each of them. probes: how many z to average
    over. generator: where the random signs come from; otherwise torch's own generator of each device.

    Returns: for each parameter a tensor of its shape; of 16-bit parameters in float32.

    Raises: ValueError for a loss or parameters that have no such gradient.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> loss = (torch.tensor([1.0, 3.0]) * weight**2).sum()
    >>> hutchinson(loss, [weight])[weight].tolist()
    [2.0, 6.0]
    """
    params = list(params)
    _check(loss, params, probes)
    try:
        return _estimate(loss, params, probes, generator)
    except RuntimeError as error:
        text = str(error)
        if "a second time" in text:
            error.add_note(errors.graph_is_gone())
        elif any(words in text for words in ("not implemented", "double backward", "differentiate twice")):
            error.add_note(errors.no_second_derivative())
        raise


def _check(loss: Tensor, params: list[Tensor], probes: int) -> None:
    if loss.numel() != 1 or loss.is_complex():
        raise errors.no_diagonal_of(
            f"the loss is {loss.dtype} of shape {tuple(loss.shape)}", "It must be one real number."
        )
    if not loss.requires_grad:
        raise errors.no_diagonal_of(
            "the loss has no graph",
            "Compute it from the parameters outside of torch.no_grad(), and do not detach it.",
        )
    if not params:
        raise errors.no_diagonal_of(
            "params is empty", "Was a generator used up before? Pass model.parameters()."
        )
    for place, param in enumerate(params):
        if not param.requires_grad:
            raise errors.no_diagonal_of(
                f"parameter {place} does not require a gradient", "Leave it out of params."
            )
    if probes < 1:
        raise errors.no_diagonal_of(f"probes = {probes}", "It must be at least 1.")


def _estimate(
    loss: Tensor, params: list[Tensor], probes: int, generator: torch.Generator | None
) -> dict[Tensor, Tensor]:
    given = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    for place, gradient in enumerate(cast("Sequence[Tensor | None]", given)):
        if gradient is None:
            raise errors.no_diagonal_of(
                f"the loss does not depend on parameter {place}, of shape {tuple(params[place].shape)}",
                "Leave it out of params.",
            )
    sums = [torch.zeros_like(_real(p), dtype=torch.float32 if p.dtype in HALF else None) for p in params]
    # Of gradients that are constant, the Hessian is 0.
    curved = [place for place, gradient in enumerate(given) if gradient.requires_grad]
    for _ in range(probes if curved else 0):
        signs = [_signs(_real(p), generator) for p in params]
        whole = [_as(p, z) for p, z in zip(params, signs, strict=True)]
        # retain_graph: for the next probe, and for loss.backward().
        products = torch.autograd.grad(
            [given[i] for i in curved],
            params,
            [whole[i] for i in curved],
            retain_graph=True,
            allow_unused=True,
        )
        for total, z, product in zip(sums, signs, cast("Sequence[Tensor | None]", products), strict=True):
            if product is not None:
                total += z * _real(product)
    return {p: _as(p, total / probes) for p, total in zip(params, sums, strict=True)}


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """-1 or 1 for each element."""
    if generator is None:
        return torch.randint_like(like, 0, 2) * 2 - 1
    drawn = torch.randint(0, 2, like.shape, generator=generator, device=generator.device)
    return drawn.to(like) * 2 - 1


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, as rules see them."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _as(param: Tensor, pairs: Tensor) -> Tensor:
    """Pairs of real numbers as the complex ones that the parameter has."""
    return torch.view_as_complex(pairs) if param.is_complex() else pairs
