"""The cache of compiled kernels: processes check everything they read, and a fork does not break it."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import finish, python, started

import steprule
from steprule.engine.runners.kernels import cache as kernel_cache
from steprule.engine.runners.kernels.cpu import compiler as kernel_compiler

pytest.importorskip("llvmlite", reason="the kernels are compiled by it")
llvm = kernel_compiler.llvm

TEXT = """
from numpy import float32 as number

from steprule.engine.runners.kernels.cpu.words import *


def kernel(job):
    for part in range(thread_number(job), shares(job), thread_count(job)):
        number(part)
"""

# A step whose outcome every process must agree on, and whether a text was translated for it.
STEP = """
import sys, torch, steprule
param = torch.nn.Parameter(torch.linspace(-1, 1, 100_000))
param.grad = torch.linspace(1, -1, 100_000)
steprule.AdamW([param], lr=0.1, fused=True).step()
translator = "steprule.engine.runners.kernels.cpu.translator"
print(translator in sys.modules, float(param.double().sum()), float(param[7]))
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(folder), **more}


def run(script: str, env: dict[str, str] | None = None) -> str:
    return python("-c", script, env=env)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own, in this process too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)
    return tmp_path / "steprule"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start as a new process would."""
    monkeypatch.setattr(kernel_cache, "_loaded", {})


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were compiled during the test."""
    files: list[str] = []
    real = kernel_compiler.machine_code

    def noted(text: str, file: str) -> bytes:
        files.append(file)
        return real(text, file)

    monkeypatch.setattr(kernel_compiler, "machine_code", noted)
    return files


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    first, second = (run(STEP, environment(tmp_path)).split() for _ in range(2))
    assert (first[0], second[0]) == ("True", "False")
    assert first[1:] == second[1:]
    assert len(list((tmp_path / "steprule").glob("*.o"))) == 1
    (text,) = (tmp_path / "steprule").glob("AdamW-*.py")
    assert text.read_text().startswith('"""AdamW, pass 1 of 1')


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "no digest": lambda content: content[32:],
    "text": lambda content: b"hello",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_compiled_again(
    damage: str, folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cache.address_of("k", TEXT)
    (kept,), (text,) = folder.glob("*.o"), folder.glob("k-*.py")
    kept.write_bytes(DAMAGE[damage](kept.read_bytes()))
    text.write_text("raise SystemExit")
    forget(monkeypatch)
    kernel_cache.address_of("k", TEXT)
    assert len(compiled) == 2
    assert text.read_text() == TEXT
    forget(monkeypatch)
    kernel_cache.address_of("k", TEXT)
    assert len(compiled) == 2


def test_another_kernels_file_is_not_taken(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cache.address_of("one", TEXT)
    (one,) = folder.glob("*.o")
    kernel_cache.address_of("other", TEXT + "\n")
    (other,) = {*folder.glob("*.o")} - {one}
    one.write_bytes(other.read_bytes())
    forget(monkeypatch)
    kernel_cache.address_of("one", TEXT)
    assert len(compiled) == 3
    forget(monkeypatch)
    kernel_cache.address_of("one", TEXT)
    assert len(compiled) == 3


def test_what_the_code_depends_on_is_in_its_name(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another processor or another LLVM finds nothing of ours."""
    kernel_cache.address_of("k", TEXT)
    surroundings = kernel_compiler.surroundings()
    monkeypatch.setattr(kernel_compiler, "surroundings", lambda: surroundings + "another processor")
    forget(monkeypatch)
    kernel_cache.address_of("k", TEXT)
    assert len(compiled) == 2
    assert len(list(folder.glob("*.o"))) == 2


def test_texts_with_the_same_code_are_compiled_once(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program at the top may differ in what the host computes; each text can be read."""
    texts = {
        name: f'"""{name}; written by steprule.\n\n{name}: r0 = p\n"""\n{TEXT}' for name in ("one", "other")
    }
    found = {kernel_cache.address_of(name, text) for name, text in texts.items()}
    assert len(found) == len(compiled) == len(list(folder.glob("*.o"))) == 1
    for name, text in texts.items():
        source = kernel_cache.source_of(name, text)
        assert source is not None
        assert source.read_text() == text
    forget(monkeypatch)
    kernel_cache.address_of("other", texts["other"])
    assert len(compiled) == 1
    changed = texts["one"].replace("number(part)", "number(part + 1)")
    assert kernel_cache.address_of("one", changed) not in found
    assert len(compiled) == 2


def test_rules_whose_kernels_are_equal_share_them(folder: Path, compiled: list[str]) -> None:
    """DoG and DoWG differ in the learning rate, which the host computes from the same sums."""
    for rule in (steprule.DoG, steprule.DoWG):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = rule([param], fused=True)
        optimizer.step()
        files = re.findall(r"kernel: (\S+)", optimizer.explain())
        titles = [Path(file).read_text().partition(";")[0] for file in files]
        assert titles == [f'"""{rule.__name__}, pass {number} of 2' for number in (1, 2)]
    names = [Path(file).name.rpartition("-")[0] for file in compiled]
    assert names == ["DoG-float32-1", "DoG-float32-2", "sums"]


# What a kernel's machine code depends on besides its text, each with another value.
CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "processor": lambda patch: patch.setattr(llvm, "get_host_cpu_name", lambda: "another"),
    "features of the processor": lambda patch: patch.setattr(
        llvm, "get_host_cpu_features", lambda: SimpleNamespace(flatten=lambda: "another")
    ),
    "operating system": lambda patch: patch.setattr(llvm, "get_default_triple", lambda: "another"),
    "llvmlite": lambda patch: _another_version(patch, "llvmlite"),
    "language": lambda patch: _another_text(patch, "language.py"),
    "translator": lambda patch: _another_text(patch, "translator.py"),
    "words": lambda patch: _another_text(patch, "words.py"),
    "sums": lambda patch: _another_text(patch, "sums.py"),
    "exact": lambda patch: _another_text(patch, "exact.py"),
    "storage": lambda patch: _another_text(patch, "storage.py"),
    "words of storage": lambda patch: _another_text(patch, "storage_words.py"),
    "blocks": lambda patch: _another_text(patch, "blocks.py"),
    "compiler": lambda patch: _another_text(patch, "compiler.py"),
    "what a kernel is handed": lambda patch: patch.setitem(kernel_compiler.Job.__annotations__, "another", int),
}


def _another_version(patch: pytest.MonkeyPatch, library: str) -> None:
    real = kernel_compiler.metadata.version
    patch.setattr(kernel_compiler.metadata, "version", lambda name: "0" if name == library else real(name))


def _another_text(patch: pytest.MonkeyPatch, file: str) -> None:
    real = Path.read_bytes
    patch.setattr(Path, "read_bytes", lambda path: real(path) + b"#" * (path.name == file))


@pytest.mark.parametrize("change", CHANGES)
def test_a_kernel_made_elsewhere_is_not_found(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder may be shared by machines: code for other features of a processor would crash."""
    here = kernel_cache._key(TEXT)
    assert here == kernel_cache._key(TEXT)
    assert here != kernel_cache._key(TEXT + "\n")
    monkeypatch.setattr(kernel_compiler, "surroundings", kernel_compiler.surroundings.__wrapped__)
    assert here == kernel_cache._key(TEXT)
    CHANGES[change](monkeypatch)
    assert here != kernel_cache._key(TEXT)


def test_every_module_that_a_kernel_imports_is_in_its_name() -> None:
    """What the words take from modules of ours is compiled into the kernel."""
    known = {
        "steprule.engine",
        "engine.blocks",
        "program.exact",
        "cpu.language",
        "cpu.threads",
        "cpu.words",
        "cpu.storage_words",
    }
    for name in ("translator.py", "words.py", "storage_words.py", "draw_words.py", "sums.py"):
        text = (Path(kernel_compiler.__file__).parent / name).read_text(encoding="utf-8")
        imported = re.findall(r"^(?:from|import) (steprule\S*)", text, re.MULTILINE)
        unknown = [x for x in imported if x not in known and ".".join(x.split(".")[-2:]) not in known]
        assert not unknown, "`compiler.surroundings` and CHANGES need the new one"


def test_threads_that_want_one_kernel_get_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were made twice, the memory of the first would be freed while another thread runs it."""
    real, begun, twice = kernel_cache._obtain, [], threading.Event()

    def obtain(name: str, text: str) -> Any:
        begun.append(name)
        if len(begun) == 2:
            twice.set()
        twice.wait(0.5)  # time for the other thread to come in here too, if nothing stops it
        return real(name, text)

    monkeypatch.setattr(kernel_cache, "_obtain", obtain)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(kernel_cache.address_of("k", TEXT))) for _ in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun == ["k"]
    assert len(found) == 2
    assert len(set(found)) == 1


def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        command = ("-c", STEP)
        processes = [stack.enter_context(started(*command, env=environment(tmp_path))) for _ in range(3)]
        results = {tuple(finish(process).split()[1:]) for process in processes}
    assert len(results) == 1
    files = sorted(file.suffix for file in (tmp_path / "steprule").iterdir())
    assert files == [".o", ".py"]
    assert run(STEP, environment(tmp_path)).split()[0] == "False"


def test_a_process_killed_while_it_compiles_leaves_nothing_half_written(tmp_path: Path) -> None:
    slowly = STEP.replace(
        "param =",
        "from steprule.engine.runners.kernels.cpu import compiler as c\n"
        "link = c.machine_code\n"
        "c.machine_code = lambda *x: (link(*x), print('compiled', flush=True), input())[0]\n"
        "param =",
        1,
    )
    with started("-c", slowly, env=environment(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "compiled"
    assert not list((tmp_path / "steprule").glob("*.o"))
    assert run(STEP, environment(tmp_path)).split()[0] == "True"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        kernel_cache.keep(tmp_path / "k.o", b"code")
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_kernels_go_to_a_temporary_folder_of_ones_own(tmp_path: Path) -> None:
    blocked = environment(Path("/dev/null"), HOME="/dev/null", TMPDIR=str(tmp_path))
    assert run(STEP, blocked).split()[0] == "True"
    assert run(STEP, blocked).split()[0] == "False"
    (own,) = tmp_path.glob("steprule-*")
    assert own.stat().st_mode & 0o777 == 0o700


def test_nowhere_to_write_is_no_reason_to_fail(tmp_path: Path) -> None:
    """A shared folder of that name that belongs to someone else is not used."""
    mine = tmp_path / f"steprule-{os.getuid()}"
    mine.mkdir(mode=0o777)
    mine.chmod(0o777)
    blocked = environment(Path("/dev/null"), HOME="/dev/null", TMPDIR=str(tmp_path))
    assert run(STEP, blocked).split()[0] == "True"
    assert list(mine.iterdir()) == []


# Forks

# The child only takes the step: most of torch's own kernels would wait forever for its threads.
FORK = """
import os, signal, numpy, torch, steprule

torch.set_num_threads(2)

def train(steps):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(300_000))
    optimizer = steprule.AdamW([param], lr=0.1, fused=True)
    param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()
    return param, optimizer

torch.randn(1000, 1000) @ torch.randn(1000, 1000)
wanted = train(5)[0].detach().numpy()
param, optimizer = train(3)
child = os.fork()
if child == 0:
    signal.alarm(120)
    optimizer.step()
    optimizer.step()
    os._exit(0 if numpy.array_equal(param.detach().numpy(), wanted) else 3)
_, status = os.waitpid(child, 0)
assert status == 0, status
optimizer.step()
optimizer.step()
assert numpy.array_equal(param.detach().numpy(), wanted)
"""

WORKERS = """
import torch, steprule
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
model = torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1))
optimizer = steprule.AdamW(model.parameters(), fused=True)
for _ in range(2):
    for x, y in DataLoader(data, batch_size=16, num_workers=2, multiprocessing_context="fork"):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
print("done")
"""


# Another thread holds a lock when the process forks: of its plans in the middle of a step, or of the cache.
FORK_WHILE_LOCKED = """
import os, signal, sys, threading, numpy, torch, steprule
from steprule.engine.runners.kernels import fused, cache as kernel_cache

torch.set_num_threads(1)

def made(steps):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
    param.grad = torch.linspace(1, -2, 1000)
    optimizer = steprule.AdamW([param], lr=0.1, fused=True)
    for _ in range(steps):
        optimizer.step()
    return param, optimizer

wanted = made(3)[0].detach().numpy()
param, optimizer = made(1)
inside, go_on = threading.Event(), threading.Event()
step = fused.Batch.step

def slow_step(*arguments):
    if threading.current_thread() is thread:
        inside.set()
        go_on.wait()
    step(*arguments)

def hold():
    with kernel_cache._lock:
        inside.set()
        go_on.wait()

fused.Batch.step = slow_step
thread = threading.Thread(target={"plans": optimizer.step, "cache": hold}[sys.argv[1]])
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(120)
    optimizer.step()
    optimizer.step()
    right = numpy.array_equal(param.detach().numpy(), wanted)
    os._exit(0 if right and numpy.array_equal(made(3)[0].detach().numpy(), wanted) else 3)
_, status = os.waitpid(child, 0)
go_on.set()
thread.join()
assert status == 0, status
while optimizer.state[param]["step"] < 3:
    optimizer.step()
assert numpy.array_equal(param.detach().numpy(), wanted)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("script", [FORK, WORKERS], ids=["a step in the child", "workers that fork"])
def test_a_fork_breaks_nothing(script: str) -> None:
    """The right results on both sides, and no hang: an alarm would end the child."""
    run(script)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("lock", ["plans", "cache"])
def test_a_fork_while_another_thread_holds_a_lock(lock: str) -> None:
    """The child steps and makes new optimizers; the parent continues."""
    python("-c", FORK_WHILE_LOCKED, lock)


def test_threads_are_not_used_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    from steprule.engine.runners.kernels.cpu import threads as cpu_threads

    monkeypatch.setattr(cpu_threads, "_forked", True)
    assert cpu_threads.threads(1 << 30) == 1
    assert "forked" in (cpu_threads.alone() or "")
    monkeypatch.setattr(cpu_threads, "_forked", False)
    assert cpu_threads.threads(1 << 30) in (1, torch.get_num_threads())
