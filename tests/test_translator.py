"""What the text of a kernel means: Python's own arithmetic, and one kind for each variable."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llvmlite", reason="the kernels are compiled by it")

from steprule.engine.runners.kernels.cpu import compiler, translator
from steprule.engine.runners.kernels.cpu.threads import Job, Kernel

HEAD = """
from numpy import float32, float64, inf

from steprule.engine.runners.kernels.cpu.language import *
from steprule.engine.runners.kernels.cpu.sums import *
from steprule.engine.runners.kernels.cpu.words import *


def kernel(job):
    given, found = int64_array(job, 0, 0, 0), int64_array(job, 1, 0, 0)
    numbers = float64_array(job, 2, 0, 0)
"""


def run(lines: str, given: list[int], room: int = 4) -> tuple[list[int], list[float]]:
    """What these lines write to `found` and to `numbers`."""
    text = HEAD + "".join(f"    {line}\n" for line in lines.splitlines())
    address, engine = compiler.link(compiler.machine_code(text, "text"))
    arrays = np.array(given, dtype=np.int64), np.zeros(room, dtype=np.int64), np.zeros(room)
    pointers = np.array([x.ctypes.data for x in arrays])
    job = Job(tensors=1, pointers=pointers.ctypes.data)
    Kernel(address).run(ctypes.addressof(job), 1)
    del engine
    return arrays[1].tolist(), arrays[2].tolist()


@pytest.mark.parametrize(("a", "b"), list(itertools.product((7, -7, 6, -6, 0), (3, -3, 1))))
def test_quotients_are_rounded_down_as_in_python(a: int, b: int) -> None:
    lines = "found[0], found[1] = given[0] // given[1], given[0] % given[1]"
    assert run(lines, [a, b])[0][:2] == [a // b, a % b]


def test_a_quotient_by_nothing_is_nothing() -> None:
    """A chunk of an empty tensor may have no columns: the processor would end the process."""
    assert run("found[0], found[1] = given[0] // given[1], given[0] % given[1]", [7, 0])[0][:2] == [0, 0]


def test_loops_choices_and_what_is_computed_before_it_is_stored() -> None:
    lines = """
for i in range(given[0], given[1], given[2]):
    found[0] += i
    i = 100
low, high = 1, 2
low, high = high, low
found[1] = low * 10 + high
count = 0
while count < given[1] and given[count] != 3:
    count += 1
found[2] = count
if given[0] > 5 or given[1] == 20:
    found[3] = -1 if given[0] < 0 else max(min(given[0], 4), given[2])
else:
    found[3] = 9
"""
    assert run(lines, [2, 20, 3])[0] == [sum(range(2, 20, 3)), 21, 2, 3]


def test_what_decides_nothing_any_more_is_not_computed() -> None:
    """The element before the first one may be in no memory at all."""
    lines = "if given[0] == 1 or given[1 << 50] == 0:\n    found[0] = 1\n"
    lines += "if given[0] == 0 and given[1 << 50] == 0:\n    found[1] = 1"
    assert run(lines, [1])[0][:2] == [1, 0]


def test_whole_numbers_with_and_without_a_sign() -> None:
    lines = "found[0] = given[0] >> 1\nnumbers[0] = float64(uint64(given[0]))\nnumbers[1] = float64(given[0])\n"
    lines += "numbers[2] = float64(uint64(given[0]) >> uint64(1))\nnumbers[3] = float64(float32(0.1))"
    found, numbers = run(lines, [-2])
    assert found[0] == -1
    assert numbers == [float(2**64 - 2), -2.0, float(2**63 - 1), float(np.float32(0.1))]


def test_comparisons_with_what_is_no_number() -> None:
    tests = ["x < 1.0", "x > 1.0", "x <= x", "x >= x", "x == x", "x != x", "x != 1.0"]
    lines = "x = inf - inf\n" + "".join(f"if {t}:\n    found[{i}] = 1\n" for i, t in enumerate(tests))
    assert run(lines, [0], room=len(tests))[0] == [0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "line",
    [
        "x = 1\nx = 1.0",
        "found[0] = 1.0",
        "x = 1 + 1.0",
        "if 1 < 1.0:\n    found[0] = 1",
        "x = 1 if 1 < 2 else 1.0",
    ],
)
def test_kinds_are_never_mixed_silently(line: str) -> None:
    with pytest.raises(TypeError, match="is needed"):
        run(line, [0])


def test_nothing_is_contracted_or_reordered(tmp_path: Path) -> None:
    """The text is what is computed: each operation is rounded on its own."""
    text = HEAD + "    numbers[0] = numbers[1] * numbers[2] + numbers[3]\n"
    module = str(translator.module_of(text, str(tmp_path / "k.py"), "entry"))
    assert "fmul double" in module
    assert "fadd double" in module
    assert not any(word in module for word in ("fast", "contract", "reassoc", "nnan"))
