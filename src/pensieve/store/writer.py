"""One thread that writes to a database, many jobs a transaction. Knows links and jobs; never conversations, nor which database it is.

A durable commit costs a flush of the disk, milliseconds, however much it holds. So all jobs that wait when the writer
is free go into one transaction, and their futures resolve together when it is durable.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pensieve.errors import StoreError

T = TypeVar("T")

MAX_GROUP = 256  # jobs in one transaction


class Rows(Protocol):
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

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Rows:
        """Run one statement."""
        ...


C = TypeVar("C", bound=Connection)
C_co = TypeVar("C_co", bound=Connection, covariant=True)
Job = Callable[[C], T]


class Link(Protocol[C_co]):
    """A connection in autocommit mode and how its database goes about transactions. Used by one thread at a time."""

    errors: tuple[type[Exception], ...]  # what the database raises

    @property
    def connection(self) -> C_co:
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
        """Begin a transaction that no other writer of any process runs beside; connect anew if the connection was lost."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


class _TransactionLost(Exception):
    """The database ended the transaction under a job."""


@dataclass(frozen=True, slots=True)
class _Item:
    job: Job[Any, Any]
    future: Future[Any]
    alone: bool  # outside any transaction


class GroupWriter(Generic[C]):
    """Owns the only connection that writes, and the thread that uses it.

    Each job runs in a savepoint: one that raises is undone and fails alone. If the transaction itself cannot be
    committed, its jobs are tried again one by one, so that only the one at fault fails; unless the connection was lost, for
    then they may be stored after all.

    Args:
        link: closed by `close`.
        name: what messages call the database, its path for instance.
    """

    def __init__(self, link: Link[C], name: str) -> None:
        self._link = link
        self._name = name
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # so that no job is queued behind the end mark
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="conversation-store", daemon=True)
        self._thread.start()

    def submit(self, job: Job[C, T], *, alone: bool = False) -> Future[T]:
        """Queue a job; its future has the job's result once that is durable.

        A job may run more than once, each time from the same state, and must touch nothing but the connection.

        Args:
            job: is given the connection.
            alone: run it outside any transaction, once.
        """
        future: Future[T] = Future()
        with self._gate:
            if self._closed:
                future.set_exception(StoreError(f"the conversation store {self._name} is closed"))
            else:
                self._queue.put(_Item(job, future, alone))
        return future

    def call(self, job: Job[C, T], *, alone: bool = False) -> T:
        """Run a job and wait for it. From the writer's own thread (a future's callback) it runs at once."""
        if threading.current_thread() is not self._thread:
            return self.submit(job, alone=alone).result()
        future: Future[T] = Future()
        self._run_safely([_Item(job, future, alone)])
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
            for group in _groups(item for item in items if item is not None):
                # a job that was cancelled while it waited is left out
                self._run_safely([item for item in group if item.future.set_running_or_notify_cancel()])
        self._link.close()

    def _run_safely(self, group: list[_Item]) -> None:
        """Run a group whatever happens: nobody must wait for a future of a thread that died."""
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

    def _run_alone(self, item: _Item) -> None:
        try:
            item.future.set_result(item.job(self._link.connection))
        except self._link.errors as error:
            item.future.set_exception(self._failure(error))

    def _run(self, group: list[_Item]) -> None:
        """Run a group in one transaction and resolve its futures; if that fails, in one transaction each."""
        if not group:
            return
        try:
            self._link.begin()
        except self._link.errors as error:  # locked by another process, or no connection: nobody's fault here, and waiting was done
            self._roll_back()
            for item in group:
                item.future.set_exception(self._failure(error))
            return
        failures: tuple[type[Exception], ...] = (*self._link.errors, _TransactionLost)
        try:
            outcomes = [self._run_one(item.job) for item in group]
            self._link.connection.execute("COMMIT")
        except failures as error:
            lost = self._link.lost
            self._roll_back()
            if lost or len(group) == 1:
                for item in group:
                    item.future.set_exception(self._failure(error, lost))
            else:
                for item in group:
                    self._run([item])
            return
        for item, (result, failure) in zip(group, outcomes, strict=True):
            if failure is None:
                item.future.set_result(result)
            else:
                item.future.set_exception(failure)

    def _run_one(self, job: Job[C, Any]) -> tuple[Any, Exception | None]:
        """One job in its savepoint: its result or its failure. Raises only if the whole transaction is lost."""
        connection = self._link.connection
        connection.execute("SAVEPOINT job")
        try:
            result = job(connection)
        except Exception as error:
            if not self._link.in_transaction:  # a full disk makes SQLite undo everything
                raise _TransactionLost(str(error)) from error
            connection.execute("ROLLBACK TO job")
            connection.execute("RELEASE job")
            return None, self._failure(error) if isinstance(error, self._link.errors) else error
        connection.execute("RELEASE job")
        return result, None

    def _roll_back(self) -> None:
        if self._link.in_transaction:
            self._link.connection.execute("ROLLBACK")

    def _failure(self, error: BaseException, lost: bool = False) -> StoreError:
        outcome = (
            "the connection was lost, so what was being written may be stored or not"
            if lost
            else "take what was being written as not stored"
        )
        failure = StoreError(f"the conversation store {self._name} failed: {str(error).strip()}; {outcome}")
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
