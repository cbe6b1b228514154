"""One thread that writes to a database, many jobs a transaction.

Knows links and jobs; never conversations, nor which database it is.

A durable commit costs a flush of the disk, milliseconds, however much it holds. So all jobs that wait when
the writer is free go into one transaction, and their futures resolve together when it is durable.
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
STUCK_S = 10.0  # a write that takes longer is told as trouble


class Cursor(Protocol):
    """What a statement gave."""

    def fetchone(self) -> Any:
        """The next row, or None."""
        ...

    def fetchall(self) -> list[Any]:
        """All rows that are left."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """What a job is given: something that runs SQL with `?` for values."""

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor:
        """Run one statement."""
        ...


Job = Callable[[Connection], T]


class Link(Protocol):
    """A connection in autocommit mode and how its database goes about transactions.

    Used by one thread at a time.
    """

    errors: tuple[type[Exception], ...]  # what the database raises

    @property
    def connection(self) -> Connection:
        """What jobs are given."""
        ...

    @property
    def in_transaction(self) -> bool:
        """Whether one is open. A database may end it by itself, on a full disk for instance."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the connection is gone: then nobody knows what became of a commit that was under way."""
        ...

    def begin(self) -> None:
        """Begin a transaction that no other writer of any process runs beside.

        Connect anew if the connection was lost.
        """
        ...

    def check(self) -> None:
        """Raise one of `errors` if what is written now would not be found afterwards.

        The file has no name any more, for instance.
        """
        ...

    def outcome(self) -> bool | None:
        """What became of the commit under which the connection was lost.

        True = it is durable, False = nothing of it is, None = unknown.
        """
        ...

    def kind(self, error: BaseException) -> Kind:
        """What a failure is: one that may pass (no room, a lock, no connection), a broken database, or a
        mistake of a job.
        """
        ...

    def words(self, error: BaseException) -> str:
        """A failure in words that name no path, host or user: clients are told them."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
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
    be committed, its jobs are tried again one by one, so that only the one at fault fails. If the connection
    was lost, the database is asked what became of the commit: the jobs have succeeded, or are tried once
    more, or it is unknown and they fail saying so.

    Args:
        link: closed by `close`.
        name: what the log calls the database, its path for instance.
    """

    def __init__(self, link: Link, name: str) -> None:
        self._link = link
        self._name = name
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # so that no job is queued behind the end mark
        self._closed = False
        self._trouble: str | None = None  # the last failure of the storage, until a probe succeeds
        self._busy_since_s: float | None = None  # monotonic
        self._thread = threading.Thread(target=self._loop, name="conversation-store", daemon=True)
        self._thread.start()

    def submit(self, job: Job[T], *, alone: bool = False) -> Future[T]:
        """Queue a job; its future has the job's result once that is durable.

        A job may run more than once, each time from the same state, and must touch nothing but the
        connection.

        Args:
            job: is given the connection.
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
        """Run a job and wait for it. From the writer's own thread (a future's callback) it runs at once."""
        if threading.current_thread() is not self._thread:
            return self.submit(job, alone=alone).result()
        future: Future[T] = Future()
        self._run_safely([_Item(job, future, alone)])
        return future.result()

    def trouble(self) -> str | None:
        """Why the next job would fail, in a sentence.

        The storage failed and no `probe` succeeded since, or a write does not end. None = nothing known.
        """
        since_s = self._busy_since_s
        if since_s is not None and (busy_s := time.monotonic() - since_s) > STUCK_S:
            return f"the conversation store has not ended a write for {busy_s:.0f} s"
        return self._trouble

    def probe(self, job: Job[object]) -> None:
        """Run a job that shows whether the storage works: trouble ends with it."""
        self.call(job)
        if self._trouble is not None:
            log.info("the conversation store %s works again", self._name)
        self._trouble = None

    def close(self) -> None:
        """Run what is queued, then close the connection.

        May be called again; not from a future's callback.
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
                # a job that was cancelled while it waited is left out
                self._run_safely([item for item in group if item.future.set_running_or_notify_cancel()])
        self._link.close()

    def _run_safely(self, group: list[_Item]) -> None:
        """Run a group whatever happens: no future may wait for a thread that died."""
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

        `again`: if the connection is lost, and nothing of the group was stored, try it once more.
        """
        if not group:
            return
        try:
            self._link.begin()
        except (
            self._link.errors
        ) as error:  # locked by another process, or no connection: no job is at fault, and waiting was done
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
        """A transaction failed: try its jobs again, or fail them."""
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
        """One job in its savepoint: its result or its failure.

        Raises only if the whole transaction is lost.
        """
        connection = self._link.connection
        connection.execute("SAVEPOINT job")
        try:
            result = job(connection)
        except Exception as error:
            if not self._link.in_transaction:  # a full disk makes SQLite undo everything
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
        """What a job's caller is told of a failure of the storage; the log has the details."""
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
