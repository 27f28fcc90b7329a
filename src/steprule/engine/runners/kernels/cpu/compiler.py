"""Compile the text of a kernel with LLVM, and link what was compiled."""
# llvmlite has no type annotations.
# pyright: basic

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

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
            "language.py",
            "translator.py",
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
        metadata.version("llvmlite"),
        llvm.get_default_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        hashlib.sha256(texts).hexdigest(),
    )
    return "\n".join(parts)


def machine_code(text: str, file: str) -> bytes:
    """Object code with one C function, ENTRY, from a text that defines `kernel(job)`."""
    from steprule.engine.runners.kernels.cpu import translator  # what is stored needs none of it

    target: Any = machine()
    source = translator.module_of(text, file, ENTRY)
    source.triple, source.data_layout = target.triple, str(target.target_data)
    module: Any = llvm.parse_assembly(str(source))
    module.verify()
    tuning: Any = llvm.create_pipeline_tuning_options(speed_level=3)
    # Between loops there is nothing to gather into vectors.
    tuning.slp_vectorization = False
    passes: Any = llvm.create_pass_builder(target, tuning)
    passes.getModulePassManager().run(module, passes)
    return target.emit_object(module)


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
