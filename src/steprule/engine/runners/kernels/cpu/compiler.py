"""Compile the text of a kernel with numba, and link stored object code with LLVM alone."""
# numba and llvmlite have no type annotations.
# pyright: basic

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import llvmlite.binding as llvm

from steprule.engine import blocks, draws, storage
from steprule.engine.program import exact
from steprule.engine.runners.kernels.cpu.threads import Job

ENTRY = "steprule_kernel"


def machine() -> Any:
    """A code generator for this processor. An engine that links with it takes ownership of it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="default",
    )


@cache
def surroundings() -> str:
    """Everything besides its text that a kernel's machine code depends on."""
    here = Path(__file__)
    words = map(
        here.with_name,
        (
            "words.py",
            "power_words.py",
            "line_words.py",
            "storage_words.py",
            "draw_words.py",
            "sums.py",
            "sums_of_doubles.py",
        ),
    )
    files = (here, *words, blocks.__file__, storage.__file__, draws.__file__, exact.__file__)
    texts = b"".join(Path(file).read_bytes() for file in files)
    parts = (
        *Job.__annotations__,
        metadata.version("numba"),
        metadata.version("llvmlite"),
        llvm.get_default_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        hashlib.sha256(texts).hexdigest(),
    )
    return "\n".join(parts)


def machine_code(text: str, file: str) -> bytes:
    """Object code with one C function, ENTRY, from a text that defines `kernel(job)`."""
    import numba

    if cast(Any, numba).config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    scope: dict[str, Any] = {}
    exec(compile(text, file, "exec"), scope)
    options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    with _without_collecting():
        compiled: Any = numba.njit(numba.void(numba.int64), **options)(scope["kernel"])
    (signature,) = compiled.signatures
    intermediate: str = compiled.inspect_llvm(signature)
    name: str = compiled.overloads[signature].fndesc.llvm_func_name
    module: Any = llvm.parse_assembly(intermediate + _entry_text(name))
    module.verify()
    return machine().emit_object(module)


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """No garbage collection: it would take a fifth of a compilation, and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _entry_text(name: str) -> str:
    """A C function around numba's own: numba passes addresses for a result and for an error as well."""
    return f"""
define void @{ENTRY}(i64 %job) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @{name}(ptr %result, ptr %error, i64 %job)
  ret void
}}
"""


def link_text(text: str, name: str) -> tuple[int, Any]:
    """The address of a function in LLVM's own language, and the engine that owns its memory."""
    module: Any = llvm.parse_assembly(text)
    module.verify()
    code: bytes = machine().emit_object(module)
    return _linked(code, name)


def link(code: bytes) -> tuple[int, Any]:
    """The entry's address, and the engine that owns its memory."""
    return _linked(code, ENTRY)


def _linked(code: bytes, name: str) -> tuple[int, Any]:
    engine: Any = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine.get_function_address(name), engine
