"""The text of GPU kernels, as reviewed, and what Triton makes of it for a GPU that need not be there.

`python tests/test_gpu_text.py` writes the reviewed texts again. The texts of all rules stand among the CPU's;
what the GPU's printer does differently shows on a few.
"""

from __future__ import annotations

import collections
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from test_draws import Drawn
from torch import nn

import steprule
from steprule import Elementwise, hyper
from steprule.engine import blocks, storage
from steprule.engine.runners.kernels import batch
from steprule.engine.runners.kernels.gpu import kernel as gpu_kernel
from steprule.engine.runners.kernels.gpu import launch as gpu_launch
from steprule.engine.runners.kernels.gpu.functions import OPTIONS, functions_of
from steprule.words import larger, largest, mean, norm

GOLDEN = Path(__file__).parent / "golden" / "gpu"


class Normalized(Elementwise):
    """A gradient step whose length follows the parameter's; it needs three sums before it can begin.

    When: never.

        θ ← θ - lr·(g - mean g)·‖θ‖ / max(max|g|, 0.001)

    State: none.
    Source: none.
    """

    lr: float = hyper(0.1)

    @staticmethod
    def update(h: Any, p: Any, g: Any, s: Any, t: float) -> Any:
        g = g - mean(g)
        return -h.lr * (g * norm(p) / larger(largest(abs(g)), 1e-3))


KERNELS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "AdamW": (steprule.AdamW, torch.float32, {}),
    "AdamW-bfloat16": (steprule.AdamW, torch.bfloat16, {}),
    "AdamW-float64": (steprule.AdamW, torch.float64, {}),
    "AdamW-int8": (steprule.AdamW, torch.float32, {"state_dtype": "int8"}),
    "Lion-int8-master": (steprule.Lion, torch.bfloat16, {"state_dtype": "int8", "low_precision": "master"}),
    "Lion-kahan": (steprule.Lion, torch.bfloat16, {"low_precision": "kahan"}),
    "Lion-stochastic": (steprule.Lion, torch.bfloat16, {"low_precision": "stochastic"}),
    "Rprop-float16": (steprule.Rprop, torch.float16, {}),
    "Drawn-stochastic": (Drawn, torch.bfloat16, {"low_precision": "stochastic"}),
    "SGD-noise": (steprule.SGD, torch.float32, {"modifiers": [steprule.Noise()]}),
    "Normalized": (Normalized, torch.float32, {}),
    "Adafactor": (steprule.Adafactor, torch.float32, {}),
    "CAME-stochastic": (
        steprule.CAME,
        torch.bfloat16,
        {"state_dtype": "bf16", "low_precision": "stochastic"},
    ),
}


# Values per row and column are made of doubles.
LINED = ("Adafactor", "CAME-stochastic")


