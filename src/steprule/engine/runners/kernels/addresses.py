"""Where tensors are in memory, asked of many at once.

A step compares the address of every tensor with the one that its plan was made for. To ask small tensors from
Python takes longer than to step them, so a loop of machine code asks them. It calls a function that torch has
for the code that torch.compile writes; without that function, or without llvmlite, Python asks.

The function ends the process if a tensor has no address, as wrappers and fake tensors have none. So it is only
called for tensors whose forms are those of tensors that have told theirs to Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray  # slow to import

# Below this many tensors, the call itself takes longer.
LEAST = 32

address: Callable[[Tensor], int] = Tensor.data_ptr

# The elements of the list are fetched ahead: first the object, then what it points to.
LOOP = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define i64 @at(i64 %i, i64 %last) {
  %beyond = icmp sgt i64 %i, %last
  %place = select i1 %beyond, i64 %last, i64 %i
  ret i64 %place
}

define void @addresses(ptr %list, i64 %count, ptr %found, ptr %item_of, ptr %address_of) {
entry:
  %last = sub i64 %count, 1
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %i8 = add i64 %i, 8
  %far = call i64 @at(i64 %i8, i64 %last)
  %later = call ptr %item_of(ptr %list, i64 %far)
  call void @llvm.prefetch.p0(ptr %later, i32 0, i32 3, i32 1)
  %i4 = add i64 %i, 4
  %near = call i64 @at(i64 %i4, i64 %last)
  %soon = call ptr %item_of(ptr %list, i64 %near)
  %field = getelementptr i8, ptr %soon, i64 16
  %inner = load ptr, ptr %field
  call void @llvm.prefetch.p0(ptr %inner, i32 0, i32 3, i32 1)
  %tensor = call ptr %item_of(ptr %list, i64 %i)
  %address = call i64 %address_of(ptr %tensor)
  %place = getelementptr i64, ptr %found, i64 %i
  store i64 %address, ptr %place
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %loop, label %end
end:
  ret void
}
"""


class Addresses:
    """Where these tensors are. Keeps no tensor alive."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.known: Sequence[int] | NDArray[np.int64] = list(map(address, tensors))
        self._found: NDArray[np.int64] | None = None
        if len(tensors) >= LEAST and _loop() is not None:
            self.known = np.array(self.known, dtype=np.int64)
            self._found = np.empty_like(self.known)
            # Asked once: numpy takes microseconds for each.
            self._bytes, self._at = self.known.tobytes(), self._found.ctypes.data

    def of(self, tensors: list[Tensor]) -> Sequence[int] | NDArray[np.int64]:
        """The addresses of as many tensors of the same forms."""
        loop = None if self._found is None else _loop()
        if self._found is None or loop is None:
            return list(map(address, tensors))
        # The loop takes a list and nothing else; users may put a tuple into a group.
        loop(tensors if type(tensors) is list else list(tensors), self._at)
        return self._found

    def hold(self, tensors: list[Tensor]) -> bool:
        """Whether as many tensors of the same forms are where these were."""
        found: Any = self.of(tensors)
        return found == self.known if isinstance(found, list) else found.tobytes() == self._bytes


@cache
def _loop() -> Callable[[list[Tensor], int], None] | None:
    """Writes the addresses of the tensors in a list to memory; None where it is not available."""
    try:
        from torch._C._dynamo.guards import (
            _torchinductor_pyobject_tensor_data_ptr as address_of,  # pyright: ignore
        )

        from steprule.engine.runners.kernels.cpu import compiler
    except ImportError:
        return None
    if Tensor.__basicsize__ < 24:  # what the loop fetches ahead lies inside an object
        return None
    code, engine = compiler.link_text(LOOP, "addresses")
    run: Any = ctypes.PYFUNCTYPE(None, ctypes.py_object, *[ctypes.c_int64] * 4)(code)
    item_of = ctypes.cast(ctypes.pythonapi.PyList_GetItem, ctypes.c_void_p).value

    def loop(tensors: list[Tensor], found: int, owner: Any = engine) -> None:
        run(tensors, len(tensors), found, item_of, address_of)

    return loop
