"""A disk cache of compiled kernels, so that only the first process compiles.

LLVM compiles a kernel's text once. The object code is stored beside the text in a cache folder, under a name
made from everything it depends on; what a text says about its program at the top is not part of that, so
programs that differ only in what the host computes share their code. A later process checks the digest of the
file and links it, without a look at the words of kernels. A file that fails the check is compiled again. Files
appear by renaming, so a reader never sees a partial file, even if several processes compile at once or one is
killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import threading
from pathlib import Path
from typing import Any

_lock = threading.Lock()
_loaded: dict[str, tuple[int, Any] | NoKernel] = {}


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread may have held the lock at the fork


class NoKernel(RuntimeError):
    """The reason why a kernel cannot be compiled on this machine."""


def address_of(name: str, text: str) -> int:
    """The address of the compiled kernel, which is a C function void(int64).

    name: the start of the name of the file with its text. text: the kernel's source, as `cpu.kernel` writes it.

    Raises: NoKernel if it cannot be compiled here. Later calls raise the same error without trying again.
    """
    with _lock:
        if text not in _loaded:
            try:
                _loaded[text] = _obtain(name, text)
            except Exception as error:
                _loaded[text] = NoKernel(f"compiling the kernel failed ({type(error).__name__}: {error})")
        found = _loaded[text]
    if isinstance(found, NoKernel):
        raise found
    return found[0]


def source_of(name: str, text: str) -> Path | None:
    """The file where a kernel's text can be read, or None if there is no cache."""
    folder = cache_folder()
    return None if folder is None else folder / _source_name(name, text)


def _source_name(name: str, text: str) -> str:
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"


def _code_of(text: str) -> str:
    """What is compiled of a text: all but what it says at its top."""
    return text.partition('\n"""\n\n')[2] or text


def _key(text: str) -> str:
    from steprule.engine.runners.kernels.cpu import compiler as kernel_compiler  # needs an optional library

    return hashlib.sha256(f"{kernel_compiler.surroundings()}\n{_code_of(text)}".encode()).hexdigest()


def _obtain(name: str, text: str) -> tuple[int, Any]:
    from steprule.engine.runners.kernels.cpu import compiler as kernel_compiler  # needs an optional library

    folder, source = cache_folder(), _source_name(name, text)
    # If the disk is full, the next process compiles again; nothing else is lost.
    if folder is not None:
        with contextlib.suppress(OSError):
            keep(folder / source, text.encode())
    known = _loaded.get(_code_of(text))
    if isinstance(known, tuple):
        return known
    key = _key(text)
    kept = None if folder is None else folder / f"{key[:32]}.o"
    code = None if kept is None else _read(kept, key)
    if code is None:
        code = kernel_compiler.machine_code(text, source if folder is None else str(folder / source))
        if kept is not None:
            with contextlib.suppress(OSError):
                keep(kept, _digest(key, code) + code)
    made = _loaded[_code_of(text)] = kernel_compiler.link(code)
    return made


# On disk


def cache_folder() -> Path | None:
    """The cache folder: $XDG_CACHE_HOME, else ~/.cache, else a temporary folder that belongs to this user."""
    for folder in _candidates():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


def _candidates() -> list[Path]:
    places: list[Path] = []
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        places.append(Path(given) / "steprule")
    else:
        with contextlib.suppress(RuntimeError):
            places.append(Path.home() / ".cache" / "steprule")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    temporary = Path(tempfile.gettempdir()) / f"steprule-{user}"
    if _private(temporary):
        places.append(temporary)
    return places


def _private(folder: Path) -> bool:
    """Whether the folder belongs to this user: in a shared place anyone can create one with that name."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return own and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022


def _digest(key: str, code: bytes) -> bytes:
    return hashlib.sha256(key.encode() + code).digest()


def _read(file: Path, key: str) -> bytes | None:
    """The object code, or None if the file is missing, truncated, changed or belongs to another kernel."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    code = content[size:]
    return code if code and content[:size] == _digest(key, code) else None


def keep(file: Path, content: bytes) -> None:
    """Write the file in one piece, unless it exists with this content."""
    with contextlib.suppress(OSError):
        if file.read_bytes() == content:
            return
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".unfinished-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
