"""Ends operations on PostgreSQL connections in time, whatever the server does.

Knows sockets and clocks; never SQL.

A server that is stopped, or whose machine is frozen, keeps its connections: it neither answers nor breaks
them, and its own timeouts do not run. So our end is closed under an operation that takes too long, and the
operation fails as on any lost connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator


class Deadlines:
    """Watches operations, each on a socket of its own, from one thread that sleeps until the next is due."""

    def __init__(self) -> None:
        # by operation: when it is due (monotonic), and its socket
        self._due: dict[int, tuple[float, int]] = {}
        self._next = 0
        self._wakes_s: float | None = None  # when the thread wakes up; None while it waits to be notified
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextlib.contextmanager
    def within(self, seconds: float, fileno: int) -> Iterator[None]:
        """Run a block; the socket is shut down if it takes longer."""
        with self._changed:
            number, self._next = self._next, self._next + 1
            due_s = time.monotonic() + seconds
            self._due[number] = (due_s, fileno)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._watch, name="store-deadlines", daemon=True)
                self._thread.start()
            elif self._wakes_s is None or due_s < self._wakes_s:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:  # from here on the socket's number may belong to another
                self._due.pop(number, None)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                now_s = time.monotonic()
                for number, (due_s, fileno) in list(self._due.items()):
                    if due_s <= now_s:
                        del self._due[number]
                        _shut_down(fileno)
                self._wakes_s = min((due_s for due_s, _ in self._due.values()), default=None)
                self._changed.wait(None if self._wakes_s is None else max(0.0, self._wakes_s - now_s))


def _shut_down(fileno: int) -> None:
    with contextlib.suppress(OSError):  # the connection broke by itself
        copy = socket.socket(fileno=os.dup(fileno))
        try:
            copy.shutdown(socket.SHUT_RDWR)
        finally:
            copy.close()
