"""One thread that writes to a SQLite database, many jobs a transaction. Knows connections and jobs; never conversations.

A durable commit costs a flush of the disk, milliseconds, however much it holds. So all jobs that wait when the writer
is free go into one transaction, and their futures resolve together when it is durable.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from pensieve.errors import StoreError

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], T]

MAX_GROUP = 256  # jobs in one transaction


class GroupWriter:
    """Owns the only connection that writes, and the thread that uses it.

    Each job runs in a savepoint: one that raises is undone and fails alone. If the transaction itself cannot be
    committed, its jobs are tried again one by one, so that only the one at fault fails.

    Args:
        connection: in autocommit mode, usable from any thread; closed by `close`.
        name: what messages call the database, its path for instance.
    """

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._connection = connection
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Job[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # so that no job is queued behind the end mark
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="conversation-store", daemon=True)
        self._thread.start()

    def submit(self, job: Job[T]) -> Future[T]:
        """Queue a job; its future has the job's result once that is durable.

        A job may run more than once, each time from the same state, and must touch nothing but the connection.
        """
        future: Future[T] = Future()
        with self._gate:
            if self._closed:
                future.set_exception(StoreError(f"the conversation store {self._name} is closed"))
            else:
                self._queue.put((job, future))
        return future

    def call(self, job: Job[T]) -> T:
        """Run a job and wait for it. From the writer's own thread (a future's callback) it runs at once."""
        if threading.current_thread() is not self._thread:
            return self.submit(job).result()
        future: Future[T] = Future()
        self._run([(job, future)])
        return future.result()

    def close(self) -> None:
        """Run what is queued, then close the connection. May be called again; not from a future's callback."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _loop(self) -> None:
        open_ = True
        while open_:
            items = [self._queue.get()]
            while len(items) < MAX_GROUP and not self._queue.empty():
                items.append(self._queue.get())
            open_ = items[-1] is not None
            group = [item for item in items if item is not None]
            # a job that was cancelled while it waited is left out
            self._run_safely([(job, future) for job, future in group if future.set_running_or_notify_cancel()])
        self._connection.close()

    def _run_safely(self, group: list[tuple[Job[Any], Future[Any]]]) -> None:
        """Run a group whatever happens: nobody must wait for a future of a thread that died."""
        try:
            self._run(group)
        except BaseException as error:  # out of memory, or a job of ours that left the transaction
            failure = self._failure(error)
            for _, future in group:
                if not future.done():
                    future.set_exception(failure)
            self._roll_back()

    def _run(self, group: list[tuple[Job[Any], Future[Any]]]) -> None:
        """Run a group in one transaction and resolve its futures; if that fails, in one transaction each."""
        if not group:
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:  # locked by another process: nobody's fault here, and waiting was done
            for _, future in group:
                future.set_exception(self._failure(error))
            return
        try:
            outcomes = [self._run_one(job) for job, _ in group]
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            if len(group) == 1:
                group[0][1].set_exception(self._failure(error))
            else:
                for item in group:
                    self._run([item])
            return
        for (_, future), (result, failure) in zip(group, outcomes, strict=True):
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _run_one(self, job: Job[Any]) -> tuple[Any, Exception | None]:
        """One job in its savepoint: its result or its failure. Raises only if the whole transaction is lost."""
        self._connection.execute("SAVEPOINT job")
        try:
            result = job(self._connection)
        except Exception as error:
            if not self._connection.in_transaction:  # a full disk makes SQLite undo everything
                raise sqlite3.OperationalError(str(error)) from error
            self._connection.execute("ROLLBACK TO job")
            self._connection.execute("RELEASE job")
            return None, self._failure(error) if isinstance(error, sqlite3.Error) else error
        self._connection.execute("RELEASE job")
        return result, None

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _failure(self, error: BaseException) -> StoreError:
        failure = StoreError(f"the conversation store {self._name} failed: {error}; take what was being written as not stored")
        failure.__cause__ = error
        return failure
