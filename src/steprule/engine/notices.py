"""Warnings, at the line of the user's code that led to them."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import torch

# Between that line and the warning there may be schedulers, gradient scalers, hooks and subclasses.
_PASSED = tuple(f"{folder}/" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called this package, or torch."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PASSED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
