"""Where a training or a measurement runs."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from steprule.lab.errors import LabError, did_you_mean

__all__ = ["device_facts", "device_random_state", "find_device", "set_device_random_state"]

KNOWN = ("cpu", "cuda", "mps", "xpu")


def find_device(name: str) -> torch.device:
    """The device of that name. Raises `LabError` if torch does not know it or cannot use it here."""
    try:
        device = torch.device(name.strip().lower())
    except RuntimeError:
        meant = "cuda" if name.lower().startswith("gpu") else name
        raise LabError(f"no device '{name}'. {did_you_mean(meant, KNOWN)}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.ones(1, device=device).item()
        except Exception:  # each backend raises errors of its own
            raise LabError(f"--device {name}: torch finds no such device here. Use {_usable()}.") from None
    return device


def _usable() -> str:
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    kind: Any = torch.accelerator.current_accelerator() if count else None
    return " or ".join(["--device cpu", *(f"--device {kind.type}:{i}" for i in range(count))])


def device_facts(device: torch.device) -> dict[str, str]:
    """The kind of device, and its name if torch knows it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"device": f"{device.type} {name}".strip()}


def device_random_state(device: torch.device) -> Any:
    """The state of the device's own random numbers, which dropout draws from; None on the CPU."""
    if device.type == "cpu":
        return None
    module: Any = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def set_device_random_state(device: torch.device, state: Any) -> None:
    """Put the device's random numbers back; a state of another kind of device is left alone."""
    if device.type == "cpu" or state is None:
        return
    module: Any = torch.get_device_module(device)
    module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)
