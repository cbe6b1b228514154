"""The parent's side of the pipe: an engine in a process of its own, replaced when it dies, stands still or hangs. Every command is answered.

Knows processes, pipes and plain messages; never torch, text or HTTP. A front end posts commands to it as it would to an `Engine`
and is handed the same events. Why a process: a thread that is busy a fifth of the time slows a step of many small operations by a third.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import MappingProxyType
from typing import Any, Literal, cast

from pensieve.engine.child import run_child, serve_engine
from pensieve.engine.messages import Command, Event, Failed, Finished, Lost, Submit
from pensieve.engine.vitals import LOOK_S, LivedTime, Patience, Vitals
from pensieve.engine.wire import Beat, Broken, Close, EngineInfo, Inbox, Progress, send
from pensieve.errors import (
    ConfigError,
    EngineClosed,
    EngineNotReady,
    EngineRestarted,
    InvalidRequest,
    ModelRefused,
    ModelUnavailable,
    PensieveError,
    error_from,
)

__all__ = ["DEFAULT_ENVIRONMENT", "EngineInfo", "EngineProcess", "State", "serve_engine"]

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "restarting", "failed", "closed"]

# OpenMP's own waiting is left as it is. SmolLM2-135M in bf16, 8 requests decoding on 2 cores, the parent busy 20 % of the time, other work on
# the machine; medians (third quartiles) of 22 interleaved runs, tokens/s: default 145 (182), OMP_WAIT_POLICY=PASSIVE 141 (171),
# GOMP_SPINCOUNT=100000 128 (155), 10000 130 (165). The runs of one setting differ by more than the settings do: no setting was shown to help.
# oneDNN keeps a compiled primitive for each shape that it meets, 1,024 of them by default, each of 0.2 to 2 MB. Products are called with few row
# counts (`worker/products.py`), and need some 300; attention by torch's own operations meets as many shapes as there are context lengths.
DEFAULT_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")}
)
MAX_START_FAILURES = 5  # in a row, of an engine that was never ready
SILENT_BEATS_S = 2.5  # a heartbeat later than this means that the whole process stands still
LAST_WORDS = 20  # lines of standard error that are remembered
REAPED_WITHIN_S = 5.0  # between the end of a process and whoever waited for it writing down how it ended
# Of a first start, nothing to try again: it would fail the same way. Later the same model has been served here, and what is wrong may pass.
_USER_ERRORS = frozenset(kind.code for kind in (ConfigError, InvalidRequest, ModelRefused, ModelUnavailable))
_LEAVE_S = 5.0  # a child that closed its pipe may take so long to exit
_KILLED_S = 10.0  # a killed one, to be gone; longer only in the middle of a call into a driver that hangs


@dataclass(frozen=True, slots=True)
class _End:
    """How a child ended."""

    how: str  # for clients whose request it was: "signal 9"
    reason: PensieveError  # for those who run it
    ready_s: float | None  # how long it was ready; None: it never was


class _InFlight:
    """What the child was given and has not answered. Not safe to use from two threads at once."""

    def __init__(self) -> None:
        self._requests: set[str] = set()
        self._tags: set[str] = set()

    def add(self, command: Command) -> None:
        if isinstance(command, Submit):
            self._requests.add(command.request_id)
        elif tag := getattr(command, "tag", ""):
            self._tags.add(tag)

    def discard(self, command: Command | Close) -> None:
        self._requests.discard(getattr(command, "request_id", ""))
        self._tags.discard(getattr(command, "tag", ""))

    def settle(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, (Finished, Failed)):
                self._requests.discard(event.request_id)
            elif tag := getattr(event, "tag", ""):
                self._tags.discard(tag)

    def take(self, error: PensieveError) -> list[Event]:
        """An answer for everybody; nobody waits any more."""
        events: list[Event] = [
            Failed(request_id, error.code, error.message) for request_id in sorted(self._requests)
        ]
        events += [Lost(tag, error.message, error.code) for tag in sorted(self._tags)]
        self._requests.clear()
        self._tags.clear()
        return events


class _Child:
    """One child process, its pipe, and what it says on standard error."""

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
        """Wait for it to exit, kill it after `leave_s`; returns its exit code (negative: a signal)."""
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

    def _exit_code(self) -> int:
        """Of a process that has ended. Another thread may have been told of it first, and not have written it down yet."""
        by_s = time.monotonic() + REAPED_WITHIN_S
        while (code := self.process.exitcode) is None and time.monotonic() < by_s:
            time.sleep(0.01)
        return -signal.SIGKILL if code is None else code

    def _listen(self, reader: Connection) -> None:
        """Copy its lines to our standard error, named."""
        pid = self.process.pid
        with reader, open(os.dup(reader.fileno()), encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self.last_words.append(line.rstrip())
                with contextlib.suppress(
                    ValueError, OSError
                ):  # ours may be closed; the child's must be read all the same
                    print(f"engine[{pid}] {line.rstrip()}", file=sys.stderr, flush=True)


class EngineProcess:
    """Posts commands to an engine in a child process, hands its events out, and starts it again when it dies.

    `post`, `ready`, `close` and the properties may be used from any thread.
    """

    def __init__(
        self,
        main: Callable[..., None],
        arguments: tuple[Any, ...] = (),
        *,
        emit: Callable[[list[Event]], None],
        on_state: Callable[[State], None] | None = None,
        restart: bool = True,
        start_timeout_s: float = 300.0,
        patience: Patience = Patience(),
        hold_s: float = 60.0,
        backoff_s: float = 0.5,
        max_backoff_s: float = 60.0,
        healthy_s: float = 60.0,
        environment: Mapping[str, str] = DEFAULT_ENVIRONMENT,
    ) -> None:
        """Start the child; returns at once.

        Args:
            main: a function at the top of its module, called in the child as `main(connection, *arguments)`; it ends in `serve_engine`.
            arguments: picklable.
            emit: gets the engine's events, and those made up here for whoever a dead engine leaves without; one call at a time, on
                threads of this object (after `close`, the caller's). It should return soon: the pipe waits meanwhile.
            on_state: told of each new state, on the thread that starts children; `restarts` and `last_error` are up to date by then.
            restart: False: a child that died is not replaced. Else, once one was ready, starts are tried again for as long as this lives.
            start_timeout_s: a child that starts and has shown no progress for so long is killed.
            patience: when one that is ready is taken for dead, and killed.
            hold_s: how long a command waits for an engine that is being started *again*, if the last such start did not fail; the first
                start it waits out.
            backoff_s: pause before a start after a death; doubled each time, up to `max_backoff_s`.
            max_backoff_s: its upper bound.
            healthy_s: an engine that was ready for so long sets the pause back to `backoff_s`.
            environment: variables set in the child before it loads any library.
        """
        self._main, self._arguments, self._environment = main, arguments, environment
        self._emit, self._on_state = emit, on_state
        self._restart, self._start_timeout_s, self._hold_s = restart, start_timeout_s, hold_s
        self._patience = patience
        self._backoff_s, self._max_backoff_s, self._healthy_s = backoff_s, max_backoff_s, healthy_s

        self._lock = threading.Condition()  # for all of the following
        self._state: State = "starting"
        self._info: EngineInfo | None = None
        self._process: SpawnProcess | None = None  # of the child there is
        self._connection: Connection | None = None  # of a child that is ready
        self._in_flight = _InFlight()
        self._error: PensieveError | None = None  # of the last child that died
        self._failed_starts = 0  # in a row
        self._restarts = 0
        self._progress = ""
        self._beat = Beat(0.0)
        self._beat_s = 0.0  # when it came
        self._close_by_s: float | None = None  # set: closing

        self._emitting = threading.Lock()  # held while `emit` runs
        self._sending = threading.Lock()  # held while a connection is written to: it must not be closed then
        self._queue: queue.SimpleQueue[tuple[float, Command | Close] | None] = (
            queue.SimpleQueue()
        )  # (when it was posted, what)
        self._wake, self._waker = multiprocessing.get_context("spawn").Pipe(duplex=False)
        # The thread that starts children lives as long as they do: Linux ties a child to the thread that made it.
        self._supervisor = threading.Thread(
            target=self._supervise, name="pensieve-engine-process", daemon=True
        )
        self._writer = threading.Thread(target=self._write, name="pensieve-engine-writer", daemon=True)
        self._supervisor.start()
        self._writer.start()
        _LIVING.add(self)

    # -- from any thread

    def post(self, command: Command) -> None:
        """Hand a command in; returns at once. What comes of it is an event, whatever becomes of the engine."""
        with self._lock:
            if self._state != "closed":
                self._queue.put((time.monotonic(), command))
                return
        self._refuse(command, EngineClosed("the engine is closed"))

    def ready(self, timeout: float | None = None) -> EngineInfo:
        """Wait until the engine is ready.

        Raises:
            EngineNotReady: it is not after `timeout` seconds.
            PensieveError: it could not be started: the error that its start ended with.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._state in ("ready", "failed", "closed"), timeout)
            if self._state == "ready":
                assert self._info is not None
                return self._info
            if self._state == "failed":
                assert self._error is not None
                raise error_from(self._error.code, self._error.message)
            if self._state == "closed":
                raise EngineClosed("the engine is closed")
            raise EngineNotReady(f"the engine is not ready after {timeout:g} s: {self._progress}")

    def restart_with(self, *arguments: Any) -> None:
        """Give children that are started from now on other arguments: what the first one found out need not be found out again."""
        self._arguments = arguments

    def close(self, timeout: float = 30.0) -> None:
        """End the child after the step under way, kill it if that takes longer than `timeout` seconds. Safe to call again."""
        with self._lock:
            if self._close_by_s is None:
                self._close_by_s = time.monotonic() + timeout
                self._queue.put((time.monotonic(), Close()))
                self._waker.send_bytes(b"close")
            self._lock.notify_all()
        if threading.current_thread() not in (
            self._supervisor,
            self._writer,
        ):  # from within `emit` or `on_state` it can only be asked for
            self._supervisor.join(timeout + _LEAVE_S)
            with self._lock:
                stuck = self._process
            if (
                self._supervisor.is_alive() and stuck is not None
            ):  # in the middle of a message that does not end
                with contextlib.suppress(ValueError):  # it ended after all
                    stuck.kill()
            self._supervisor.join()
            self._writer.join()
            _LIVING.discard(self)

    @property
    def state(self) -> State:
        """Where the engine stands: "restarting" follows a death, "failed" means given up."""
        with self._lock:
            return self._state

    @property
    def info(self) -> EngineInfo | None:
        """The engine that is ready, or was last."""
        with self._lock:
            return self._info

    @property
    def restarts(self) -> int:
        """How many times a child was started again."""
        with self._lock:
            return self._restarts

    @property
    def last_error(self) -> str | None:
        """How the last child that died did so: exit code or signal, its own words."""
        with self._lock:
            return None if self._error is None else self._error.message

    @property
    def progress(self) -> str:
        """What a start is busy with, for people."""
        with self._lock:
            return self._progress

    def trouble(self) -> str | None:
        """Why a command posted now may not be answered soon though the engine counts as ready, a sentence; None: nothing is known."""
        with self._lock:
            silent_s = 0.0 if self._connection is None else time.monotonic() - self._beat_s
        return (
            f"the engine has sent no heartbeat for {silent_s:.0f} s"
            if silent_s > 2 * SILENT_BEATS_S
            else None
        )

    @property
    def stalled_s(self) -> float:
        """How long the engine's step loop has shown no sign of life; 0.0 if it turns. A long step stalls it, honestly."""
        with self._lock:
            if self._connection is None:
                return 0.0
            age_s = time.monotonic() - self._beat_s
            return (
                self._beat.stalled_s + age_s if self._beat.stalled_s > 0.0 or age_s > SILENT_BEATS_S else 0.0
            )

    # -- the thread that starts children and reads

    def _supervise(self) -> None:
        try:
            self._keep_one_alive()
        except (
            Exception
        ) as error:  # our own bug: say so to everybody who waits rather than leave them waiting
            log.exception("the supervisor of the engine process stopped")
            reason = PensieveError(
                f"the supervisor of the engine process stopped on an error of its own: {type(error).__name__}: {error}"
            )
            with self._lock:
                left, self._error, self._process, self._connection = self._process, reason, None, None
            if left is not None:
                with contextlib.suppress(ValueError):  # it has ended
                    left.kill()
            self._enter("failed")
            self._answer_everybody(reason)
        with self._lock:  # a failed engine is closed by and by, too
            self._lock.wait_for(lambda: self._close_by_s is not None)
        if self.state != "closed":
            self._enter("closed")
        self._queue.put(None)
        self._wake.close()

    def _keep_one_alive(self) -> None:
        failures, pause_s = 0, self._backoff_s
        while True:
            end = self._live_and_die()
            failures = failures + 1 if end.ready_s is None else 0
            with self._lock:
                self._failed_starts = failures
            if end.ready_s is not None and end.ready_s >= self._healthy_s:
                pause_s = self._backoff_s
            with self._lock:
                closing = self._close_by_s is not None
                was_ready = self._info is not None  # this one or one before it
                hopeless = not was_ready and (
                    end.reason.code in _USER_ERRORS or failures >= MAX_START_FAILURES
                )
                if not closing:
                    self._error = end.reason
                    if failures > 1:
                        self._error = error_from(
                            end.reason.code,
                            f"the engine failed to start {failures} times in a row: {end.reason.message}",
                        )
                    error = self._error
                going_on = self._restart and not closing and not hopeless
            state: State = "closed" if closing else "restarting" if going_on else "failed"
            if not closing:
                log.error(
                    "the engine process ended: %s%s",
                    error.message,
                    f" (it is started again in {pause_s:g} s)" if going_on else "",
                )
            self._enter(state)
            self._answer_everybody(self._epitaph(end, state))
            if not going_on:
                break
            with self._lock:
                if self._lock.wait_for(lambda: self._close_by_s is not None, pause_s):
                    closing = True
            if closing:
                self._enter("closed")
                break
            pause_s = min(2 * pause_s, self._max_backoff_s)
            with self._lock:
                self._restarts += 1

    def _live_and_die(self) -> _End:
        """One child, from start to end."""
        with self._lock:
            self._progress = "starting a process"
        try:
            child = _Child(self._main, self._arguments, self._environment)
        except Exception as error:
            return _End(
                "no process",
                PensieveError(f"no process could be started: {type(error).__name__}: {error}"),
                None,
            )
        with self._lock:
            self._process = child.process
        broken, ready_at_s = self._read_until_gone(child)
        with self._lock:
            closing = self._close_by_s is not None
            self._process = self._connection = None
        leave_s = _LEAVE_S
        if closing:
            leave_s = (
                0.0 if ready_at_s is None else max(0.0, cast(float, self._close_by_s) - time.monotonic())
            )
        elif broken is None:
            leave_s = 1.0  # it closed its pipe or is dead already, and if neither it must not go on
        code = child.end(leave_s)
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(child.connection.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)  # a blocked write ends, even where the process does not
        with self._sending:
            child.connection.close()
        ready_s = None if ready_at_s is None else time.monotonic() - ready_at_s
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if broken is not None:
            if broken.code == EngineRestarted.code:  # (our own words, which name nothing of this machine)
                how = broken.message.removeprefix("the engine process was killed: ")
            return _End(how, error_from(broken.code, broken.message), ready_s)
        said = " | ".join(line for line in list(child.last_words)[-5:] if line)
        message = f"the engine process died: {_signal_name(how, code)}" + (
            f"; it said: {said}" if said else ""
        )
        return _End(how, PensieveError(message), ready_s)

    def _read_until_gone(self, child: _Child) -> tuple[Broken | None, float | None]:
        """Hand its messages on; returns why it broke, if it said so or had to be killed, and when it was ready, if it was."""
        broken: Broken | None = None
        ready_at_s: float | None = None
        inbox, lived, vitals = Inbox(child.connection), LivedTime(), None
        start_by_s = self._start_timeout_s  # in lived time
        while True:
            with self._lock:
                close_by_s = self._close_by_s
            if close_by_s is not None and ready_at_s is None:  # it loads a model and does not listen
                return None, None
            watched: list[Any] = [child.connection, child.process.sentinel]
            if close_by_s is None:
                watched.append(self._wake)
            heard = wait(
                watched,
                LOOK_S if close_by_s is None else min(LOOK_S, max(0.0, close_by_s - time.monotonic())),
            )
            now_s = lived.now()
            if child.connection in heard:
                try:
                    messages = inbox.take()
                except (EOFError, OSError):
                    return broken, ready_at_s
                except Exception as error:  # not something that a child of this version says
                    child.process.kill()
                    return Broken(
                        PensieveError.code, f"the engine spoke nonsense: {type(error).__name__}: {error}"
                    ), ready_at_s
                if vitals is not None:
                    vitals.heard(now_s)
                for message in messages:
                    match message:
                        case list():
                            with self._lock:
                                self._in_flight.settle(message)
                            self._deliver(message)
                        case Beat():
                            if vitals is not None:
                                vitals.beat(message.stalled_s)
                            with self._lock:
                                self._beat, self._beat_s = message, time.monotonic()
                        case Progress():
                            start_by_s = now_s + self._start_timeout_s
                            with self._lock:
                                self._progress = message.text
                        case EngineInfo():
                            if (changed := self._changed(message)) is not None:
                                child.process.kill()
                                return Broken(ModelRefused.code, changed), None
                            ready_at_s, vitals = time.monotonic(), Vitals(self._patience, now_s)
                            with self._lock:
                                self._info, self._connection = message, child.connection
                                self._beat, self._beat_s = Beat(0.0), ready_at_s
                            self._enter("ready")
                        case Broken():
                            broken = message
            elif child.process.sentinel in heard:
                return broken, ready_at_s
            if close_by_s is not None:
                if time.monotonic() >= close_by_s:
                    child.process.kill()
                    return broken, ready_at_s
            elif vitals is not None:
                if (why := vitals.why_dead(now_s)) is not None:
                    child.process.kill()
                    return Broken(EngineRestarted.code, f"the engine process was killed: {why}"), ready_at_s
            elif now_s >= start_by_s:
                child.process.kill()
                text = f"the engine showed no progress for {self._start_timeout_s:g} s while it was starting ({self.progress})"
                return Broken(EngineNotReady.code, text), ready_at_s

    def _changed(self, info: EngineInfo) -> str | None:
        """Why a restarted engine cannot go on with what the first one's clients were told; None: it can."""
        with self._lock:
            first = self._info
        if first is None:
            return None
        for name in ("num_parameters", "vocab_size", "max_context", "chunk_tokens"):
            if (was := getattr(first, name)) != (now := getattr(info, name)):
                return f"the model is not the one that was served: {name} was {was} and is {now}. Put its files back, or start the server again"
        return None

    def _enter(self, state: State) -> None:
        with self._lock:
            self._state = state
            self._lock.notify_all()
        if self._on_state is not None:
            try:
                self._on_state(state)
            except Exception:
                log.exception("on_state raised")

    def _epitaph(self, end: _End, state: State) -> PensieveError:
        """What a request that was under way is told."""
        if state == "closed":
            return EngineClosed("the engine was closed before this request ended")
        after = "it is started again; ask again" if state == "restarting" else "it is not started again"
        return EngineRestarted(f"the engine process died ({end.how}) while this request ran; {after}")

    def _answer_everybody(self, error: PensieveError) -> None:
        with self._lock:
            events = self._in_flight.take(error)
        self._deliver(events)

    # -- the thread that writes

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            self._forward(*item)

    def _forward(self, posted_s: float, command: Command | Close) -> None:
        """Send one command as soon as there is an engine to send it to."""
        with self._lock:
            while self._connection is None and (error := self._why_not(posted_s)) is None:
                held = self._state == "restarting"
                self._lock.wait(posted_s + self._hold_s - time.monotonic() if held else None)
            if (connection := self._connection) is not None and not isinstance(command, Close):
                self._in_flight.add(
                    command
                )  # in one breath with the look at the connection: who takes it away answers for this one
        if connection is None:
            assert error is not None
            self._refuse(command, error)
            return
        with self._sending:
            try:
                send(connection, command)
            except OSError:
                pass  # the child died: the other thread sees it, and answers
            except Exception as unsendable:  # a bug of ours, and this command's alone
                log.exception("%s cannot be sent", type(command).__name__)
                with self._lock:
                    self._in_flight.discard(command)
                self._refuse(
                    command,
                    PensieveError(f"the command cannot be sent: {type(unsendable).__name__}: {unsendable}"),
                )

    def _why_not(self, posted_s: float) -> PensieveError | None:
        """Why a command should wait no longer for an engine."""
        if self._close_by_s is not None or self._state == "closed":
            return EngineClosed("the engine was closed before this request began")
        if self._state == "failed":
            if self._info is not None:  # (how it died is for those who run it: it may name files)
                return EngineClosed(
                    "there is no engine: it ended and is not started again; the server's log says why"
                )
            assert self._error is not None
            return (
                self._error
                if self._error.code in _USER_ERRORS
                else EngineClosed(f"there is no engine: {self._error.message}")
            )
        if (
            self._state == "restarting" and self._failed_starts and self._info is not None
        ):  # (a first start is waited for)
            return EngineRestarted(
                "the engine died and could not be started again yet; that is tried until it works: ask again later"
            )
        if self._state == "restarting" and time.monotonic() >= posted_s + self._hold_s:
            return EngineRestarted(
                f"the engine died and was not ready again within {self._hold_s:g} s; ask again"
            )
        return None

    # -- both

    def _refuse(self, command: Command | Close, error: PensieveError) -> None:
        refused = _InFlight()
        if not isinstance(command, Close):
            refused.add(command)
        self._deliver(refused.take(error))

    def _deliver(self, events: list[Event]) -> None:
        if not events:
            return
        with self._emitting:
            try:
                self._emit(events)
            except Exception:
                log.exception("emit raised")


def _signal_name(how: str, code: int) -> str:
    try:
        return f"{how} ({signal.Signals(-code).name})" if code < 0 else how
    except ValueError:
        return how


_LIVING: weakref.WeakSet[EngineProcess] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """multiprocessing would wait for the children at exit; they wait for us. (Registered after its own, so run before.)"""
    for process in list(_LIVING):
        process.close(1.0)
