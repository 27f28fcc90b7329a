"""Where a measurement was made: the machine, the versions, the commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import steprule
from steprule.lab import bench_first_step
from steprule.lab.errors import LabError

__all__ = ["available_bytes", "facts", "fresh_process"]

PACKAGE = Path(steprule.__file__).parent


def facts(device: torch.device) -> dict[str, Any]:
    """What the results depend on and a reader must know."""
    return {
        "machine": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llvmlite": _version("llvmlite"),
        "triton": _version("triton"),
        "steprule": steprule.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that this package was checked out at, with `-dirty` if it was changed since."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed, perhaps inside another repository
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def available_bytes(device: torch.device) -> int | None:
    """How much memory is free for tensors now, if the system says so."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":") for line in lines)
    return 1024 * int(sizes["MemAvailable"].split()[0])


def fresh_process(rule: str, dtype: torch.dtype, device: torch.device, cache: Path) -> dict[str, float]:
    """Milliseconds that a new process needs for its imports and a first step, with this cache folder."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XDG_CACHE_HOME": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    script = bench_first_step.__file__
    name = str(dtype).removeprefix("torch.")
    # -P: modules in the script's own folder must not hide others.
    command = [sys.executable, "-P", script, rule, name, device.type]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabError(f"the first step of {rule} failed in a new process: {last}")
    return json.loads(answer.stdout.splitlines()[-1])


def first_step(
    rule: str, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """`fresh_process` with an empty cache folder, and again with the cache that it left."""
    with tempfile.TemporaryDirectory() as folder:
        cold = fresh_process(rule, dtype, device, Path(folder))
        return cold, fresh_process(rule, dtype, device, Path(folder))
