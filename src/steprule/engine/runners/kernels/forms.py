"""The form of tensors: everything except their address and their elements.

A kernel is made for tensors of one form, and reads and writes memory without further checks. So the forms are
compared at every step, in one call of C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_keys: Any = torch._C._dispatch_keys  # pyright: ignore


def form_of(tensor: Tensor) -> tuple[Any, ...]:
    """Type, layout, dtype, device, shape, strides, and what torch goes by, such as lazy signs and wrappers."""
    strides = tensor.stride() if tensor.layout == torch.strided else None
    keys = _keys(tensor).raw_repr()
    return type(tensor), tensor.layout, tensor.dtype, tensor.device, tensor.shape, strides, keys


def has_elements(tensor: Any) -> bool:
    """Whether the elements can be looked at: meta and fake tensors have none."""
    return not tensor.is_meta and getattr(tensor, "fake_mode", None) is None


class Forms:
    """The forms of these tensors, in this order. Keeps no tensor alive."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._forms = list(map(form_of, tensors))
        self._guard = _guard(tensors)

    def hold(self, tensors: Sequence[Any]) -> bool:
        """Whether as many other tensors have the same forms."""
        try:
            if self._guard is not None and self._guard.check(*tensors):
                return True
            if list(map(form_of, tensors)) != self._forms:
                return False
        except (AttributeError, TypeError):  # not a tensor
            return False
        # The guard also sees modes of the thread, such as autocast, in which a tensor is the same to a kernel.
        self._guard = _guard(tensors)
        return True


def _guard(tensors: Sequence[Tensor]) -> Any:
    """What torch.compile compares tensors with, or None where it is not available: torch does not promise it.

    It is 10 times faster than asking each tensor, and never true for tensors of other forms.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        guard: Any = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)  # type: ignore[arg-type]
        # It is never true for a list that holds a tensor twice.
        return guard if guard.check(*tensors) else None
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
