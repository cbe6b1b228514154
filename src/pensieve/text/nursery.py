"""Makes text workers: a process that loads tokenizer and template once and forks a worker in milliseconds.

Knows processes, sockets and how to load; never jobs or queues. The process loads what the server is going to
load, before the server does, within a limit of time and memory: a template that loops for ever is found here.
Where processes cannot fork (Windows), each worker loads for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from pensieve.errors import ModelRefused, PensieveError, error_from
from pensieve.text.chat_text import ChatText
from pensieve.text.worker_process import HARD_ALARM, TimeLimit, alarms, limit_memory, serve_jobs, set_alarms

log = logging.getLogger(__name__)

LOAD_S = 10.0  # seconds of processor time to load a tokenizer and try its template
LOAD_WALL_S = 300.0  # seconds of real time for the same, on a slow disk and a busy machine
LOAD_BYTES = 3 << 29
FORK_S = 60.0  # the first fork waits for the tokenizer's twin
CAN_FORK = hasattr(os, "fork")
_PR_SET_PDEATHSIG = 1

Load = Callable[[], ChatText]  # pickled; imports what it needs


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker may take."""

    memory_bytes: int  # beyond what it has at its start
    niceness: int = 0


class NurseryLost(Exception):
    """The nursery's process ended, or does not answer: another one is needed."""


class Worker(Protocol):
    """A worker as its owner sees it."""

    connection: socket.socket
    pid: int

    def end(self) -> int | None:
        """Make sure that the worker has ended.

        Returns:
            Its exit code (negative: a signal), or None if that is unknown.
        """
        ...


class Nursery(Protocol):
    """Makes workers."""

    def load(self, load: Load) -> None:
        """Load what workers need.

        Raises:
            PensieveError: what loading raised; `ModelRefused` if it took too long or ended the process.
        """
        ...

    def make(self, limits: WorkerLimits) -> Worker:
        """Make a fresh worker. One thread may call this at a time.

        Raises:
            NurseryLost: the nursery cannot make workers any more.
        """
        ...

    def close(self) -> None:
        """End the nursery. Workers end when their connections do."""
        ...


def new_nursery(prepare: Callable[[], None], load_s: float = LOAD_S) -> Nursery:
    """The kind of nursery that this system supports.

    Args:
        prepare: pickled; imports what loading needs, before loading begins.
        load_s: processor time that loading may take.
    """
    return ForkingNursery(prepare, load_s) if CAN_FORK else SpawningNursery()


class ForkingNursery:
    """A process with the tokenizer in its memory, which forks workers."""

    def __init__(self, prepare: Callable[[], None], load_s: float = LOAD_S) -> None:
        self._load_s = load_s
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=_run_nursery, args=(theirs, os.getpid(), prepare), name="pensieve-text", daemon=True
        )
        try:
            self._process.start()
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def load(self, load: Load) -> None:
        try:
            self._control.send(("load", (load, self._load_s)))
            outcome = self._receive(LOAD_WALL_S)
        except (NurseryLost, OSError):
            self._process.join(1.0)
            code = self._process.exitcode
            self.close()
            if code is None or (HARD_ALARM is not None and code == -HARD_ALARM):
                how = f"takes more than {self._load_s:g} s of processor time"
            else:
                how = f"ended the process that tried it (exit code {code}, as when memory runs out)"
            raise ModelRefused(
                f"the model's tokenizer or chat template cannot be used: loading it {how}"
            ) from None
        if outcome is not None:
            raise error_from(*outcome)

    def make(self, limits: WorkerLimits) -> Worker:
        ours, theirs = socket.socketpair()
        try:
            self._control.send(("fork", limits))
            reduction.send_handle(self._control, theirs.fileno(), self._process.pid)
            pid = self._receive(FORK_S)
        except (NurseryLost, OSError) as error:
            ours.close()
            raise NurseryLost from error
        finally:
            theirs.close()
        return _Forked(ours, pid, self)

    def reap(self, pid: int) -> int | None:
        """End a worker and return its exit code; None if that is unknown."""
        try:
            self._control.send(("end", pid))
            code: int | None = self._receive(FORK_S)
        except (NurseryLost, OSError):
            return None  # the worker ends by itself: its connection is closed, or its time runs out
        return code

    def close(self) -> None:
        self._control.close()
        self._process.join(1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, within_s: float) -> Any:
        try:
            if not self._control.poll(within_s):
                raise NurseryLost
            return self._control.recv()
        except (EOFError, OSError) as error:
            raise NurseryLost from error


