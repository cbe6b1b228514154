"""An engine in a process of its own, restarted when it dies, stands still or hangs.

Every command is answered.

Knows processes, pipes and plain messages; never torch, text or HTTP. A front end posts commands to it as it
would to an `Engine` and gets the same events. Why a process: another thread that is busy 20 % of the time
slows a step of many small operations by a third.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import MappingProxyType
from typing import Any, Literal

from pensieve.engine.child_process import ChildProcess, End, Unanswered, Watch, changed_model
from pensieve.engine.messages import Command, Event
from pensieve.engine.vitals import Patience
from pensieve.engine.wire import Beat, Broken, Close, EngineInfo, StartProgress, send
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

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "restarting", "failed", "closed"]

# OpenMP's own waiting is left as it is: no setting was shown to help. SmolLM2-135M in bf16, 8 requests
# decoding on 2 cores, the parent busy 20 % of the time, other work on the machine; medians (third quartiles)
# of 22 interleaved runs, tokens/s: default 145 (182), OMP_WAIT_POLICY=PASSIVE 141 (171),
# GOMP_SPINCOUNT=100000 128 (155), 10000 130 (165). Runs of one setting differ by more than the settings do.
# oneDNN keeps a compiled primitive of 0.2 to 2 MB for each shape it meets, by default 1,024 of them. Products
# are called with few row counts (`worker/products.py`) and need some 300; attention by torch's operations
# meets a shape a context length.
DEFAULT_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")}
)
MAX_START_FAILURES = 5  # in a row, of an engine that was never ready
SILENT_BEATS_S = 2.5  # a heartbeat later than this means that the whole process stands still
# Errors of a first start that a second start would repeat. Once a model was served here, such an error may
# pass.
_USER_ERRORS = frozenset(kind.code for kind in (ConfigError, InvalidRequest, ModelRefused, ModelUnavailable))
_LEAVE_S = 5.0  # a child that closed its pipe may take so long to exit


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
            main: a function at the top of its module, called in the child as `main(connection, *arguments)`;
                it ends in `serve_engine`.
            arguments: picklable.
            emit: gets the engine's events, and an error for every command that a dead engine left unanswered.
                One call at a time, on threads of this object (after `close`, the caller's). It must return
                soon: the pipe waits.
            on_state: told of each new state, on the thread that starts children, after `restarts` and
                `last_error` are up to date.
            restart: whether a child that died is replaced. Once one was ready, starts are retried until
                `close`.
            start_timeout_s: a starting child that shows no progress for so long is killed.
            patience: when a ready child is taken for dead, and killed.
            hold_s: how long a command waits for an engine that is being restarted, if the last restart did
                not fail. During the first start commands wait without limit.
            backoff_s: pause before a restart; doubled each time, up to `max_backoff_s`.
            max_backoff_s: longest pause.
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
        self._process: SpawnProcess | None = None  # of the current child
        self._connection: Connection | None = None  # of a child that is ready
        self._unanswered = Unanswered()
        self._error: PensieveError | None = None  # of the last child that died
        self._failed_starts = 0  # in a row
        self._restarts = 0
        self._progress = ""
        self._beat = Beat(0.0)
        self._beat_s = 0.0  # when it came
        self._close_by_s: float | None = None  # None unless closing

        self._emitting = threading.Lock()  # held while `emit` runs
        self._sending = threading.Lock()  # held while a connection is written to: it must not be closed then
        # (when it was posted, what)
        self._queue: queue.SimpleQueue[tuple[float, Command | Close] | None] = queue.SimpleQueue()
        self._wake, self._waker = multiprocessing.get_context("spawn").Pipe(duplex=False)
        # The thread that starts children lives as long as they do: Linux ties a child to the thread that made
        # it.
        self._supervisor = threading.Thread(
            target=self._supervise, name="pensieve-engine-process", daemon=True
        )
        self._writer = threading.Thread(target=self._write, name="pensieve-engine-writer", daemon=True)
        self._supervisor.start()
        self._writer.start()
        _LIVING.add(self)

    # -- from any thread

    def post(self, command: Command) -> None:
        """Hand a command in; returns at once. An event answers it, whatever happens to the engine."""
        with self._lock:
            if self._state != "closed":
                self._queue.put((time.monotonic(), command))
                return
        self._refuse(command, EngineClosed("the engine is closed"))

    def ready(self, timeout: float | None = None) -> EngineInfo:
        """Wait until the engine is ready.

        Raises:
            EngineNotReady: it is not after `timeout` seconds.
            PensieveError: the error with which its start ended.
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
        """Start later children with other arguments, which spare them what the first one had to find out."""
        self._arguments = arguments

    def close(self, timeout: float = 30.0) -> None:
        """End the child after the current step; kill it if that takes longer than `timeout` seconds.

        May be called again.
        """
        with self._lock:
            if self._close_by_s is None:
                self._close_by_s = time.monotonic() + timeout
                self._queue.put((time.monotonic(), Close()))
                self._waker.send_bytes(b"close")
            self._lock.notify_all()
        if threading.current_thread() in (self._supervisor, self._writer):
            return  # called from `emit` or `on_state`: these threads end by themselves
        self._supervisor.join(timeout + _LEAVE_S)
        with self._lock:
            stuck = self._process
        if self._supervisor.is_alive() and stuck is not None:  # in the middle of a message that does not end
            with contextlib.suppress(ValueError):  # it ended after all
                stuck.kill()
        self._supervisor.join()
        self._writer.join()
        _LIVING.discard(self)

    @property
    def state(self) -> State:
        """The engine's state: "restarting" follows a death, "failed" means given up."""
        with self._lock:
            return self._state

    @property
    def info(self) -> EngineInfo | None:
        """About the engine that is ready, or was last; None before the first was."""
        with self._lock:
            return self._info

    @property
    def restarts(self) -> int:
        """Number of restarts."""
        with self._lock:
            return self._restarts

    @property
    def last_error(self) -> str | None:
        """How the last child died: exit code or signal, and its last words. None if none died."""
        with self._lock:
            return None if self._error is None else self._error.message

    @property
    def progress(self) -> str:
        """What a starting child is doing, for people."""
        with self._lock:
            return self._progress

    def trouble(self) -> str | None:
        """Why a command may wait though the engine counts as ready, as a sentence; None if all is well."""
        with self._lock:
            silent_s = 0.0 if self._connection is None else time.monotonic() - self._beat_s
        if silent_s <= 2 * SILENT_BEATS_S:
            return None
        return f"the engine has sent no heartbeat for {silent_s:.0f} s"

    @property
    def stalled_s(self) -> float:
        """How long the step loop has not turned, also during one long step; 0.0 if it turns."""
        with self._lock:
            if self._connection is None:
                return 0.0
            age_s = time.monotonic() - self._beat_s
            stalls = self._beat.stalled_s > 0.0 or age_s > SILENT_BEATS_S
            return self._beat.stalled_s + age_s if stalls else 0.0

    # -- the thread that starts children and reads

    def _supervise(self) -> None:
        try:
            self._keep_one_alive()
        except Exception as error:  # our own bug: answer every client rather than leave it waiting
            log.exception("the supervisor of the engine process stopped")
            reason = PensieveError(
                "the supervisor of the engine process stopped on an error of its own: "
                f"{type(error).__name__}: {error}"
            )
            with self._lock:
                left, self._error, self._process, self._connection = self._process, reason, None, None
            if left is not None:
                with contextlib.suppress(ValueError):  # it has ended
                    left.kill()
            self._enter("failed")
            self._fail_unanswered(reason)
        with self._lock:  # a failed engine waits for `close`, too
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
            if end.ready_s is not None and end.ready_s >= self._healthy_s:
                pause_s = self._backoff_s
            state = self._state_after(end, failures)
            if state != "closed":
                again = f" (it is started again in {pause_s:g} s)" if state == "restarting" else ""
                log.error("the engine process ended: %s%s", self.last_error, again)
            self._enter(state)
            self._fail_unanswered(_epitaph(end, state))
            if state != "restarting":
                break
            with self._lock:
                closing = self._lock.wait_for(lambda: self._close_by_s is not None, pause_s)
            if closing:
                self._enter("closed")
                break
            pause_s = min(2 * pause_s, self._max_backoff_s)
            with self._lock:
                self._restarts += 1

    def _state_after(self, end: End, failures: int) -> State:
        """Note how a child ended, after so many failed starts in a row. Returns the state that follows."""
        with self._lock:
            self._failed_starts = failures
            if self._close_by_s is not None:
                return "closed"
            self._error = end.reason
            if failures > 1:
                text = f"the engine failed to start {failures} times in a row: {end.reason.message}"
                self._error = error_from(end.reason.code, text)
            was_ready = self._info is not None  # this child or one before it
            hopeless = not was_ready and (end.reason.code in _USER_ERRORS or failures >= MAX_START_FAILURES)
            return "restarting" if self._restart and not hopeless else "failed"

    def _live_and_die(self) -> End:
        """One child, from start to end."""
        with self._lock:
            self._progress = "starting a process"
        try:
            child = ChildProcess(self._main, self._arguments, self._environment)
        except Exception as error:
            text = f"no process could be started: {type(error).__name__}: {error}"
            return End("no process", PensieveError(text), None)
        with self._lock:
            self._process = child.process
        broken, ready_at_s = self._read_until_gone(child)
        with self._lock:
            close_by_s = self._close_by_s
            self._process = self._connection = None
        if close_by_s is not None:
            leave_s = 0.0 if ready_at_s is None else max(0.0, close_by_s - time.monotonic())
        else:  # without a word it closed its pipe or is dead already, and if neither it must not go on
            leave_s = 1.0 if broken is None else _LEAVE_S
        code = child.end(leave_s)
        child.unblock_writers()
        with self._sending:
            child.connection.close()
        return child.describe_end(code, broken, None if ready_at_s is None else time.monotonic() - ready_at_s)

    def _read_until_gone(self, child: ChildProcess) -> tuple[Broken | None, float | None]:
        """Pass a child's messages on until it is gone.

        Returns why it broke (None if it did not say so and was not killed), and when it became ready (None:
        never).
        """
        broken: Broken | None = None
        ready_at_s: float | None = None
        watch = Watch(child, self._start_timeout_s, self._patience)
        while True:
            with self._lock:
                close_by_s, first = self._close_by_s, self._info
            if close_by_s is not None and ready_at_s is None:  # it loads a model and does not listen
                return None, None
            messages = watch.hear(self._wake if close_by_s is None else None, close_by_s)
            if messages is None:
                return broken, ready_at_s
            for message in messages:
                match message:
                    case Broken():
                        broken = message
                    case EngineInfo():
                        if (changed := changed_model(first, message)) is not None:
                            child.process.kill()
                            return Broken(ModelRefused.code, changed), None
                        watch.is_ready()
                        ready_at_s = time.monotonic()
                        self._become_ready(message, child, ready_at_s)
                    case _:
                        self._take(message)
            if close_by_s is not None:
                if time.monotonic() >= close_by_s:
                    child.process.kill()
                    return broken, ready_at_s
            elif (verdict := watch.verdict()) is not None:
                child.process.kill()
                return verdict, ready_at_s

    def _take(self, message: object) -> None:
        match message:
            case list():
                with self._lock:
                    self._unanswered.settle(message)
                self._deliver(message)
            case Beat():
                with self._lock:
                    self._beat, self._beat_s = message, time.monotonic()
            case StartProgress():
                with self._lock:
                    self._progress = message.text

    def _become_ready(self, info: EngineInfo, child: ChildProcess, now_s: float) -> None:
        with self._lock:
            self._info, self._connection = info, child.connection
            self._beat, self._beat_s = Beat(0.0), now_s
        self._enter("ready")

    def _enter(self, state: State) -> None:
        with self._lock:
            self._state = state
            self._lock.notify_all()
        if self._on_state is not None:
            try:
                self._on_state(state)
            except Exception:
                log.exception("on_state raised")

    def _fail_unanswered(self, error: PensieveError) -> None:
        with self._lock:
            events = self._unanswered.fail(error)
        self._deliver(events)

    # -- the thread that writes

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            self._forward(*item)

    def _forward(self, posted_s: float, command: Command | Close) -> None:
        """Send one command as soon as there is an engine to send it to."""
        with self._lock:
            while self._connection is None and (error := self._refusal(posted_s)) is None:
                held = self._state == "restarting"
                self._lock.wait(posted_s + self._hold_s - time.monotonic() if held else None)
            if (connection := self._connection) is not None and not isinstance(command, Close):
                # Under the same lock as the look at the connection: if it goes, the supervisor answers this
                # command.
                self._unanswered.add(command)
        if connection is None:
            assert error is not None
            self._refuse(command, error)
            return
        with self._sending:
            try:
                send(connection, command)
            except OSError:
                pass  # the child died: the supervisor sees it and answers
            except Exception as unsendable:  # a bug of ours, and this command's alone
                log.exception("%s cannot be sent", type(command).__name__)
                with self._lock:
                    self._unanswered.discard(command)
                text = f"the command cannot be sent: {type(unsendable).__name__}: {unsendable}"
                self._refuse(command, PensieveError(text))

    def _refusal(self, posted_s: float) -> PensieveError | None:
        """Why a command that was posted at `posted_s` should wait no longer; None if it should."""
        if self._close_by_s is not None or self._state == "closed":
            return EngineClosed("the engine was closed before this request began")
        if self._state == "failed":
            if self._info is not None:  # (how it died is for operators: it may name files)
                return EngineClosed(
                    "there is no engine: it ended and is not started again; the server's log says why"
                )
            assert self._error is not None
            if self._error.code in _USER_ERRORS:
                return self._error
            return EngineClosed(f"there is no engine: {self._error.message}")
        if self._state != "restarting":
            return None
        if self._failed_starts and self._info is not None:  # (commands wait for a first start)
            return EngineRestarted(
                "the engine died and could not be started again yet; that is tried until it works: "
                "ask again later"
            )
        if time.monotonic() >= posted_s + self._hold_s:
            return EngineRestarted(
                f"the engine died and was not ready again within {self._hold_s:g} s; ask again"
            )
        return None

    # -- both

    def _refuse(self, command: Command | Close, error: PensieveError) -> None:
        refused = Unanswered()
        if not isinstance(command, Close):
            refused.add(command)
        self._deliver(refused.fail(error))

    def _deliver(self, events: list[Event]) -> None:
        if not events:
            return
        with self._emitting:
            try:
                self._emit(events)
            except Exception:
                log.exception("emit raised")


def _epitaph(end: End, state: State) -> PensieveError:
    """What a request is told that was running when its engine died."""
    if state == "closed":
        return EngineClosed("the engine was closed before this request ended")
    after = "it is started again; ask again" if state == "restarting" else "it is not started again"
    return EngineRestarted(f"the engine process died ({end.how}) while this request ran; {after}")


_LIVING: weakref.WeakSet[EngineProcess] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Runs before multiprocessing's own exit handler, which would wait for children that wait for us."""
    for process in list(_LIVING):
        process.close(1.0)
