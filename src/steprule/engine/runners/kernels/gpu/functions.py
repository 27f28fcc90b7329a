"""The functions of a printed GPU kernel, and how they are launched."""

from __future__ import annotations

import contextlib
import hashlib
import linecache
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from steprule.engine.runners.kernels import cache as kernel_cache

# Products are fused with sums only where the rule says so.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


class Functions:
    """The functions `kernel` and `combine` of a source; the second is None where nothing is reduced."""

    def __init__(self, name: str, text: str):
        self.kernel, self.combine = functions_of(name, text)

    def start(
        self, tables: Sequence[Tensor], programs: int, partials: Tensor, options: Mapping[str, Any]
    ) -> None:
        """Launch so many programs. partials: room for what each chunk comes to."""
        given = [partials] if self.combine is not None else []
        known = {name: x for name, x in options.items() if name != "SHARING" or name in self.kernel.arg_names}
        if programs:
            self.kernel.run(*tables, *given, grid=(programs,), **OPTIONS, **known)

    def combined(self, bounds: Tensor, partials: Tensor, reductions: int, options: Mapping[str, Any]) -> Any:
        """Bring together what the reductions came to, tensor by tensor. bounds: which chunks are whose."""
        if self.combine is None:
            return ()
        tensors = len(bounds) - 1
        reduced = torch.empty(reductions, tensors, dtype=torch.float64, device=bounds.device)
        others = {name: value for name, value in options.items() if name not in ("ALIGNED", "SHARING")}
        self.combine.run(bounds, partials, reduced, grid=(tensors,), **OPTIONS, **others)
        return reduced


@cache
def functions_of(name: str, text: str) -> tuple[Any, Any]:
    """The functions `kernel` and `combine` of a source; the second is None where nothing is reduced."""
    file = file_of(name, text)
    if os.path.isabs(file):
        with contextlib.suppress(OSError):
            kernel_cache.keep(Path(file), text.encode())
    # Triton reads the text of a function from this cache, so a full disk does not matter.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = ModuleType(name)
    exec(compile(text, file, "exec"), vars(module))
    return module.kernel, getattr(module, "combine", None)


def file_of(name: str, text: str) -> str:
    """The file of a kernel's text: in the cache folder, or only a name if there is none."""
    file = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"
    folder = kernel_cache.cache_folder()
    return file if folder is None else str(folder / file)
