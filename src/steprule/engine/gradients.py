"""Which gradients a rule can use."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steprule import errors, group_errors, process_errors
from steprule.engine import storage, usable, views
from steprule.engine.program.trace import trace
from steprule.engine.runners.kernels.forms import has_elements
from steprule.engine.sharding import parts

SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def check(optimizer: Any, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
    """Refuse a gradient that the rule cannot use, naming the parameter."""
    # With modifiers that rest now: a later step must not refuse what this one takes.
    own = optimizer.full_composition(group)
    who, rule = own.rule.__name__, own.rule
    if gradient.layout in SPARSE and rule.gradients == "dense":
        raise errors.sparse_gradient(who, optimizer.name_of(param))
    program = trace(own, group).of(param)
    if gradient.is_sparse and (program.reductions or program.facts):
        raise errors.sparse_with_reduction(who, optimizer.name_of(param))
    added = any(x.out is None for x in program.reductions)
    if added and not (has_elements(param) and has_elements(gradient)):
        raise errors.nothing_to_add(own.name, optimizer.name_of(param))
    if gradient.is_sparse and own.decay is not None:
        raise errors.sparse_with_option(who, "weight_decay", optimizer.name_of(param))
    if gradient.is_sparse and own.modifiers:
        raise errors.sparse_with_option(who, "modifiers", optimizer.name_of(param))
    if gradient.is_sparse and _in_codes(optimizer, param, group):
        raise errors.sparse_with_codes(who, optimizer.name_of(param))
    if group.get("differentiable") and storage.keeps_more(optimizer.state.get(param, {})):
        raise errors.rounding_has_no_tape(
            who, f"the storage of {optimizer.name_of(param)}'s loaded state", None
        )
    cut = storage.cut_block(param) if _in_codes(optimizer, param, group) else None
    if cut is not None:
        raise process_errors.codes_in_parts(who, optimizer.name_of(param), cut, None)
    if group.get("differentiable") and program.lined and parts.split(param):
        raise errors.matrix_in_parts(own.name, optimizer.name_of(param), None)
    if not gradient.is_sparse and rule.gradients == "rows only":
        raise errors.dense_gradient(who, optimizer.name_of(param))
    # It may have changed: some trainers flatten all parameters.
    if not views.says(group, param):
        rule.check_parameter(param, partial(optimizer.name_of, param), None)
    if param.dim() < 2 and program.needs_matrices:
        raise group_errors.vector_for_matrices(who, optimizer.name_of(param), tuple(param.shape), None)
    check_writable(optimizer, who, param)
    if group.get("differentiable") and param.is_leaf and param.requires_grad:
        problem = "is a leaf Variable that requires grad, which differentiable=True cannot change in place"
        fix = "Give the optimizer what is computed from it, such as p.clone(), or leave differentiable out."
        raise errors.parameter_not_writable(who, optimizer.name_of(param), problem, fix)
    by_lines = any(x.per in ("row", "column") for x in program.slots.values())
    if param.is_complex() and (rule.complex_error is not None or by_lines):
        raise errors.complex_parameter(who, optimizer.name_of(param), rule.complex_error or RuntimeError)
    if gradient.shape != param.shape and (gradient.is_sparse or not _broadcasts(gradient.shape, param.shape)):
        raise errors.gradient_of_other_size(
            who, optimizer.name_of(param), tuple(gradient.shape), tuple(param.shape)
        )
    if gradient.device != param.device and gradient.dim():
        raise errors.gradient_elsewhere(who, optimizer.name_of(param), gradient.device, param.device)
    if gradient.is_complex() and not param.is_complex():
        raise errors.complex_gradient(who, optimizer.name_of(param))


def check_writable(optimizer: Any, who: str, param: Tensor) -> None:
    """Refuse a parameter that torch cannot write to in place."""
    if not usable.is_writable(param):
        fix = "Give the optimizer a clone of it, made outside of torch.inference_mode()."
        raise errors.parameter_not_writable(who, optimizer.name_of(param), usable.READ_ONLY, fix)


def _in_codes(optimizer: Any, param: Tensor, group: dict[str, Any]) -> bool:
    """Whether a slot of the parameter is kept in 8-bit codes, as the group asks or as loaded."""
    state: Mapping[str, Any] = optimizer.state.get(param) or {}
    slots = optimizer.full_composition(group).slots.values()
    return any(storage.kind_of(x, group) == "int8" or f"{x.key}_codes" in state for x in slots)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether torch would broadcast a tensor of the one shape to the other."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in pairs)
