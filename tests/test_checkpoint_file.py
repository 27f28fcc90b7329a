"""Checkpoints on disk: whatever stops the process or the disk, the last complete one is there."""

from __future__ import annotations

import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python

from steprule import load_checkpoint, save_checkpoint
from steprule.lab.run_folder import RunConfig, RunFolder


def checkpoint(number: int) -> dict[str, Any]:
    return {"step": number, "numbers": torch.full((50_000,), float(number))}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    save_checkpoint(file, checkpoint(1))
    (tmp_path / "run.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*What was there before is kept"):
        save_checkpoint(file, checkpoint(2))
    assert load_checkpoint(file)["step"] == 1
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "first.pt", checkpoint(1))
    (tmp_path / "latest.pt").symlink_to("first.pt")
    save_checkpoint(tmp_path / "latest.pt", checkpoint(2))
    assert (tmp_path / "latest.pt").is_symlink()
    assert load_checkpoint(tmp_path / "first.pt")["step"] == 2


def test_two_writers_of_one_file_never_mix(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                save_checkpoint(file, {"step": number, "numbers": torch.full((20_000,), float(number))})
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in (1, 2, 3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if file.exists():
            loaded = load_checkpoint(file)
            assert bool((loaded["numbers"] == loaded["step"]).all())
    for writer in writers:
        writer.join()
    assert not failures


# In the middle of a save

# A child dies at one point of a save: when a write would exceed a number of bytes, or before or after a
# call. `ulimit -f` and a call that kills are exact, even on a busy machine.
KILLS = """
import os, resource, signal, sys, torch
from steprule import load_checkpoint, save_checkpoint

file = sys.argv[1]
torch.set_num_threads(1)

def checkpoint(number):
    return {"step": number, "numbers": torch.full((50_000,), float(number))}

def in_byte(size):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

def at_call(name, number, begun):
    real, calls = getattr(os, name), []
    def deadly(*arguments):
        calls.append(name)
        result = real(*arguments) if begun or len(calls) < number else None
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(os, name, deadly)

save_checkpoint(file, checkpoint(0))
size, last = os.path.getsize(file), 0
places = [(in_byte, (n,), False) for n in (0, 1, 100, 4096, size // 2, size - 1)]
places += [(at_call, ("fsync", 1, begun), False) for begun in (False, True)]
places += [(at_call, ("replace", 1, begun), begun) for begun in (False, True)]
places += [(at_call, ("fsync", 2, begun), True) for begun in (False, True)]
for place, arguments, written in places:
    child = os.fork()
    if child == 0:
        try:
            place(*arguments)
            save_checkpoint(file, checkpoint(last + 1))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), (place, arguments, status)
    assert os.path.exists(file + ".tmp") != written, (place, arguments)
    loaded = load_checkpoint(file)
    assert loaded["step"] == last + written, (place, arguments, loaded["step"], last)
    assert bool((loaded["numbers"] == loaded["step"]).all())
    # What the dead one left behind, lock and half a file, is in nobody's way.
    last += 1
    save_checkpoint(file, checkpoint(last))
    assert load_checkpoint(file)["step"] == last
    assert os.listdir(os.path.dirname(file)) == [os.path.basename(file)]
print(len(places))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    assert python("-c", KILLS, str(tmp_path / "run.pt")) == "12"


# Power failures: what was not synced may be lost, and a folder may keep its old names


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was asked of the disk, in order: ('sync', name, size), ('replace', old, new)."""
    asked: list[tuple[str, ...]] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        size = "folder" if stat.S_ISDIR(found.st_mode) else f"{found.st_size} bytes"
        asked.append(("sync", name, size))
        real_sync(descriptor)

    def replace(old: Any, new: Any) -> None:
        asked.append(("replace", Path(old).name, Path(new).name))
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return asked


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files cannot be named here")


def replacing(file: Path) -> list[tuple[str, ...]]:
    """First the whole file is on the disk, then it gets its name, then the name is on the disk."""
    return [
        ("sync", f"{file.name}.tmp", f"{file.stat().st_size} bytes"),
        ("replace", f"{file.name}.tmp", file.name),
        ("sync", file.parent.name, "folder"),
    ]


@needs_proc
def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, disk: list[tuple[str, ...]]) -> None:
    file = tmp_path / "run.pt"
    for number in (1, 2):
        save_checkpoint(file, checkpoint(number))
        assert disk == replacing(file)
        disk.clear()


@needs_proc
def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_them(
    tmp_path: Path, disk: list[tuple[str, ...]]
) -> None:
    folder = RunFolder(tmp_path)
    folder.save_config(RunConfig("digits", "Adam", {}, "none", 1, 1, 1, 1))
    assert disk == replacing(tmp_path / "config.json")
    disk.clear()
    with folder.opened():
        folder.add_metrics({"loss": 1.0})
        folder.save_checkpoint({"step": 1})
    written = (tmp_path / "metrics.jsonl").stat().st_size
    assert disk == [("sync", "metrics.jsonl", f"{written} bytes"), *replacing(tmp_path / "checkpoint.pt")]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_keeps_the_old_checkpoint(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    file = tmp_path / "run.pt"
    save_checkpoint(file, checkpoint(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match=r"cannot write .*run\.pt: .*Input/output error"):
            save_checkpoint(file, checkpoint(2))
    assert load_checkpoint(file)["step"] == 1
    assert os.listdir(tmp_path) == ["run.pt"]
    save_checkpoint(file, checkpoint(2))
    assert load_checkpoint(file)["step"] == 2
