"""What happens to a step with NaN or infinite gradients, if a group asks for a check."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from steprule import errors
from steprule.engine.checkpoint.matching import Place, own_places
from steprule.engine.fields import SKIPPED_STEPS
from steprule.engine.program.phases import Part
from steprule.engine.sharding import exchange, parts


class Gate:
    """A check that waits for the norm of all gradients, where the step takes it anyway: then it costs nothing.

    key: of that norm among the sums of the step.
    """

    def __init__(self, optimizer: Any, key: Any):
        self._optimizer = optimizer
        self._key = key
        self._error: RuntimeError | None = None

    def sees(self, parts: Iterable[Part]) -> bool:
        """Whether all parts of a step wait for the norm, so that none moves before it is known."""
        return all(self._key in part.keys for part in parts)

    def closes(self, known: Mapping[Any, float]) -> bool:
        """Whether a step must not go on, judging by the sums that are known now."""
        if math.isfinite(known.get(self._key, 0.0)):
            return False
        try:
            return not allow_step(self._optimizer)
        except RuntimeError as error:
            self._error = error
            return True

    def complain(self) -> None:
        """Raise what closed the gate, unless the step is to be skipped."""
        if self._error is not None:
            raise self._error


def gate(optimizer: Any) -> Gate | None:
    """The check that can wait for a sum of the step, if one is asked for and can wait."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    if all(group.get("nonfinite", "ignore") == "ignore" for group in groups):
        return None
    found: set[Any] = set()
    for group in groups:
        norm = optimizer.program(group).gradient_norm if hasattr(optimizer, "program") else None
        found.add(norm and norm.key)
    key = found.pop() if len(found) == 1 else None
    return None if key is None else Gate(optimizer, key)


def allow_step(optimizer: Any, count: bool = True) -> bool:
    """Whether to take the step, decided for all groups together.

    Groups with nonfinite="ignore" are not checked. count: add a skipped step to the groups' counts.
    Raises: RuntimeError that names the parameters, if a group with nonfinite="raise" has such gradients.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    asked = [group for group in groups if group.get("nonfinite", "ignore") != "ignore"]
    given = [x for group in asked for x in optimizer.gradients_of(group["params"])]
    if all_finite([x for x in given if x is not None]):
        return True
    strict = [index for index, group in enumerate(groups) if group.get("nonfinite") == "raise"]
    names = [place.shown for place in offenders(optimizer) if place.group in strict]
    if names:
        raise errors.nonfinite_gradients(type(optimizer).__name__, names, optimizer.taken_with)
    for group in groups if count else ():
        if SKIPPED_STEPS in group:
            group[SKIPPED_STEPS] += 1
    return False


def offenders(optimizer: Any) -> list[Place]:
    """The parameters whose gradients are NaN or infinite."""
    places = own_places(optimizer.param_groups)
    pairs = zip(places, optimizer.gradients_of([place.key for place in places]), strict=True)
    return [place for place, gradient in pairs if gradient is not None and not all_finite([gradient])]


@torch.no_grad()
def all_finite(tensors: list[Any]) -> bool:
    """Whether all elements are finite. Normally each is read once, and the host waits once.

    Of sharded tensors each process reads its part, and all come to the same answer with one exchange.
    """
    meshes = [x.device_mesh for x in tensors if parts.sharded(x)]
    if not meshes:
        return _finite_here(tensors)
    return exchange.agreed(meshes, _finite_here([exchange.elements(x) for x in tensors]))


def _finite_here(tensors: list[Any]) -> bool:
    plain: list[Tensor] = []
    for tensor in tensors:
        numbers = _numbers(tensor)
        if type(numbers) is Tensor:
            plain.append(numbers)
        elif not bool(numbers.isfinite().all()):
            return False
    # A finite norm proves it. Any other may only have overflowed, so the elements are checked.
    if not plain or bool(get_total_norm(plain).isfinite()):
        return True
    return all(bool(torch.stack(x.aminmax()).isfinite().all()) for x in plain if x.numel())


def _numbers(gradient: Tensor) -> Tensor:
    """The elements of a gradient as real numbers; of a sparse one, with its rows added up."""
    gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
