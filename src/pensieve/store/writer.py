"""One thread that writes to a database, many jobs in a transaction.

Knows links and jobs; never conversations, nor which database it is.

A durable commit costs a flush of the disk, milliseconds, whatever its size. So all jobs that wait when the
writer is free go into one transaction, and their futures resolve together when it is durable.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pensieve.errors import StoreError, StoreUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
Kind = Literal["passing", "broken", "mistake"]

MAX_GROUP = 256  # jobs in one transaction
STUCK_S = 10.0  # seconds; a longer write is reported as trouble


class Cursor(Protocol):
    """The result of a statement."""

    def fetchone(self) -> Any:
        """The next row, or None."""
        ...

    def fetchall(self) -> list[Any]:
        """All rows that are left."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """Runs SQL with `?` for values."""

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor:
        """Run one statement."""
        ...


Job = Callable[[Connection], T]


class Link(Protocol):
    """A connection in autocommit mode, with its database's transactions. For one thread at a time."""

    errors: tuple[type[Exception], ...]  # the exceptions that the database raises

    @property
    def connection(self) -> Connection:
        """The connection, for jobs."""
        ...

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open. A database may end it by itself, for instance on a full disk."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the connection is lost: the outcome of a commit under way is unknown then."""
        ...

    def begin(self) -> None:
        """Begin a transaction that no other writer of any process runs beside.

        Reconnects if the connection was lost.
        """
        ...

    def check(self) -> None:
        """Raise one of `errors` if what is written now would be lost, as in a deleted file."""
        ...

    def outcome(self) -> bool | None:
        """The outcome of the commit under which the connection was lost.

        True if it is durable, False if nothing of it is stored, None if that is unknown.
        """
        ...

    def kind(self, error: BaseException) -> Kind:
        """The kind of a failure: may pass (no space, a lock, no connection), a broken database, or a job's
        mistake.
        """
        ...

    def words(self, error: BaseException) -> str:
        """A failure in words for clients, without path, host or user."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class TransactionLost(Exception):
    """The database ended the transaction under a job."""


def failed(error: Exception) -> Future[Any]:
    """A future that has failed already."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


@dataclass(frozen=True, slots=True)
class _Item:
    job: Job[Any]
    future: Future[Any]
    alone: bool  # outside any transaction


