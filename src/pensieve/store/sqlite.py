"""Conversations in one SQLite file.

Knows SQLite's connections and files; never what conversations are. Readers have connections of their own and
never wait for the writer. An in-memory database has a single connection, on which the writer's thread reads,
too.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pensieve.errors import StoreError, StoreUnavailable
from pensieve.store.conversation_store import ConversationStore
from pensieve.store.files import FileGone, StoreFiles
from pensieve.store.schema import MIGRATIONS, Migration, connect, open_for_writing
from pensieve.store.writer import GroupWriter, Job, Kind

log = logging.getLogger(__name__)

T = TypeVar("T")

MEMORY = ":memory:"
REBUILD_BYTES = 256 << 20  # rebuilding takes about 6 s a GB, and nothing is written meanwhile
CHECKPOINT_S = 0.05  # seconds that a checkpoint waits, and writers for it, before it is tried again


def default_path() -> Path:
    """The default file of conversations, in the user's data directory."""
    import platformdirs

    return Path(platformdirs.user_data_dir("pensieve", appauthor=False)) / "conversations.db"


class SqliteLink:
    """SQLite's transactions, for `GroupWriter`.

    Args:
        connection: as `schema.connect` makes them.
        files: the files that it writes; None in memory.
    """

    errors: tuple[type[Exception], ...] = (sqlite3.Error, FileGone)
    lost = False  # no connection can break between a commit and its answer

    def __init__(self, connection: sqlite3.Connection, files: StoreFiles | None) -> None:
        self.connection = connection
        self._files = files

    @property
    def in_transaction(self) -> bool:
        return self.connection.in_transaction

    def begin(self) -> None:
        """Begin a transaction that may write: no other process can write until it ends."""
        self.check()
        self.connection.execute("BEGIN IMMEDIATE")

    def check(self) -> None:
        """Raise `FileGone` if the next process would not find the files that this one writes."""
        if self._files is not None:
            self._files.check()

    def outcome(self) -> bool | None:
        """Never called: `lost` is False."""
        return None

    def kind(self, error: BaseException) -> Kind:
        return kind_of(error)

    def words(self, error: BaseException) -> str:
        """SQLite's own messages name no path."""
        return str(error).strip() or type(error).__name__

    def close(self) -> None:
        self.connection.close()


def kind_of(error: BaseException) -> Kind:
    """Whether a failure of SQLite may pass, means a damaged file, or is our mistake."""
    if isinstance(error, FileGone):
        return "passing"
    if isinstance(
        error, sqlite3.OperationalError
    ):  # no space, locked, input/output; also text that is not UTF-8
        return "broken" if "UTF-8" in str(error) else "passing"
    return "broken" if type(error) is sqlite3.DatabaseError else "mistake"


class SqliteStore(ConversationStore):
    """A `ConversationStore` in a SQLite file.

    Several processes may use the same file. A write waits for the others for `busy_timeout_s`, then fails.

    Args:
        path: the file, made if it is missing; ":memory:" for a store that ends with this object.
        busy_timeout_s: how long to wait for another process's lock.
        rebuild_bytes: `erase` rebuilds a file up to this size, so that no deleted bytes are left in it (see
            `_scrub`).
        clock: seconds since the epoch.
        migrations: the schema's history.

    Raises:
        StoreError: the file cannot be opened, is not a conversation store, or belongs to a newer version.
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
        self._path = None if str(path) == MEMORY else Path(path).absolute()
        self._name = str(path)
        self._busy_timeout_s = busy_timeout_s
        self._rebuild_bytes = rebuild_bytes
        self._clock = clock
        connection = open_for_writing(self._path, busy_timeout_s, migrations)
        self._files = None if self._path is None else StoreFiles(self._path)
        self._writer = GroupWriter(SqliteLink(connection, self._files), self._name)
        self._readers: list[sqlite3.Connection] = []  # idle connections: as many as were ever in use at once
        self._readers_lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        super().close()
        with self._readers_lock:
            self._closed = True
            while self._readers:
                self._readers.pop().close()

    def _read(self, query: Job[T]) -> T:
        """Run a query on a connection of its own."""
        if self._path is None:
            return self._writer.call(query)
        with self._readers_lock:
            if self._closed:
                raise StoreUnavailable("the conversation store is closed")
            connection = self._readers.pop() if self._readers else None
        try:
            assert self._files is not None
            self._files.check()  # reads must see the file that other processes and the next start see
            if connection is None:
                connection = connect(self._path, self._busy_timeout_s, read_only=True)
            connection.execute("BEGIN")  # all of a query's statements see one state
            try:
                return query(connection)
            finally:
                connection.execute("ROLLBACK")
        except (sqlite3.Error, FileGone) as error:
            log.error("the conversation store %s cannot be read: %s", self._name, error)
            failed = StoreUnavailable if kind_of(error) == "passing" else StoreError
            raise failed(f"the conversation store cannot be read: {error}") from error
        finally:
            if connection is not None:
                self._give_back(connection)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._readers_lock:
            if self._closed or connection.in_transaction:
                connection.close()
            else:
                self._readers.append(connection)

    def _scrub(self) -> tuple[bool, bool]:
        """Remove the bytes of deleted rows from the file and its log.

        `secure_delete` overwrites rows where they were deleted, but not the copies that SQLite leaves in a
        page's free space when it moves rows to another page. Rebuilding the file removes those. The log holds
        old pages until it is truncated. A file that is too large to be rebuilt counts as done once its log is
        truncated, though copies may be left.
        """
        if self._path is None:
            return True, True
        try:
            may_rebuild = self._path.stat().st_size <= self._rebuild_bytes
            rebuilt = may_rebuild and self._rebuild()
            truncated = self._truncate_log(self._path)
        except (sqlite3.Error, OSError):  # no connection, or no file: the rows are deleted anyway
            return False, False
        return truncated and (rebuilt or not may_rebuild), truncated and rebuilt

    def _rebuild(self) -> bool:
        try:
            self._writer.call(lambda connection: connection.execute("VACUUM").fetchone(), alone=True)
        # another process keeps writing, or there is no space for a second file: the rows are deleted anyway
        except StoreError:
            return False
        return True

    def _truncate_log(self, path: Path) -> bool:
        """Bring the log's pages into the file and truncate the log.

        Needs a moment without readers of older states.
        """
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