class _Forked:
    """A worker that a nursery forked."""

    def __init__(self, connection: socket.socket, pid: int, nursery: ForkingNursery) -> None:
        self.connection, self.pid = connection, pid
        self._nursery = nursery

    def end(self) -> int | None:
        self.connection.close()
        return self._nursery.reap(self.pid)


class SpawningNursery:
    """Workers that each load for themselves, which takes seconds: for systems that cannot fork."""

    def __init__(self) -> None:
        self._load: Load | None = None

    def load(self, load: Load) -> None:
        """Load nothing yet: the first worker shows whether loading works."""
        self._load = load

    def make(self, limits: WorkerLimits) -> Worker:
        assert self._load is not None
        ours, theirs = socket.socketpair()
        context = multiprocessing.get_context("spawn")
        process = context.Process(
            target=_run_spawned, args=(theirs, self._load, limits), name="pensieve-text", daemon=True
        )
        try:
            process.start()
        finally:
            theirs.close()
        return _Spawned(ours, process)

    def close(self) -> None:
        pass


class _Spawned:
    """A worker that was started as a process of its own."""

    def __init__(self, connection: socket.socket, process: SpawnProcess) -> None:
        self.connection, self.pid = connection, process.pid or 0
        self._process = process

    def end(self) -> int | None:
        self.connection.close()
        self._process.join(0.2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


# -- in the nursery's process


def _run_nursery(control: Connection, parent_pid: int, prepare: Callable[[], None]) -> None:
    _settle_in(parent_pid)
    prepare()
    text: ChatText | None = None
    while True:
        try:
            what, argument = control.recv()
        except (EOFError, OSError):
            os._exit(0)
        if what == "load":
            text = _load(control, *argument)
        elif what == "fork":
            assert text is not None
            _fork(control, argument, text)
        else:
            control.send(_end(argument))


def _load(control: Connection, load: Load, load_s: float) -> ChatText | None:
    limit_memory(LOAD_BYTES)
    set_alarms()
    try:
        with alarms(load_s):
            text = load()
            text.settle()
    except TimeLimit as error:
        control.send(
            (
                ModelRefused.code,
                f"the model cannot be used: {error.what} takes more than {load_s:g} s of processor time to "
                "be tried",
            )
        )
        return None
    except PensieveError as error:
        control.send((error.code, error.message))
        return None
    except MemoryError:
        control.send(
            (
                ModelRefused.code,
                f"the model's tokenizer or chat template takes more than {LOAD_BYTES >> 20} MiB of memory to "
                "load",
            )
        )
        return None
    except Exception as error:
        log.exception("loading the tokenizer failed")
        control.send(
            (PensieveError.code, f"the tokenizer could not be loaded: {type(error).__name__}: {error}")
        )
        return None
    control.send(None)
    with alarms(load_s):
        text.prepare_twin()  # while the server loads the same
    gc.collect()
    gc.freeze()  # what is loaded stays: the workers' collectors must not copy its pages
    return text


def _fork(control: Connection, limits: WorkerLimits, text: ChatText) -> None:
    handle = reduction.recv_handle(control)
    pid = os.fork()
    if pid == 0:
        try:
            control.close()
            serve_jobs(socket.socket(fileno=handle), text, limits.memory_bytes, limits.niceness)
            os._exit(0)
        finally:
            os._exit(1)  # an exception of a fork must not reach its parent's code
    os.close(handle)
    control.send(pid)


def _end(pid: int) -> int | None:
    try:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            os.kill(pid, signal.SIGKILL)  # a child that was not waited for: no other process has its id
            _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status)


def _run_spawned(connection: socket.socket, load: Load, limits: WorkerLimits) -> None:
    _settle_in(os.getppid())
    text = load()
    text.settle()
    with contextlib.suppress(OSError):
        serve_jobs(connection, text, limits.memory_bytes, limits.niceness)


def _settle_in(parent_pid: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    os.environ["RUST_BACKTRACE"] = "0"  # a tokenizer that fails on a text fails again on the next
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if hasattr(os, "getppid") and os.getppid() != parent_pid and sys.platform != "win32":
        os._exit(1)