class GroupWriter:
    """Owns the only connection that writes, and the thread that uses it.

    Each job runs in a savepoint: one that raises is undone and fails alone. If the transaction itself cannot
    be committed, its jobs are tried again one by one, so that only the faulty one fails. If the connection
    was lost, the database is asked for the commit's outcome: the jobs have succeeded, or are tried once more,
    or the outcome is unknown and they fail saying so.

    Args:
        link: closed by `close`.
        name: the database's name in the log, such as its path.
    """

    def __init__(self, link: Link, name: str) -> None:
        self._link = link
        self._name = name
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # no job may be queued behind the end mark
        self._closed = False
        # the last failure of the storage, until a probe succeeds; None if there is none
        self._trouble: str | None = None
        self._busy_since_s: float | None = None  # monotonic; None while the thread is idle
        self._thread = threading.Thread(target=self._loop, name="conversation-store", daemon=True)
        self._thread.start()

    def submit(self, job: Job[T], *, alone: bool = False) -> Future[T]:
        """Queue a job; its future has the job's result once that is durable.

        A job may run more than once, each time from the same state, and must touch nothing but the
        connection.

        Args:
            job: takes the connection.
            alone: run it outside any transaction, once.
        """
        future: Future[T] = Future()
        with self._gate:
            if self._closed:
                future.set_exception(StoreUnavailable("the conversation store is closed"))
            else:
                self._queue.put(_Item(job, future, alone))
        return future

    def call(self, job: Job[T], *, alone: bool = False) -> T:
        """Run a job and wait for it. On the writer's own thread (in a future's callback) it runs at once."""
        if threading.current_thread() is not self._thread:
            return self.submit(job, alone=alone).result()
        future: Future[T] = Future()
        self._run_safely([_Item(job, future, alone)])
        return future.result()

    def trouble(self) -> str | None:
        """Why the next job would fail, in a sentence; None if no trouble is known.

        There is trouble if the storage failed and no `probe` has succeeded since, or if a write does not end.
        """
        since_s = self._busy_since_s
        if since_s is not None and (busy_s := time.monotonic() - since_s) > STUCK_S:
            return f"the conversation store has not ended a write for {busy_s:.0f} s"
        return self._trouble

    def probe(self, job: Job[object]) -> None:
        """Run a job that finds out whether the storage works; if it succeeds, the trouble is over."""
        self.call(job)
        if self._trouble is not None:
            log.info("the conversation store %s works again", self._name)
        self._trouble = None

    def close(self) -> None:
        """Run what is queued, then close the connection.

        May be called again, but not from a future's callback.
        """
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
            for group in _groups(item for item in items if item is not None):
                # without jobs that were cancelled while they waited
                self._run_safely([item for item in group if item.future.set_running_or_notify_cancel()])
        self._link.close()

    def _run_safely(self, group: list[_Item]) -> None:
        """Run a group and resolve its futures whatever happens: the thread must not die."""
        self._busy_since_s = time.monotonic()
        try:
            if group and group[0].alone:
                self._run_alone(group[0])
            else:
                self._run(group)
        except BaseException as error:  # out of memory, or a job of ours that left the transaction
            failure = self._failure(error)
            for item in group:
                if not item.future.done():
                    item.future.set_exception(failure)
            self._roll_back()
        finally:
            self._busy_since_s = None

    def _run_alone(self, item: _Item) -> None:
        try:
            self._link.check()
            item.future.set_result(item.job(self._link.connection))
        except self._link.errors as error:
            item.future.set_exception(self._failure(error))

    def _run(self, group: list[_Item], again: bool = True) -> None:
        """Run a group in one transaction and resolve its futures; if that fails, in one transaction each.

        `again`: try once more if the connection is lost and nothing of the group was stored.
        """
        if not group:
            return
        try:
            self._link.begin()
        except (
            self._link.errors
            # locked by another process, or no connection: no job is at fault, and we have waited already
        ) as error:
            self._roll_back()
            self._fail(group, error)
            return
        failures: tuple[type[Exception], ...] = (*self._link.errors, TransactionLost)
        committing = False
        try:
            outcomes = [self._run_one(item.job) for item in group]
            committing = True
            self._link.connection.execute("COMMIT")
            self._link.check()
        except failures as error:
            lost = self._link.lost
            self._roll_back()
            stored = self._link.outcome() if lost and committing else False
            if not stored:
                self._after_failure(group, error, lost, unknown=stored is None, again=again)
                return
        for item, (result, failure) in zip(group, outcomes, strict=True):
            if failure is None:
                item.future.set_result(result)
            else:
                item.future.set_exception(failure)

    def _after_failure(
        self, group: list[_Item], error: Exception, lost: bool, *, unknown: bool, again: bool
    ) -> None:
        """Try a failed transaction's jobs again, or fail them."""
        if lost and again and not unknown:
            self._run(group, again=False)
        elif lost or len(group) == 1:
            self._fail(group, error, unknown)
        else:
            for item in group:
                self._run([item])

    def _fail(self, group: list[_Item], error: Exception, unknown: bool = False) -> None:
        for item in group:
            item.future.set_exception(self._failure(error, unknown))

    def _run_one(self, job: Job[Any]) -> tuple[Any, Exception | None]:
        """Run one job in its savepoint; returns its result or its failure.

        Raises only if the whole transaction is lost.
        """
        connection = self._link.connection
        connection.execute("SAVEPOINT job")
        try:
            result = job(connection)
        except Exception as error:
            if not self._link.in_transaction:  # a full disk makes SQLite undo the whole transaction
                raise TransactionLost(str(error)) from error
            connection.execute("ROLLBACK TO job")
            connection.execute("RELEASE job")
            return None, self._failure(error) if isinstance(error, self._link.errors) else error
        connection.execute("RELEASE job")
        return result, None

    def _roll_back(self) -> None:
        if self._link.in_transaction:
            self._link.connection.execute("ROLLBACK")

    def _failure(self, error: BaseException, unknown: bool = False) -> StoreError:
        """The error for a job's caller after a failure of the storage; the log has the details."""
        if isinstance(error, TransactionLost) and error.__cause__ is not None:
            error = error.__cause__
        outcome = (
            "the connection was lost, so what was being written may be stored or not"
            if unknown
            else "take what was being written as not stored"
        )
        told = self._link.words(error)
        kind = self._link.kind(error)
        if self._trouble is None or kind == "mistake":
            log.error(
                "the conversation store %s failed: %s", self._name, str(error).strip() or type(error).__name__
            )
        if kind != "mistake":
            self._trouble = f"the conversation store failed: {told}"
        failure = (StoreUnavailable if kind == "passing" else StoreError)(
            f"the conversation store failed: {told}; {outcome}"
        )
        failure.__cause__ = error
        return failure


def _groups(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Neighbours that may share a transaction."""
    group: list[_Item] = []
    for item in items:
        if item.alone and group:
            yield group
            group = []
        group.append(item)
        if item.alone:
            yield group
            group = []
    if group:
        yield group