def sources(name: str) -> list[Any]:
    rule, dtype, options = KERNELS[name]
    optimizer = rule([nn.Parameter(torch.zeros(64, storage.SMALLEST // 64, dtype=dtype))], **options)
    program = optimizer.program(optimizer.param_groups[0])
    optimizer.init_state()
    (state,) = optimizer.state.values()
    keys = {letter: storage.entry_of(state, slot.key) for letter, slot in program.slots.items()}
    keys |= batch.beside(program, state)
    dtypes = {"p": dtype, "g": dtype} | {name: state[key].dtype for name, key in keys.items()}
    columns = gpu_kernel.sources_of_columns(program, dtypes)
    return [*gpu_kernel.sources(program, dtypes), *(source for source in columns if source is not None)]


def text(name: str) -> str:
    return "\n\n".join(source.text for source in sources(name))


@pytest.mark.parametrize("name", KERNELS)
def test_the_text_is_the_reviewed_one(name: str) -> None:
    wanted = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert text(name) == wanted, f"{name} changed; python tests/test_gpu_text.py updates it"


def test_no_text_is_left_over() -> None:
    assert sorted(file.stem for file in GOLDEN.iterdir()) == sorted(KERNELS)


# What the compiler makes of it


def compiled() -> dict[str, dict[str, int]]:
    """How often each instruction stands in the machine code of each kernel, for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found: dict[str, dict[str, int]] = {}
    for name in (*KERNELS, "AdamW unaligned"):
        name, _, unaligned = name.partition(" ")
        dtype = KERNELS[name][1]
        wide = "*fp64" if dtype == torch.float64 or name in LINED else "*fp32"
        kinds = {"scalars": wide, "scaling": "*fp32"} | dict.fromkeys(
            ("reduced", "partials", "lengths", "sums"), "*fp64"
        )
        for number, source in enumerate(sources(name)):
            for function in filter(None, functions_of(*source)):
                places = {argument: place for place, argument in enumerate(function.arg_names)}
                given = {"ALIGNED": not unaligned, "BLOCK": gpu_launch.BLOCK, "SHARING": blocks.BLOCK}
                constants = {(places[x],): value for x, value in given.items() if x in places}
                signature = {x: "constexpr" if x in given else kinds.get(x, "*i64") for x in places}
                hints = {(i,): [["tt.divisibility", 16]] for x, i in places.items() if x not in given}
                made = triton.compile(
                    ASTSource(function, signature, constants, hints),
                    target=GPUTarget("cuda", 90, 32),
                    options=OPTIONS,
                )
                words = re.findall(r"^\s+(?:@!?%\w+ )?([a-z][\w.:]+)", made.asm["ptx"], re.MULTILINE)
                found[" ".join([name, str(number), function.__name__, unaligned]).strip()] = dict(
                    collections.Counter(words)
                )
    return found


@pytest.fixture(scope="module")
def instructions() -> dict[str, dict[str, int]]:
    """Compiled in a process of its own: in this one Triton may be an interpreter."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return json.loads(python(__file__, "compile", env={"TRITON_INTERPRET": "0"}).splitlines()[-1])


def test_every_pass_compiles(instructions: dict[str, dict[str, int]]) -> None:
    passes = [f"Normalized {i} {f}" for i, f in ((0, "kernel"), (1, "kernel"), (1, "combine"))]
    singles = [f"{name} 0 kernel" for name in KERNELS if name not in ("Normalized", *LINED)]
    lined = [
        f"{name} {i} {function}"
        for name in LINED
        for i, source in enumerate(sources(name))
        for function in ("kernel", "combine")
        if f"def {function}(" in source.text
    ]
    assert set(instructions) == {*passes, "Normalized 2 kernel", "AdamW 0 kernel unaligned", *singles, *lined}


ARRAYS = {"AdamW": (4, 3), "AdamW-bfloat16": (4, 3), "Rprop-float16": (4, 3)}
THREADS = 32 * OPTIONS["num_warps"]


@pytest.mark.parametrize("name", ARRAYS)
def test_full_blocks_move_16_bytes_at_a_time(name: str, instructions: dict[str, dict[str, int]]) -> None:
    found = instructions[f"{name} 0 kernel"]
    each = gpu_launch.BLOCK // THREADS * KERNELS[name][1].itemsize // 16
    loaded, stored = ARRAYS[name]
    assert found["ld.global.v4.b32"] == loaded * each
    assert found["st.global.v4.b32"] == stored * each


def test_at_odd_addresses_numbers_move_one_by_one(instructions: dict[str, dict[str, int]]) -> None:
    found = instructions["AdamW 0 kernel unaligned"]
    assert not [word for word in found if ".v4" in word or ".v2" in word]


@pytest.mark.parametrize(
    ("name", "kind"), [("AdamW", "f32"), ("AdamW-bfloat16", "f32"), ("AdamW-float64", "f64")]
)
def test_words_are_rounded_as_stated(name: str, kind: str, instructions: dict[str, dict[str, int]]) -> None:
    """IEEE quotients and roots, nothing flushed to zero; products fused in `lerp` and `addcmul` alone."""
    found = instructions[f"{name} 0 kernel"]
    entries = 2 * gpu_launch.BLOCK // THREADS  # of a full block, and of the rest
    assert found[f"sqrt.rn.{kind}"] == entries
    assert found[f"div.rn.{kind}"] == 2 * entries
    assert found[f"fma.rn.{kind}"] == 2 * entries
    assert not [word for word in found if "approx" in word or "ftz" in word or "full" in word]


def test_numbers_that_are_none_pass_through_clamp(instructions: dict[str, dict[str, int]]) -> None:
    found = instructions["Rprop-float16 0 kernel"]
    assert found["max.NaN.f32"] == found["min.NaN.f32"] > 0


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        print(json.dumps(compiled()))
    else:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for old in GOLDEN.iterdir():
            old.unlink()
        for kernel in KERNELS:
            (GOLDEN / f"{kernel}.txt").write_text(text(kernel), encoding="utf-8")
