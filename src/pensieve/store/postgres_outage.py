"""Outages: times in which a PostgreSQL server cannot be reached.

Knows when an outage began and whether it has ended; never SQL. While a server is away, each attempt to
connect takes seconds. So only one thread tries, and everything else fails at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

LOOK_S = 1.0  # seconds between two attempts


class Outage(Exception):
    """The server is known to be away.

    Args:
        since_s: when that was first noticed, monotonic seconds.
    """

    def __init__(self, since_s: float) -> None:
        super().__init__(f"the server has been away for {time.monotonic() - since_s:.0f} s")
        self.since_s = since_s


class Outages:
    """Knows whether the server is away.

    Args:
        reach: connects to the server and closes the connection; raises if it cannot.
    """

    def __init__(self, reach: Callable[[], None]) -> None:
        self._reach = reach
        self._lock = threading.Lock()
        self._since_s: float | None = None  # monotonic; None while no outage is known
        self._closed = threading.Event()

    def check(self) -> None:
        """Raise `Outage` while the server is away."""
        since_s = self._since_s
        if since_s is not None:
            raise Outage(since_s)

    def trouble(self) -> str | None:
        """A sentence while the server is away."""
        since_s = self._since_s
        return (
            None
            if since_s is None
            else "the conversation store's database has not been reached for "
            f"{time.monotonic() - since_s:.0f} s"
        )

    def begin(self) -> None:
        """Note that the server could not be reached, and try to connect from now on."""
        with self._lock:
            if self._since_s is not None or self._closed.is_set():
                return
            self._since_s = time.monotonic()
        threading.Thread(target=self._look, name="store-outage", daemon=True).start()

    def close(self) -> None:
        """Stop trying."""
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                self._reach()
            except Exception as error:  # whatever the error is, the server cannot be used
                log.debug("the database cannot be reached: %s", error)
            else:
                self._since_s = None
                return
