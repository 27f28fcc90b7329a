"""What the tracer and the printers make of a rule: its program, and the text of its kernels."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import steprule
from steprule.engine.program import decisions
from steprule.engine.rule import RuleOptimizer
from steprule.engine.runners import matrices
from steprule.engine.runners.kernels.cpu import kernel as cpu_kernel
from steprule.engine.runners.kernels.gpu import kernel as gpu_kernel

__all__ = ["Listings", "listings_of", "listings_with"]

SIZE = 64
# Where conditions on the step decide, the programs of these steps are shown.
STEPS = range(1, 22)


@dataclass(frozen=True)
class Listings:
    """Text for each: empty if there is none."""

    program: str = ""
    cpu: str = ""
    gpu: str = ""


def listings_of(rule: type[Any]) -> Listings:
    """Those of a rule with its default values, for a matrix in fp32."""
    if not issubclass(rule, RuleOptimizer):
        return Listings()
    return _of(rule([nn.Parameter(torch.zeros(SIZE, SIZE))]))


def listings_with(modifier: type[steprule.Modifier]) -> Listings:
    """Those of AdamW with this modifier."""
    options = {"weight_decay": 0.0} if "weight_decay" in modifier.not_with else {}
    return _of(steprule.AdamW([nn.Parameter(torch.zeros(SIZE, SIZE))], modifiers=[modifier()], **options))


def _of(optimizer: Any) -> Listings:
    (group,) = optimizer.param_groups
    if group.get("sparse") or optimizer.gradients == "rows only":
        return Listings(program="\n\n".join(map(str, _programs(optimizer, group))))
    programs = _programs(optimizer, group)
    return Listings(
        program="\n\n".join(map(str, programs)),
        cpu=_text(programs, cpu_kernel.sources, cpu_kernel.sources_of_columns),
        gpu=_text(programs, gpu_kernel.sources, gpu_kernel.sources_of_columns),
    )


def _programs(optimizer: Any, group: dict[str, Any]) -> list[Any]:
    """The programs of a matrix; where conditions decide, those of the first steps."""
    whole = optimizer.program(group)
    if whole.decision is None:
        return list(whole.kinds)[:1]
    slots = optimizer.composition(group).slots.values()
    state = {slot.key: torch.tensor(slot.start(group)) for slot in slots if slot.per_tensor}
    matrix = torch.zeros(SIZE, SIZE)
    found = [decisions.chosen(whole, group, matrix, state, t) for t in STEPS]
    return list({id(x): x for x in found}.values())


def _text(programs: Iterable[Any], *printers: Callable[..., Iterable[Any]]) -> str:
    texts: list[str] = []
    for program in programs:
        dtypes = dict.fromkeys(program.inputs, torch.float32)
        dtypes |= {"noise_key": torch.int64} if program.draws else {}
        if program.matrices is not None:
            dtypes |= matrices.dtypes_of(program, torch.float32)
        for sources in printers:
            texts += [source.text for source in sources(program, dtypes) if source is not None]
    return "\n\n\n".join(map(_without_docstring, dict.fromkeys(texts)))


def _without_docstring(text: str) -> str:
    """The program, which heads each kernel, stands on the page already; of it, the first line is enough."""
    head = ast.parse(text).body[0]
    said = ast.get_docstring(ast.parse(text)) or ""
    return "\n".join([f"# {said.splitlines()[0]}", *text.splitlines()[head.end_lineno :]])
