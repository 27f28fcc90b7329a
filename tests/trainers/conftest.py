"""torchvision, which fastai and torchmetrics import, beside a torch without CUDA."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

_kept: list[Any] = []


def _without_its_kernels() -> None:
    """Have torchvision import although its compiled part, made for another torch, does not load.

    Nothing here calls these operators.
    """
    declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    # The declarations are gone when it is.
    _kept.append(declared)


if importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _without_its_kernels()
