"""A thread that runs jobs one after another. Knows a queue; never what the jobs do."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

Job = Callable[[], None]


class ServiceThread:
    """One thread and its queue. Jobs never run at the same time, so what only they touch needs no lock."""

    def __init__(self, name: str, on_end: Job) -> None:
        """`on_end` runs on the thread, after the last job."""
        self._on_end = on_end
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # no job may be queued behind the end mark
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job) -> bool:
        """Queue a job, from any thread. False if the thread is closed."""
        with self._lock:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    def close(self) -> None:
        """Run the jobs that are queued, then `on_end`, and wait for both."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # a failed job must not end the thread
                log.exception("a job of the conversation service raised")
        self._on_end()
