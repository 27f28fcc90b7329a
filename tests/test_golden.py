"""The text of the CPU kernels of rules and modifiers, as reviewed: `python tests/test_golden.py` updates it.

A change to a rule, a modifier, to the tracer or to the printer shows here as a change of text, line by line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rules import LOOPS, Case, in_words, uses_curvature

import steprule
from steprule.engine.estimation import Estimator
from steprule.engine.program import decisions
from steprule.engine.runners import matrices
from steprule.engine.runners.kernels.cpu import kernel as cpu_kernel

GOLDEN = Path(__file__).parent / "golden" / "cpu"


def texts() -> dict[str, str]:
    """The kernels of each rule and its estimates by file name; AdamW with every modifier, and in bfloat16."""
    found: dict[str, str] = {}
    for case in LOOPS:
        if in_words(case.rule) and not case.sparse_only and case.name in BUILT_IN:
            name = case.name + ("-options" if case.options else "")
            found[f"{name}.txt"] = text_of(case, torch.float32)
        if uses_curvature(case.rule) and not case.options:
            numbers = {"n": 4.0} if case.name == "Sophia" else {}
            optimizer = Estimator(case.make(), {}, numbers)
            optimizer.param_groups[0].update(numbers)
            found[f"{case.name}.estimate.txt"] = printed(optimizer, torch.float32)
    for name, modifier in steprule.modifier_catalogue().items():
        options: dict[str, Any] = {"modifiers": [modifier()]}
        options |= {"weight_decay": 0.0} if "weight_decay" in modifier.not_with else {}
        found[f"AdamW+{name}.txt"] = text_of(Case(BUILT_IN["AdamW"], options), torch.float32)
    return {**found, "AdamW-bfloat16.txt": text_of(Case(BUILT_IN["AdamW"]), torch.bfloat16)}


def text_of(case: Case, dtype: torch.dtype) -> str:
    return printed(case.make(), dtype)


def printed(optimizer: Any, dtype: torch.dtype) -> str:
    kernels: list[Any] = []
    for program in programs_of(optimizer):
        dtypes = dict.fromkeys(program.inputs, dtype) | ({"noise_key": torch.int64} if program.draws else {})
        if program.matrices is not None:
            dtypes |= matrices.dtypes_of(program, dtype)
        kernels += [*cpu_kernel.sources(program, dtypes), *cpu_kernel.sources_of_columns(program, dtypes)]
    return "\n\n".join(source.text for source in kernels if source is not None)


def programs_of(optimizer: Any) -> list[Any]:
    """The programs of a matrix and of a vector; where conditions decide, those of the first steps."""
    (group,) = optimizer.param_groups
    whole = optimizer.program(group)
    if not any(x.decision for x in (whole, whole.of_vectors) if x is not None):
        return list(whole.kinds)
    shapes = [(4, 3)] if whole.of_vectors is None else [(4, 3), (5,)]
    slots = optimizer.composition(group).slots.values()
    state = {slot.key: torch.tensor(slot.start(group)) for slot in slots if slot.per_tensor}
    found = [
        decisions.chosen(whole, group, torch.zeros(shape), state, t) for shape in shapes for t in range(1, 22)
    ]
    return list({id(x): x for x in found}.values())


BUILT_IN = {case.name: case.rule for case in LOOPS if case.rule.__module__.startswith("steprule.")}


@pytest.mark.parametrize("name", sorted(texts()))
def test_the_text_is_the_reviewed_one(name: str) -> None:
    wanted = (GOLDEN / name).read_text(encoding="utf-8")
    assert texts()[name] == wanted, f"{name} changed; python tests/test_golden.py updates it"


def test_no_text_is_left_over() -> None:
    assert sorted(file.name for file in GOLDEN.iterdir()) == sorted(texts())


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for old in GOLDEN.iterdir():
        old.unlink()
    for file, content in texts().items():
        (GOLDEN / file).write_text(content, encoding="utf-8")
