"""The words of CPU kernels for sums of doubles, which need more limbs, in place of those of the same names.

Importing this module imports llvmlite, so only the compiler does it.
"""

# pyright: basic

from __future__ import annotations

from steprule.engine.program.exact import DOUBLE
from steprule.engine.runners.kernels.cpu.sums import sums_in

sum_of_chunk, sum_of_tensor, add_exactly, clear, add_values, add_squares, rounded, add_sum = sums_in(DOUBLE)
