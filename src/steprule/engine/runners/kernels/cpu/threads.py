"""Runs a compiled kernel on the threads that torch's own kernels run on.

A second thread pool would compete with torch's for the cores: torch's threads spin for a while after each
kernel, and other threads wait. So a kernel is passed to `GOMP_parallel` of the OpenMP library that torch itself
uses, with the same number of threads. Without such a library (only Linux is supported), and in a forked child,
whose copy of the pool has no threads, the kernel runs on the calling thread alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Below this many bytes it is not worth waking other threads; torch's own limit is 32,768 elements.
SMALL = 1 << 18


class Job(ctypes.Structure):
    """What a kernel receives: the address of this."""

    thread_number: int  # address of omp_get_thread_num, or 0
    thread_count: int  # address of omp_get_num_threads, or 0
    shares: int  # the number of shares that the chunks are split into
    bounds: int  # address of shares + 1 positions in `order`, where each share begins and ends
    order: int  # address of chunk numbers, share after share
    chunks: int  # address of (tensor, first element, number of elements) per chunk
    tensors: int  # the number of tensors
    pointers: int  # address of one address per array and tensor
    scalars: int  # address of the doubles computed on the host
    rows: int  # address of one index per tensor: where its scalars begin
    reductions: int  # how many the sweep takes
    partials: int  # address of a sum in limbs per chunk and reduction, or of another result in its first place
    width: int  # how many numbers such a sum is kept in
    values: int  # address of what each share is going to add: a row per share and reduction
    room: int  # how many values a row has room for
    sums: int  # address of a sum in limbs per reduction and tensor, and one more
    rounded: int  # address of the same sums as doubles
    scratch: int  # address of one block of floats per share and array of 8-bit codes
    layouts: int  # address of six numbers per tensor (see `places.Laid`)
    places: int  # address of five numbers per chunk: where it is in the whole tensor (see `places.of_chunks`)
    lines: int  # address of the number of rows per tensor
    columns: int  # address of the number of columns per tensor
    first_chunks: int  # address of the first chunk per tensor, and of the end of them all


Job._fields_ = [(name, ctypes.c_int64) for name in Job.__annotations__]


class OpenMP(NamedTuple):
    """The three functions of torch's OpenMP library that kernels need."""

    parallel: Any
    thread_number: int
    thread_count: int


@cache
def openmp() -> OpenMP | None:
    """Torch's OpenMP library, or None if it cannot be found."""
    if sys.platform != "linux":
        return None
    # First the symbols of the whole process, as the loader saw them when it loaded torch (with LD_PRELOAD),
    # then those that libtorch_cpu itself links to.
    for name in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            library = ctypes.CDLL(name)
            parallel = library.GOMP_parallel
            addresses = [
                ctypes.cast(function, ctypes.c_void_p).value
                for function in (library.omp_get_thread_num, library.omp_get_num_threads)
            ]
        except (OSError, AttributeError):
            continue
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        return OpenMP(parallel, addresses[0] or 0, addresses[1] or 0)
    return None


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def alone() -> str | None:
    """Why kernels run on the calling thread alone, or None if they use torch's threads."""
    if _forked:
        return "this process was forked, and OpenMP's threads do not survive a fork"
    if openmp() is None:
        return "no OpenMP library shared with torch was found"
    return None


def threads(size: int) -> int:
    """How many threads to use for this many bytes: all of torch's, or only the calling one."""
    return 1 if size < SMALL or alone() is not None else torch.get_num_threads()


class Kernel:
    """A compiled kernel: the C function void(int64) at an address."""

    def __init__(self, address: int):
        self._address = address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def run(self, job: int, number: int) -> None:
        """Run the job at this address on `number` threads with the GIL released, and return when it is done."""
        library = openmp()
        if number == 1 or library is None:
            self._alone(job)
        else:
            library.parallel(self._address, job, number, 0)
