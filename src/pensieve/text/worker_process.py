"""A process that runs text jobs, one at a time, within limits of time and memory.

Knows jobs; never queues. The operating system enforces the limits.

Two alarms measure the process's own processor time. The first raises in Python, so that a template that loops
is stopped and named. The second ends the process, since a regular expression in a tokenizer does not notice
the first.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from pensieve.errors import PensieveError
from pensieve.text.chat_text import ChatText
from pensieve.text.jobs import TextJob, run_job

GRACE_S = 0.25  # seconds between the two alarms
GROWN_BYTES = 64 << 20  # a worker that keeps so much more memory than at its start is replaced by a fresh one
HAS_ALARMS = hasattr(signal, "setitimer")  # not on Windows: there, only the parent's clock limits a job
HARD_ALARM = getattr(signal, "SIGVTALRM", None)

_LENGTH = struct.Struct("!Q")
_TEMPLATE = "<template>"  # jinja's name for a template's code


class TimeLimit(BaseException):
    """A job's time is up.

    Not an `Exception`, so that no code takes it for a template's own error.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a job."""

    kind: Literal["done", "error", "slow", "memory", "bug"]
    value: Any = None  # done: the result; error: code and message; slow: what was running; bug: a traceback
    leaves: bool = False  # the process ends after this reply and must be replaced


def send_frame(connection: socket.socket, data: bytes) -> None:
    """Write a message, within the socket's timeout."""
    connection.sendall(_LENGTH.pack(len(data)))
    connection.sendall(data)


def receive_frame(connection: socket.socket) -> bytes:
    """Read a message.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: no data came within the socket's timeout.
    """
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    return _receive(connection, length)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, at = memoryview(data), 0
    while at < length:
        count = connection.recv_into(view[at:])
        if not count:
            raise EOFError
        at += count
    return bytes(data)


def serve_jobs(connection: socket.socket, text: ChatText, memory_bytes: int, niceness: int) -> None:
    """Run jobs until the other side is gone: the main function of a worker.

    Args:
        connection: gives (seconds, job), pickled, and takes a `Reply`.
        text: the model's.
        memory_bytes: what jobs may take beyond what the process has now.
        niceness: the process's niceness, as the operating system counts it.
    """
    _settle_in(memory_bytes, niceness)
    begun_with = _memory_now()
    while True:
        try:
            data = receive_frame(connection)
        except (EOFError, OSError):
            return
        reply = _do(data, text)
        leaves = reply.kind in ("memory", "slow") or _memory_now() - begun_with > GROWN_BYTES
        try:
            send_frame(
                connection, pickle.dumps(Reply(reply.kind, reply.value, leaves), pickle.HIGHEST_PROTOCOL)
            )
        except OSError:
            return
        if leaves:
            return


def _do(data: bytes, text: ChatText) -> Reply:
    try:
        limit_s, job = pickle.loads(data)
        assert isinstance(job, TextJob)
        with alarms(limit_s):
            return Reply("done", run_job(job, text))
    except TimeLimit as error:
        return Reply("slow", error.what)
    except MemoryError:
        return Reply("memory")
    except PensieveError as error:
        return Reply("error", (error.code, error.message))
    except Exception:
        return Reply("bug", traceback.format_exc(limit=8))


@contextlib.contextmanager
def alarms(limit_s: float) -> Iterator[None]:
    """Limit the processor time of the block: beyond it, `TimeLimit` is raised or the process ends.

    Call `set_alarms` first.
    """
    if not HAS_ALARMS:
        yield
        return
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s + GRACE_S)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == _TEMPLATE:
            raise TimeLimit("the chat template")
        frame = frame.f_back
    raise TimeLimit("the tokenizer")


def _settle_in(memory_bytes: int, niceness: int) -> None:
    set_alarms()
    if hasattr(os, "nice"):
        os.nice(niceness)
    limit_memory(memory_bytes)


def set_alarms() -> None:
    """Install the handlers that `alarms` needs."""
    if HAS_ALARMS:
        signal.signal(signal.SIGPROF, _on_alarm)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def limit_memory(more_bytes: int) -> None:
    """Limit this process to so much more memory than it has now; larger requests fail.

    Does nothing if the system cannot.
    """
    if not sys.platform.startswith("linux"):
        return
    import resource

    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + more_bytes, hard))


@contextlib.contextmanager
def memory_limited(more_bytes: int) -> Iterator[None]:
    """`limit_memory` for the block.

    Jinja computes a template's constants when it parses it, and reports running out of memory as any other
    error.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit_memory(more_bytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _memory_now() -> int:
    return _status("RssAnon") if sys.platform.startswith("linux") else 0


def _status(name: str) -> int:
    """A number of bytes that Linux reports of this process."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(name.encode() + b":"):
                return int(line.split()[1]) << 10
    return 0
