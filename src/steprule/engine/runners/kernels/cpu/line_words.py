"""The words that a generated CPU kernel on rows and columns is written in, besides those of `words`."""
# llvmlite has no type annotations.
# pyright: basic

from __future__ import annotations

from llvmlite import ir

from steprule.engine.runners.kernels.cpu.language import binary
from steprule.engine.runners.kernels.cpu.words import INT64, _row_of

lines_of = binary(_row_of("lines"))
columns_of = binary(_row_of("columns"))
first_chunk = binary(_row_of("first_chunks"))


def _next_chunk(builder, job, tensor):
    return _row_of("first_chunks")(builder, job, builder.add(tensor, ir.Constant(INT64, 1)))


end_chunk = binary(_next_chunk)
