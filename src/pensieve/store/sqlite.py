"""Conversations in one SQLite file. Knows SQLite's ways with connections and files; never what conversations are.

Readers have connections of their own and never wait for the writer. An in-memory database has a single connection, so
there the writer's thread reads too.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pensieve.errors import StoreError
from pensieve.store.schema import MIGRATIONS, Migration, connect, open_for_writing
from pensieve.store.sql import SqlStore
from pensieve.store.writer import Connection, GroupWriter, Job

T = TypeVar("T")

MEMORY = ":memory:"
REBUILD_BYTES = 256 << 20  # rebuilding takes some 6 s a GB, and nothing is written meanwhile
CHECKPOINT_S = 0.05  # how long a checkpoint waits, and writers for it, before it is tried again


def default_path() -> Path:
    """Where conversations are kept unless the user says otherwise: in their data directory."""
    import platformdirs

    return Path(platformdirs.user_data_dir("pensieve", appauthor=False)) / "conversations.db"


class SqliteLink:
    """SQLite's transactions, for `GroupWriter`.

    Args:
        connection: as `schema.connect` makes them.
    """

    errors: tuple[type[Exception], ...] = (sqlite3.Error,)
    lost = False  # a file does not go away

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    @property
    def in_transaction(self) -> bool:
        """Whether one is open."""
        return self.connection.in_transaction

    def begin(self) -> None:
        """Begin a transaction that may write: no other process can write until it ends."""
        self.connection.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class SqliteStore(SqlStore[sqlite3.Connection]):
    """A `ConversationStore` in a SQLite file.

    Several processes may use the same file; a write waits for the others' for `busy_timeout_s` and then fails.

    Args:
        path: the file, made if it is not there; ":memory:" for a store that ends with this object.
        busy_timeout_s: how long to wait for another process's lock.
        rebuild_bytes: `erase` rebuilds a file up to this size, so that nothing of what was deleted is left in it (see `_scrub`).
        clock: seconds since the epoch.
        migrations: the schema's history.

    Raises:
        StoreError: the file cannot be opened, is not a conversation store, or is one of a newer program.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        busy_timeout_s: float = 5.0,
        rebuild_bytes: int = REBUILD_BYTES,
        clock: Callable[[], float] = time.time,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> None:
        self._path = None if str(path) == MEMORY else Path(path)
        self._name = str(path)
        self._busy_timeout_s = busy_timeout_s
        self._rebuild_bytes = rebuild_bytes
        self._clock = clock
        self._writer = GroupWriter(SqliteLink(open_for_writing(self._path, busy_timeout_s, migrations)), self._name)
        self._readers: list[sqlite3.Connection] = []  # idle ones; as many as were ever in use at once
        self._readers_lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """See `ConversationStore.close`."""
        super().close()
        with self._readers_lock:
            self._closed = True
            while self._readers:
                self._readers.pop().close()

    def _read(self, query: Job[Connection, T]) -> T:
        """Run a query on a connection that nobody else uses meanwhile."""
        if self._path is None:
            return self._writer.call(query)
        with self._readers_lock:
            if self._closed:
                raise StoreError(f"the conversation store {self._name} is closed")
            connection = self._readers.pop() if self._readers else None
        try:
            if connection is None:
                connection = connect(self._path, self._busy_timeout_s, read_only=True)
            connection.execute("BEGIN")  # all of a query's statements see one state
            try:
                return query(connection)
            finally:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise StoreError(f"the conversation store {self._name} cannot be read: {error}") from error
        finally:
            if connection is not None:
                self._give_back(connection)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._readers_lock:
            if self._closed or connection.in_transaction:
                connection.close()
            else:
                self._readers.append(connection)

    def _scrub(self) -> bool:
        """Leave nothing of deleted rows in the file and its log.

        `secure_delete` overwrites rows where they were deleted, but not the copies that SQLite leaves in a page's free space when
        it moves rows to another page. Rebuilding the file does away with those. The log holds old pages until it is truncated.
        """
        if self._path is None:
            return True
        rebuilt = self._rebuild(self._path)
        try:
            return self._truncate_log(self._path) and rebuilt
        except sqlite3.Error:  # no connection: the rows are gone all the same
            return False

    def _rebuild(self, path: Path) -> bool:
        if path.stat().st_size > self._rebuild_bytes:
            return False
        try:
            self._writer.call(lambda connection: connection.execute("VACUUM").fetchone(), alone=True)
        except StoreError:  # another process writes all the time, or there is no room for a second file: the rows are gone all the same
            return False
        return True

    def _truncate_log(self, path: Path) -> bool:
        """Bring the log's pages into the file and cut it to nothing, which needs a moment in which nobody reads an older state."""
        deadline_s = time.monotonic() + self._busy_timeout_s
        connection = connect(path, CHECKPOINT_S)
        try:
            while True:
                try:
                    (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                except sqlite3.OperationalError:
                    busy = 1
                if not busy:
                    return True
                if time.monotonic() >= deadline_s:
                    return False
                time.sleep(CHECKPOINT_S)
        finally:
            connection.close()
