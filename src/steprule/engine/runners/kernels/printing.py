"""What the printers of all kernels share: the arrays of a kernel, and what it rounds at random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from steprule.engine import storage
from steprule.engine.program.program import Columns, Instruction, Pass, Program, Reduction
from steprule.engine.runners.kernels.places import Needs

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# The dtypes of codes, and of what is stored next to values.
STORAGE = {torch.int8: "int8", torch.uint8: "uint8", torch.int64: "int64"}
CODED = (torch.int8, torch.uint8)


class Source(NamedTuple):
    """The text of one pass of a program, and a name for its files."""

    name: str
    text: str


def arrays_of(program: Program, dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The names of a kernel's arrays, in the order in which it gets their addresses."""
    return [*program.inputs, *(name for name in dtypes if name not in program.inputs)]


def noisy(
    program: Program, sweep: Pass | Columns, dtypes: Mapping[str, torch.dtype]
) -> dict[str, tuple[str, int]]:
    """What the pass rounds at random: where the key is, and the salt that makes the noise different."""
    rounded = [x for x in program.slots if dtypes[x] in (*CODED, torch.bfloat16)]
    rounded = sorted(rounded, key=lambda x: program.slots[x].key) if storage.SLOT_KEY in dtypes else []
    found = {x: (storage.SLOT_KEY, storage.salt_of(place)) for place, x in enumerate(rounded)}
    if "rounding_key" in dtypes:
        found["p"] = ("rounding_key", 0)
    return {x: noise for x, noise in found.items() if x in sweep.outputs}


def draws_in(instructions: Iterable[Instruction]) -> list[int]:
    """The random numbers among these: which draws of the step they are."""
    return [x.draw for x in instructions if x.draw is not None]


def names_of(dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    """The names of these dtypes in kernels, which read the lower half of a parameter as 16-bit numbers."""
    names = {name: (DTYPES | STORAGE)[dtype] for name, dtype in dtypes.items()}
    return names | {"low_bits": "int16"} if "low_bits" in names else names


def coded(program: Program, dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The slots that are kept in 8-bit codes."""
    return [x for x in program.slots if dtypes[x] in CODED]


def is_exact(reduction: Reduction) -> bool:
    """Whether it is a sum of elements, which is exact between blocks."""
    return reduction.word != "largest" and reduction.operand.level == "element"


def needs_of(program: Program, dtypes: Mapping[str, torch.dtype]) -> Needs:
    """What the kernels of a program do that depends on where elements are in the whole tensor."""
    parts = [*program.passes, *(part for part in program.columns if part is not None)]
    return Needs(
        any(noisy(program, part, dtypes) for part in parts) or bool(coded(program, dtypes)),
        any(is_exact(x) for sweep in program.passes for x in sweep.reductions),
        bool(program.draws),
    )


def is_placed(program: Program, dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether kernels have to know where in the whole tensors they round or draw."""
    needs = needs_of(program, dtypes)
    return needs.rounded or needs.drawn


def why_not(dtypes: Mapping[str, torch.dtype]) -> str | None:
    """Why arrays of these dtypes cannot be used together, or None."""
    for name, dtype in dtypes.items():
        if dtype not in DTYPES and dtype not in CODED:
            return f"{name} is {dtype}, which no CPU kernel is written for"
    if torch.float64 in dtypes.values() and len(set(dtypes.values())) > 1:
        return "float64 is mixed with another precision"
    return None
