"""The engine's side of the pipe: a child process that serves one engine until its parent is done.

Knows a pipe, plain messages and that an engine has `post` and `close`; never models, text or clients.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import pickle
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

from pensieve.engine.messages import Command, Event, Failed, GetStats, Stats, Token
from pensieve.engine.vitals import LivedTime
from pensieve.engine.wire import Beat, Broken, Close, EngineInfo, StartProgress, receive, send
from pensieve.errors import EngineClosed, PensieveError

log = logging.getLogger(__name__)

BEAT_S = 1.0  # between two heartbeats
ORPHAN_GRACE_S = 1.5  # how long a child whose parent is gone may take to close its engine
_PING = "\0heartbeat"  # tag of the heartbeat's own question; no caller's tag begins so
_AT_ONCE_BYTES = select.PIPE_BUF - 4  # fits a pipe that polls as ready; 4 bytes hold the length
_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


class ServedEngine(Protocol):
    """A started `Engine`, or another engine with its methods."""

    def post(self, command: Command) -> None:
        """Hand a command in; returns at once."""
        ...

    def close(self) -> None:
        """End after the current step; requests that are left get a `Failed`."""
        ...


Emit = Callable[[list[Event]], None]
Say = Callable[[str], None]


def serve_engine(
    connection: Connection, build: Callable[[Emit, Say], tuple[ServedEngine, EngineInfo]]
) -> None:
    """Build an engine and serve it until the parent closes it, or is gone.

    Args:
        connection: the pipe to the parent.
        build: makes a started engine from two functions: one takes its events, one the progress of the start.
            The parent's `ready()` raises the errors that it raises.
    """
    outbox = Outbox(connection)
    pulse = _Pulse(outbox)
    try:
        engine, info = build(pulse.emit, lambda text: outbox.put(StartProgress(text)))
        outbox.put(info)
        pulse.start(engine.post)
        while True:
            try:
                message = receive(connection)
            except (EOFError, OSError):  # the parent is gone: the result of a long step would be lost
                threading.Thread(target=_exit_after, args=(ORPHAN_GRACE_S,), daemon=True).start()
                break
            if isinstance(message, Close):
                break
            engine.post(message)
        pulse.stop()
        engine.close()
    finally:
        outbox.close()


class Outbox:
    """Sends into the pipe: at once if it has room, else on a thread, so that no step waits for the parent.

    At once is better: waking a thread takes the interpreter from the next step for longer than sending does.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLOUT)
        self._lock = threading.Lock()  # for `_num_left`, and held while something is sent at once
        self._num_left = 0  # messages left to the thread and not sent yet: later messages go behind them
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pensieve-outbox", daemon=True)
        self._thread.start()

    def put(self, message: object) -> None:
        """Send a message after those put before; returns soon."""
        with self._lock:
            if not self._num_left and self._sent_at_once(message):
                return
            self._num_left += 1
            self._queue.put(message)

    def close(self) -> None:
        """Send the messages that are left, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _sent_at_once(self, message: object) -> bool:
        if not self._poll.poll(0):
            return False
        data = pickle.dumps(message, protocol=5)
        if len(data) > _AT_ONCE_BYTES:
            return False
        with contextlib.suppress(OSError):  # the parent is gone: the message is dropped
            self._connection.send_bytes(data)
        return True

    def _run(self) -> None:
        message = self._queue.get()
        while message is not None:
            following: object = _NOTHING
            num_sent = 1
            # The parent is behind: let it catch up in fewer messages.
            while isinstance(message, list) and not self._queue.empty():
                following = self._queue.get()
                if not isinstance(following, list):
                    break
                message, following, num_sent = [*message, *following], _NOTHING, num_sent + 1
            try:
                send(self._connection, message)
            except OSError:
                return  # the parent is gone
            with self._lock:
                self._num_left -= num_sent
            message = self._queue.get() if following is _NOTHING else following


_NOTHING = object()


class _Pulse:
    """Passes an engine's events on, and asks its loop for `Stats` once a second, as a sign of life.

    A loop that answers but makes no step while there are requests counts as stalled, too.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._stopped = threading.Event()
        self._asked = False  # a sign of life has been asked for and has not come
        self._told: Stats | None = None  # the last sign of life
        self._thread: threading.Thread | None = None

    def start(self, post: Callable[[Command], None]) -> None:
        self._thread = threading.Thread(
            target=self._beat, args=(post,), name="pensieve-heartbeat", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def emit(self, events: list[Event]) -> None:
        """The engine's `emit`."""
        others: list[Event] = []
        for event in events:
            if isinstance(event, Token):  # nearly every event
                others.append(event)
            elif isinstance(event, Stats) and event.tag == _PING:
                self._told, self._asked = event, False
            elif isinstance(event, Failed) and event.code == EngineClosed.code and not self._stopped.is_set():
                self._give_up(event.message)
            else:
                others.append(event)
        if others:
            self._outbox.put(others)

    def _beat(self, post: Callable[[Command], None]) -> None:
        # A process that was stopped and continues must not take the pause for a long step.
        lived = LivedTime(2 * BEAT_S)
        moved_s, num_steps = 0.0, 0  # when the loop was last seen to turn, and its steps by then
        while not self._stopped.wait(BEAT_S):
            now_s, told = lived.now(), self._told
            if not self._asked:
                if told is None or told.steps != num_steps or not told.waiting + told.running:
                    moved_s, num_steps = now_s, 0 if told is None else told.steps
                self._asked = True
                post(GetStats(_PING))
            self._outbox.put(Beat(now_s - moved_s))

    def _give_up(self, message: str) -> None:
        """The engine stopped on a bug of its own: exit, so that the parent starts a new process."""
        self._outbox.put(Broken(EngineClosed.code, message))
        self._outbox.close()
        os._exit(1)


def run_child(
    main: Callable[..., None],
    connection: Connection,
    stderr: Connection,
    parent_pid: int,
    log_level: int,
    environment: Mapping[str, str],
    arguments: tuple[Any, ...],
) -> None:
    """The child process's first function: set it up, run `main(connection, *arguments)`, report errors."""
    _settle_in(stderr, parent_pid, log_level, environment)
    try:
        main(connection, *arguments)
    except Exception as error:
        if isinstance(error, PensieveError):
            broken = Broken(error.code, error.message)
        else:
            log.exception("the engine process ends")
            broken = Broken(PensieveError.code, f"{type(error).__name__}: {error}")
        try:
            send(connection, broken)
        except OSError:
            log.error("the parent is gone and cannot be told: %s", broken.message)
        sys.exit(1)
    sys.stderr.flush()
    # Everything is closed and sent: unloading a deep-learning library would only keep the parent waiting.
    os._exit(0)


def _settle_in(stderr: Connection, parent_pid: int, log_level: int, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)  # before anything that reads it when it is loaded, OpenMP for one
    # Ctrl-C and service managers signal the whole group; the parent decides whether and for how long to
    # drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)  # it died before it could be watched
    os.dup2(stderr.fileno(), 1)  # standard output is the parent's to speak on
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    faulthandler.enable()
    logging.basicConfig(level=log_level, format="%(levelname)s %(name)s: %(message)s")


def _exit_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(1)
