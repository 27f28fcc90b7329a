"""The processes that train. They stay for the whole race: starting one takes longer than many a training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeAlias

from steprule.lab.errors import LabError, told
from steprule.lab.racing.trial import Job, Outcome, carry_out

__all__ = ["Workers", "workers"]

Done = tuple[Job, Outcome]


class Workers(Protocol):
    """Carries out jobs, several at a time."""

    def room(self) -> int:
        """How many more jobs can be started now."""
        ...

    def start(self, job: Job) -> None:
        """Begin a job."""
        ...

    def finished(self) -> list[Done]:
        """Wait until a job has ended; gives all that have. Raises `LabError` if one has failed."""
        ...


@contextmanager
def workers(count: int) -> Generator[Workers]:
    """This many processes, or this process itself for one."""
    if count == 1:
        yield InThisProcess()
        return
    # A new process begins with nothing of this one; a forked one would have its threads' locks.
    context = multiprocessing.get_context("spawn")
    pool = Processes()
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, sys.path), daemon=True)
            process.start()
            there.close()
            pool.idle.append((process, here))
        yield pool
    finally:
        pool.end()


class InThisProcess:
    """One worker, which is this process."""

    def __init__(self) -> None:
        self._job: Job | None = None

    def room(self) -> int:
        """One, if there is no job."""
        return int(self._job is None)

    def start(self, job: Job) -> None:
        """Remember the job."""
        self._job = job

    def finished(self) -> list[Done]:
        """Carry the job out."""
        job, self._job = self._job, None
        return [] if job is None else [(job, carry_out(job))]


Channel: TypeAlias = "Connection[Any, Any]"
Worker: TypeAlias = tuple[BaseProcess, Channel]


class Processes:
    """Workers in processes of their own."""

    def __init__(self) -> None:
        self.idle: list[Worker] = []
        self._busy: dict[Channel, tuple[Worker, Job]] = {}

    def room(self) -> int:
        """How many are idle."""
        return len(self.idle)

    def start(self, job: Job) -> None:
        """Give the job to an idle process."""
        worker = self.idle.pop(0)
        self._busy[worker[1]] = worker, job
        worker[1].send(job)

    def finished(self) -> list[Done]:
        """Wait for results."""
        done: list[Done] = []
        for connection in _ready([*self._busy]):
            worker, job = self._busy.pop(connection)
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                worker[0].join(1)
                raise LabError(
                    f"the process that trained {job.optimizer} {job.number} has ended (exit code "
                    f"{worker[0].exitcode}); there may be too little memory."
                ) from None
            self.idle.append(worker)
            if isinstance(answer, str):
                raise LabError(answer)
            done.append((job, answer))
        return done

    def end(self) -> None:
        """End all processes, whatever they do."""
        for process, connection in [*self.idle, *(worker for worker, _ in self._busy.values())]:
            process.terminate()
            process.join()
            connection.close()


def _ready(connections: Sequence[Channel]) -> list[Channel]:
    return [one for one in wait(connections) if isinstance(one, Connection)]


def _serve(connection: Channel, path: list[str]) -> None:
    """Carry out jobs until the process that sends them is gone; Ctrl-C is its business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for job in _jobs(connection):
        try:
            answer: Outcome | str = carry_out(job)
        except LabError as error:
            answer = str(error)
        except Exception as error:
            answer = f"{told(error)}."
        connection.send(answer)


def _jobs(connection: Channel) -> Iterator[Job]:
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


def _end_with_parent() -> None:
    """A parent that was killed cannot end its children."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
