"""Fitting a checkpoint to an optimizer: everything is checked before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from steprule import errors
from steprule.engine.fields import FOREIGN_KEYS, scalar_dtype


def fit(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The new `state` and `param_groups` of the optimizer, copied from a checkpoint that fits.

    Raises: ValueError that names what does not fit.
    """
    who = type(optimizer).__name__
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise errors.checkpoint(
                who, f"the checkpoint has no '{key}'", "Pass what optimizer.state_dict() returned."
            )
    saved_groups: list[dict[str, Any]] = state_dict["param_groups"]
    groups: list[dict[str, Any]] = optimizer.param_groups
    if len(saved_groups) != len(groups):
        raise errors.checkpoint(
            who,
            f"the checkpoint has {len(saved_groups)} parameter groups, a different number of parameter "
            f"groups than the optimizer's {len(groups)}",
            "Build the groups as they were when it was saved.",
        )
    param_groups: list[dict[str, Any]] = []
    by_id: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise errors.checkpoint(
                who,
                f"parameter group {index} has {len(saved['params'])} parameters in the checkpoint, which "
                f"doesn't match the size of optimizer's group ({len(group['params'])})",
                "Build the groups as they were when it was saved.",
            )
        fitted = _fit_group(optimizer, saved, group, index)
        param_groups.append(fitted)
        by_id.update({k: (p, fitted) for k, p in zip(saved["params"], group["params"], strict=True)})
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, saved_state in state_dict["state"].items():
        if key not in by_id:
            raise errors.checkpoint(who, f"it holds state for parameter {key!r}, which is in no group")
        param, group = by_id[key]
        state[param] = _fit_state(optimizer, param, group, saved_state)
    return {"state": state, "param_groups": param_groups}


def _fit_group(optimizer: Any, saved: dict[str, Any], group: dict[str, Any], index: int) -> dict[str, Any]:
    who = type(optimizer).__name__
    known = optimizer._known_keys() | set(group)
    for key in saved:
        if key not in known and key not in FOREIGN_KEYS:
            raise errors.unknown_hyperparameter(who, key, known, index)
    fitted = {key: deepcopy(value) for key, value in saved.items() if key != "params"}
    for key, value in optimizer.defaults.items():
        fitted.setdefault(key, value)
    if "param_names" in group:
        fitted.setdefault("param_names", group["param_names"])
    fitted = optimizer._normalize(fitted, index)
    return {"params": group["params"], **fitted}


def _fit_state(optimizer: Any, param: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    who, name = type(optimizer).__name__, optimizer.name_of(param)
    slots = {slot.key: slot for slot in optimizer.slots.values()}
    fitted: dict[str, Any] = {}
    for key, value in saved.items():
        if value is None:
            continue
        if slots and key not in slots and key != "step":
            wanted = ", ".join(sorted(slots))
            raise errors.checkpoint(
                who,
                f"the state of {name} has '{key}', but {who} keeps {wanted}",
                "Was it written by another optimizer?",
            )
        if key == "step":
            fitted[key] = _as_count(value, optimizer)
            continue
        slot = slots.get(key)
        if slot is not None:
            shape = slot.shape_for(param)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise errors.checkpoint(
                    who,
                    f"'{key}' of {name} has shape {given} in the checkpoint, the parameter needs {shape}",
                    "Does the order of the parameters differ?",
                )
        fitted[key] = _moved(value, param, keep=slot is not None and slot.per_tensor)
    if fitted and slots and "step" not in fitted and optimizer.counts(group):
        # torch's SGD keeps no count, yet its buffer says that the first step is over.
        if optimizer.counts_steps is True:
            raise errors.checkpoint(who, f"the state of {name} has no 'step'")
        fitted["step"] = torch.ones((), dtype=scalar_dtype())
    return fitted


def _as_count(value: Any, optimizer: Any) -> Any:
    if optimizer.slots and optimizer.gradients == "rows only":
        return int(value)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if optimizer.slots:
        return torch.tensor(float(value), dtype=torch.float32)
    return value


def _moved(value: Any, param: Tensor, keep: bool) -> Any:
    """A copy on the parameter's device (per-tensor numbers stay where they are), in its own dtype."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.clone() if keep else value.to(param.device, copy=True)
    return deepcopy(value)
