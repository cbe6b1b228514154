"""One child process seen from its parent: pipe, last words, signs of life, unanswered commands.

Knows processes, pipes and plain messages; never whether a child is replaced.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from pensieve.engine.child import run_child
from pensieve.engine.messages import Command, Event, Failed, Finished, Lost, Submit
from pensieve.engine.vitals import LOOK_S, LivedTime, Patience, Vitals
from pensieve.engine.wire import Beat, Broken, Close, EngineInfo, Inbox, StartProgress
from pensieve.errors import EngineNotReady, EngineRestarted, PensieveError, error_from

log = logging.getLogger(__name__)

LAST_WORDS = 20  # lines of standard error that are remembered
REAPED_WITHIN_S = 5.0  # wait for the exit code if another thread reaped the process
_KILLED_S = 10.0  # a killed child may take so long to exit: longer only if a driver hangs in the kernel


@dataclass(frozen=True, slots=True)
class End:
    """How a child ended."""

    how: str  # for clients: "signal 9"
    reason: PensieveError  # for operators: it may name files of this machine
    ready_s: float | None  # how long it was ready; None if it never was


class Unanswered:
    """The commands that a child was sent and has not answered. For one thread at a time."""

    def __init__(self) -> None:
        self._requests: set[str] = set()
        self._tags: set[str] = set()

    def add(self, command: Command) -> None:
        """A command is sent."""
        if isinstance(command, Submit):
            self._requests.add(command.request_id)
        elif tag := getattr(command, "tag", ""):
            self._tags.add(tag)

    def discard(self, command: Command | Close) -> None:
        """A command could not be sent."""
        self._requests.discard(getattr(command, "request_id", ""))
        self._tags.discard(getattr(command, "tag", ""))

    def settle(self, events: list[Event]) -> None:
        """Some commands were answered."""
        for event in events:
            if isinstance(event, (Finished, Failed)):
                self._requests.discard(event.request_id)
            elif tag := getattr(event, "tag", ""):
                self._tags.discard(tag)

    def fail(self, error: PensieveError) -> list[Event]:
        """Answer every command with an error; none is unanswered after that."""
        events: list[Event] = [
            Failed(request_id, error.code, error.message) for request_id in sorted(self._requests)
        ]
        events += [Lost(tag, error.message, error.code) for tag in sorted(self._tags)]
        self._requests.clear()
        self._tags.clear()
        return events


class ChildProcess:
    """One child process, its pipe, and what it prints on standard error."""

    def __init__(
        self, main: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        reader, writer = context.Pipe(duplex=False)
        level = logging.getLogger("pensieve").getEffectiveLevel()
        self.process: SpawnProcess = context.Process(
            target=run_child,
            args=(main, theirs, writer, os.getpid(), level, dict(environment), arguments),
            name="pensieve-engine",
            daemon=True,
        )
        try:
            self.process.start()
        except BaseException:
            for connection in (self.connection, theirs, reader, writer):
                connection.close()
            raise
        theirs.close()
        writer.close()
        self.last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._listener = threading.Thread(
            target=self._listen, args=(reader,), name="pensieve-engine-stderr", daemon=True
        )
        self._listener.start()

    def end(self, leave_s: float) -> int:
        """Wait for it to exit, kill it after `leave_s`. Returns its exit code (negative: a signal)."""
        self.process.join(leave_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(_KILLED_S)
        code = self._exit_code()
        self._listener.join(1.0)  # (longer only if a grandchild holds the pipe)
        try:
            self.process.close()
        except ValueError:
            log.error(
                "the engine process %s was killed %g s ago and still has not ended: a driver may hang",
                self.process.pid,
                _KILLED_S,
            )
        return code

    def unblock_writers(self) -> None:
        """Shut the pipe down: a write that blocks on it ends, even if the process does not."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)

    def describe_end(self, code: int, broken: Broken | None, ready_s: float | None) -> End:
        """How it ended with this exit code, having said `broken`, if anything."""
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if broken is not None:
            if broken.code == EngineRestarted.code:  # our own words, which name nothing of this machine
                how = broken.message.removeprefix(KILLED)
            return End(how, error_from(broken.code, broken.message), ready_s)
        message = f"the engine process died: {_signal_name(how, code)}"
        if said := " | ".join(line for line in list(self.last_words)[-5:] if line):
            message += f"; it said: {said}"
        return End(how, PensieveError(message), ready_s)

    def _exit_code(self) -> int:
        """Its exit code once it has ended.

        Another thread may have reaped it and not have noted the code yet.
        """
        by_s = time.monotonic() + REAPED_WITHIN_S
        while (code := self.process.exitcode) is None and time.monotonic() < by_s:
            time.sleep(0.01)
        return -signal.SIGKILL if code is None else code

    def _listen(self, reader: Connection) -> None:
        """Copy its lines to our standard error, with its name before each."""
        pid = self.process.pid
        with reader, open(os.dup(reader.fileno()), encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self.last_words.append(line.rstrip())
                with contextlib.suppress(
                    ValueError, OSError
                ):  # ours may be closed; the child's is still read
                    print(f"engine[{pid}] {line.rstrip()}", file=sys.stderr, flush=True)


KILLED = "the engine process was killed: "  # how the reason begins if `Watch` had it killed


class Watch:
    """Reads a child's messages and judges whether it lives."""

    def __init__(self, child: ChildProcess, start_timeout_s: float, patience: Patience) -> None:
        self._child, self._patience = child, patience
        self._inbox, self._lived = Inbox(child.connection), LivedTime()
        self._vitals: Vitals | None = None  # None until it is ready
        self._start_timeout_s = start_timeout_s
        self._start_by_s = start_timeout_s  # in lived time
        self._now_s = 0.0  # lived time
        self._progress = "starting a process"

    def is_ready(self) -> None:
        """It said that it is ready."""
        self._vitals = Vitals(self._patience, self._now_s)

    def hear(self, wake: Connection | None, close_by_s: float | None) -> list[Any] | None:
        """The next messages, perhaps none after a while; None if the child is gone.

        Args:
            wake: ends the wait early.
            close_by_s: monotonic time at which the wait ends; None if there is no such time.
        """
        child = self._child
        watched: list[Any] = [child.connection, child.process.sentinel]
        if wake is not None:
            watched.append(wake)
        left_s = LOOK_S if close_by_s is None else min(LOOK_S, max(0.0, close_by_s - time.monotonic()))
        heard = wait(watched, left_s)
        self._now_s = self._lived.now()
        if child.connection not in heard:
            return None if child.process.sentinel in heard else []
        try:
            messages = self._inbox.take()
        except (EOFError, OSError):
            return None
        except Exception as error:  # no child of this version sends this
            child.process.kill()
            text = f"the engine spoke nonsense: {type(error).__name__}: {error}"
            return [Broken(PensieveError.code, text)]
        if self._vitals is not None:
            self._vitals.heard(self._now_s)
        for message in messages:
            if isinstance(message, Beat) and self._vitals is not None:
                self._vitals.beat(message.stalled_s)
            elif isinstance(message, StartProgress):
                self._start_by_s = self._now_s + self._start_timeout_s
                self._progress = message.text
        return messages

    def verdict(self) -> Broken | None:
        """Why the child must be killed; None if it lives."""
        if self._vitals is not None:
            why = self._vitals.why_dead(self._now_s)
            return None if why is None else Broken(EngineRestarted.code, f"{KILLED}{why}")
        if self._now_s < self._start_by_s:
            return None
        text = (
            f"the engine showed no progress for {self._start_timeout_s:g} s while it was starting "
            f"({self._progress})"
        )
        return Broken(EngineNotReady.code, text)


def changed_model(first: EngineInfo | None, info: EngineInfo) -> str | None:
    """Why a restarted engine cannot go on with what the first one's clients were told; None if it can."""
    if first is None:
        return None
    for name in ("num_parameters", "vocab_size", "max_context", "chunk_tokens"):
        if (was := getattr(first, name)) != (now := getattr(info, name)):
            return (
                f"the model is not the one that was served: {name} was {was} and is {now}. "
                "Put its files back, or start the server again"
            )
    return None


def _signal_name(how: str, code: int) -> str:
    try:
        return f"{how} ({signal.Signals(-code).name})" if code < 0 else how
    except ValueError:
        return how
