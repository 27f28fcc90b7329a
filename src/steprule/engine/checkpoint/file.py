"""Checkpoints on disk: written so that a kill loses nothing, read so that a file can do no harm."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Generator, Mapping
from os import PathLike
from pathlib import Path
from typing import IO, Any, cast

import torch

from steprule import errors

TEMPORARY = ".tmp"
# How files begin that torch wrote before 1.6, which are not archives.
OLDER = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


def save_checkpoint(path: str | PathLike[str], checkpoint: Mapping[str, Any]) -> None:
    """Write a training checkpoint so that at any moment there is a complete one: this one or the previous one.

    When: instead of `torch.save`, for files that must survive a kill or a power failure during the writing.
    Several processes may write the same path; the last one wins.

        save_checkpoint("run.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    path: the file; `path` + ".tmp" exists while it is being written. checkpoint: tensors, numbers, strings, and
    dicts, lists and tuples of them.

    Raises: TypeError for anything else, since `load_checkpoint` would refuse it; OSError if the file cannot
    be written. The previous file is then kept.
    """
    file = Path(path).resolve()

    def write(stream: IO[bytes]) -> None:
        torch.save(dict(checkpoint), stream)
        stream.flush()
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(stream.name)
        if unsafe:
            raise errors.not_plain(file, sorted(unsafe))

    replace_file(file, write)


def load_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint into main memory, checking every byte and running no code from it.

    When: always, for files of `save_checkpoint` or `torch.save`; `load_state_dict` then copies the tensors to
    the devices of their parameters. Files of torch before 1.6 can be read too; they have no checksums.

    Raises: FileNotFoundError, or ValueError if the file is damaged, is not a checkpoint, or would run code.
    """
    file = Path(path)
    with open(file, "rb") as stream:
        if stream.read(len(OLDER)) == OLDER:
            return _read_older(file)
        stream.seek(0)
        try:
            with zipfile.ZipFile(stream) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} is not what was written")
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            checkpoint: Any = None if unsafe else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes the readers raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise errors.damaged_file(file, reason) from error
    if unsafe:
        raise errors.unsafe_file(file, sorted(unsafe))
    if not isinstance(checkpoint, dict):
        raise errors.damaged_file(file, f"it holds {type(checkpoint).__name__}, not a dict")
    return cast("dict[str, Any]", checkpoint)


def _read_older(file: Path) -> dict[str, Any]:
    """Read a file that torch wrote before 1.6: not an archive, and without checksums."""
    try:
        checkpoint: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the reader raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise errors.older_file(file, reason) from error
    if not isinstance(checkpoint, dict):
        raise errors.older_file(file, f"it holds {type(checkpoint).__name__}, not a dict")
    return cast("dict[str, Any]", checkpoint)


def replace_file(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at any moment, even after a power failure, the old or the new one is there.

    Raises: OSError if it cannot be written, and what `write` raises; then the old one is kept.
    """
    temporary = file.with_name(file.name + TEMPORARY)
    try:
        with _folder_for_one(file.parent) as folder:
            try:
                with open(temporary, "wb") as stream:
                    write(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            if folder is not None:
                os.fsync(folder)
    except OSError as error:
        raise errors.cannot_write(file, error) from error
    except RuntimeError as error:  # torch.save raises it when the disk is full, and the reason is its context
        raise errors.cannot_write(file, error.__context__ or error) from error


@contextlib.contextmanager
def _folder_for_one(path: Path) -> Generator[int | None]:
    """The folder, opened for syncing, and locked so that two writers never share a temporary file."""
    if sys.platform == "win32":  # where a folder cannot be opened
        yield None
        return
    import fcntl

    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems that cannot lock
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(folder)
